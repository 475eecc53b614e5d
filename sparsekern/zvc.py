"""Zero-value compression of a tensor of any layout: :func:`pack_zvc` and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import ops


@dataclass(frozen=True, eq=False)
class PackedZVC:
    """A compressed tensor: three plain tensors, and the shape and strides to give back.

    Attributes:
        mask: uint8 ``[ceil(n/8)]``, one bit per element in storage order.
        values: the elements whose bits are not all zero, in the tensor's dtype.
        offsets: int64 ``[ceil(n/4096)]``, where each tile of 4096 elements starts in `values`.
        shape: of the tensor.
        stride: of the tensor that :meth:`unpack` returns, in elements.
    """

    mask: Tensor
    values: Tensor
    offsets: Tensor
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes held by mask, values and offsets."""
        return self.mask.nbytes + self.values.nbytes + self.offsets.nbytes

    @property
    def ratio(self) -> float:
        """Bytes of the tensor over bytes held, 1 / (density + 1/bits). Below 1, keep the tensor raw."""
        dense = self.shape.numel() * self.dtype.itemsize
        return dense / self.nbytes if self.nbytes else 1.0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedZVC:
        """The same on another device."""
        mask, values, offsets = (
            t.to(device, non_blocking=non_blocking) for t in (self.mask, self.values, self.offsets)
        )
        return replace(self, mask=mask, values=values, offsets=offsets)

    def unpack(self) -> Tensor:
        """The tensor, bit for bit, with its shape and strides.

        Raises:
            ValueError: mask, values and offsets do not fit together or not this shape.
        """
        if not _is_dense(self.shape, self.stride):
            raise ValueError(
                f"PackedZVC.unpack: stride is {self.stride}; it takes that of a tensor of shape "
                f"{tuple(self.shape)} without gaps or overlaps"
            )
        flat = ops.unpack_zvc(self.mask, self.values, self.offsets, [self.shape.numel()])
        return flat.as_strided(self.shape, self.stride)

    def __repr__(self) -> str:
        return (
            f"PackedZVC(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"nbytes={self.nbytes}, ratio={self.ratio:.2f})"
        )


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether such a tensor fills its storage once, in some order of its dimensions."""
    if len(shape) != len(stride):
        return False
    step = 1
    for width, length in sorted((w, n) for n, w in zip(shape, stride, strict=True) if n != 1):
        if width != step and 0 not in shape:
            return False
        step *= length
    return True


def pack_zvc(x: Tensor) -> PackedZVC:
    """Compress a tensor to a bit mask and its non-zero elements, losslessly.

    Works on bits: only all-zero bits are a zero, so -0.0, NaN payloads and denormals survive. A
    dense layout of any dimension order (channels_last, transposed) is read in its storage order
    without a copy and its strides come back; a tensor with gaps or overlaps (sliced, expanded)
    is copied first and comes back contiguous. Not differentiable.

    Args:
        x: any shape, any dtype of 1, 2, 4 or 8 bytes.

    Returns:
        A :class:`PackedZVC`. On CUDA its exact size costs one host synchronisation, as
        ``torch.nonzero``.

    Raises:
        TypeError: elements of 16 bytes, quantised or sparse tensors.

    Source: Rhu et al. 2018, "Compressing DMA Engine" (arXiv 1705.01626), section V.

    >>> packed = pack_zvc(torch.relu(torch.arange(-3.0, 3.0)))
    >>> packed.values, packed.mask, packed.unpack()
    (tensor([1., 2.]), tensor([48], dtype=torch.uint8), tensor([0., 0., 0., 0., 1., 2.]))
    """
    x = x.detach().resolve_conj().resolve_neg()
    if not _is_dense(x.shape, x.stride()):
        x = x.contiguous()
    # In storage order a dense tensor is contiguous, so nothing is copied.
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    mask, values, offsets = torch.ops.sparsekern.pack_zvc(x.permute(order))
    return PackedZVC(mask, values, offsets, x.shape, x.stride())
