"""sparse-24-bitmask, the 2:4 checkpoint format of compressed-tensors up to 0.13.

A layer ``x`` of ``[N, K]`` has three tensors; ``x.weight`` is gone::

    x.shape        int64 [2, 1]               N, K
    x.compressed   dtype [N, K/2]             the kept elements, row after row: our `values`, byte for byte
    x.bitmask      uint8 [N, ceil(K/8)]       bit k % 8 of byte k / 8: element k is kept

Of one group of four, a nibble of ours and half a byte of theirs::

    kept      0,1   0,2   1,2   0,3   1,3   2,3
    meta       4     8     9    12    13    14
    bitmask    3     5     6     9    10    12

Source: compressed-tensors 0.12.2, ``compressors/sparse_compressors/sparse_24_bitmask.py``.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .packed import DTYPES, Packed, check

# Of one group, a nibble of theirs to one of ours.
_NIBBLES = {3: 4, 5: 8, 6: 9, 9: 12, 10: 13, 12: 14}
# Of two groups a byte, each way; 0, which is neither, for what is not legal.
_TO_BITMASK, _TO_META = torch.zeros(2, 256, dtype=torch.uint8)
for (_low, _m), (_high, _n) in itertools.product(_NIBBLES.items(), repeat=2):
    _TO_META[_low | _high << 4] = _m | _n << 4
    _TO_BITMASK[_m | _n << 4] = _low | _high << 4


def to_bitmask(values: Tensor, meta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A packed weight as `shape`, `compressed`, `bitmask`.

    Args:
        values: ``[N, K/2]``, also 8-bit floats.
        meta: uint8 ``[N, ceil(K/8)]``.

    Returns:
        ``shape [2, 1]`` int64, ``compressed [N, K/2]``, which is `values` itself, ``bitmask [N, ceil(K/8)]`` uint8.

    Raises:
        ValueError: not a legal packed weight.

    >>> import sparsekern as sk
    >>> packed = sk.pack_24(torch.tensor([[0.0, 5.0, 0.0, 7.0]]))
    >>> shape, compressed, bitmask = to_bitmask(*packed)
    >>> shape.flatten().tolist(), compressed.tolist(), bitmask.tolist()
    ([1, 4], [[5.0, 7.0]], [[10]])
    """
    check(values, meta)
    N, K = values.shape[0], 2 * values.shape[1]
    bitmask = _TO_BITMASK.to(meta.device)[meta.long()]
    if K % 8:
        bitmask[:, -1] &= 15  # past the last column nothing is kept
    return torch.tensor([[N], [K]]), values, bitmask


def from_bitmask(shape: Tensor, compressed: Tensor, bitmask: Tensor) -> tuple[Tensor, Tensor]:
    """`shape`, `compressed`, `bitmask` as a packed weight; the inverse of :func:`to_bitmask`.

    Returns:
        ``values [N, K/2]``, which is `compressed` itself, and ``meta [N, ceil(K/8)]``.

    Raises:
        ValueError: the three do not belong together, a bit is set past the last column, or a group of four does
            not keep exactly two; names its row and group.
        TypeError: a dtype.
    """
    N, K = _check(shape, compressed, bitmask)
    if K % 4:
        raise ValueError(
            f"from_bitmask: shape is {(N, K)}; a packed weight takes columns in multiples of 4"
        )
    meta = _meta(bitmask, K)
    if not bool(meta.all()):
        row, byte = (meta == 0).nonzero()[0].tolist()
        group = 2 * byte + (int(bitmask[row, byte]) & 15 in _NIBBLES)
        raise ValueError(
            f"from_bitmask: bitmask row {row}, group {group} does not keep exactly two of four"
        )
    return compressed, meta


def read(shape: Tensor, compressed: Tensor, bitmask: Tensor) -> Packed | Tensor:
    """A packed weight, or the dense one where the mask is not two of every four in each row.

    compressed-tensors forms its groups over the flattened weight: with a number of columns that is no multiple of
    4 they reach over the end of a row.
    """
    N, K = _check(shape, compressed, bitmask)
    if K % 4 == 0 and bool((meta := _meta(bitmask, K)).all()):
        return Packed(compressed, meta, K)
    kept = _bits(bitmask)[:, :K]
    if (count := int(kept.sum())) != compressed.numel():
        raise ValueError(
            f"from_bitmask: bitmask keeps {count} elements, compressed has {compressed.numel()}"
        )
    content = compressed.flatten().view(torch.uint8).view(-1, compressed.element_size())
    dense = content.new_zeros(N, K, compressed.element_size())
    dense[kept] = content
    return dense.view(N, K * compressed.element_size()).view(compressed.dtype)


def _meta(bitmask: Tensor, K: int) -> Tensor:
    """meta, with a byte of 0 where one of its two groups does not keep two."""
    if K % 8:
        bitmask = bitmask.clone()
        bitmask[:, -1] |= 0x30  # becomes the 4 after an odd last group
    return _TO_META.to(bitmask.device)[bitmask.long()]


def _bits(bitmask: Tensor) -> Tensor:
    """uint8 [N, B] to bool [N, 8B], the lowest bit first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    return (bitmask.unsqueeze(-1) >> shifts & 1).flatten(1).bool()


def _check(shape: Tensor, compressed: Tensor, bitmask: Tensor) -> tuple[int, int]:
    """N and K. All sizes are held against tensors that are there, so a lie costs no memory."""
    if shape.numel() != 2 or shape.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"from_bitmask: shape must hold two integers, got {shape.dtype} {tuple(shape.shape)}"
        )
    N, K = shape.flatten().tolist()
    if bitmask.dtype is not torch.uint8:
        raise TypeError(f"from_bitmask: bitmask must be uint8, got {bitmask.dtype}")
    if compressed.dtype not in DTYPES:
        raise TypeError(f"from_bitmask: compressed has dtype {compressed.dtype}, of no 2:4 weight")
    if N < 0 or K < 0 or tuple(bitmask.shape) != (N, (K + 7) // 8):
        raise ValueError(
            f"from_bitmask: bitmask has shape {tuple(bitmask.shape)}, shape says {(N, K)}: that takes "
            f"{(N, (K + 7) // 8)}"
        )
    if compressed.dim() != 2 or compressed.shape[0] != N or 2 * compressed.shape[1] != K:
        raise ValueError(
            f"from_bitmask: compressed has shape {tuple(compressed.shape)}, shape says {(N, K)}: that takes two "
            "dimensions and half the columns"
        )
    if K % 8 and bool((bitmask[:, -1] >> (K % 8)).any()):
        raise ValueError(f"from_bitmask: bitmask keeps something past column {K}")
    return N, K
