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

import torch
from torch import Tensor

from .packed import DTYPES, Packed, check, nibbles_to_meta

_NIBBLES = torch.tensor([4, 8, 9, 12, 13, 14], dtype=torch.uint8)
_HALVES = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.uint8)
# A nibble of one kind to its like of the other; 0, which is neither, for what is not legal.
_TO_HALF = torch.zeros(16, dtype=torch.uint8)
_TO_HALF[_NIBBLES.long()] = _HALVES
_TO_NIBBLE = torch.zeros(16, dtype=torch.uint8)
_TO_NIBBLE[_HALVES.long()] = _NIBBLES


def to_bitmask(values: Tensor, meta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A packed weight as `shape`, `compressed`, `bitmask`.

    Args:
        values: ``[N, K/2]``, also 8-bit floats.
        meta: uint8 ``[N, ceil(K/8)]``.

    Returns:
        ``shape [2, 1]`` int64, ``compressed [N, K/2]``, which is `values` itself, ``bitmask [N, ceil(K/8)]`` uint8.

    Raises:
        ValueError: not a legal packed weight.

    >>> shape, compressed, bitmask = to_bitmask(*pack_24(torch.tensor([[0.0, 5.0, 0.0, 7.0]])))
    >>> shape.flatten().tolist(), compressed.tolist(), bitmask.tolist()
    ([1, 4], [[5.0, 7.0]], [[10]])
    """
    check(values, meta)
    N, K = values.shape[0], 2 * values.shape[1]
    to_half = _TO_HALF.to(meta.device)
    bitmask = to_half[(meta & 15).long()] | to_half[(meta >> 4).long()] << 4
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
    nibbles = _nibbles(bitmask, K)
    if not bool(nibbles.all()):
        row, group = (nibbles == 0).nonzero()[0].tolist()
        raise ValueError(
            f"from_bitmask: bitmask row {row}, group {group} does not keep exactly two of four"
        )
    return compressed, nibbles_to_meta(nibbles)


def read(shape: Tensor, compressed: Tensor, bitmask: Tensor) -> Packed | Tensor:
    """A packed weight, or the dense one where the mask is not two of every four in each row.

    compressed-tensors forms its groups over the flattened weight: with a number of columns that is no multiple of
    4 they reach over the end of a row.
    """
    N, K = _check(shape, compressed, bitmask)
    if K % 4 == 0 and bool((nibbles := _nibbles(bitmask, K)).all()):
        return Packed(compressed, nibbles_to_meta(nibbles), K)
    kept = _bits(bitmask)[:, :K]
    content = compressed.flatten().view(torch.uint8).view(-1, compressed.element_size())
    dense = content.new_zeros(N, K, compressed.element_size())
    dense[kept] = content
    return dense.view(N, K * compressed.element_size()).view(compressed.dtype)


def _nibbles(bitmask: Tensor, K: int) -> Tensor:
    """Our nibbles ``[N, K/4]``, 0 where a group does not keep two."""
    halves = torch.stack([bitmask & 15, bitmask >> 4], dim=-1).flatten(1)[:, : K // 4]
    return _TO_NIBBLE.to(bitmask.device)[halves.long()]


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
    kept = _bits(bitmask)
    if bool(kept[:, K:].any()):
        raise ValueError(f"from_bitmask: bitmask keeps something past column {K}")
    if (count := int(kept.sum())) != compressed.numel():
        raise ValueError(
            f"from_bitmask: bitmask keeps {count} elements, compressed has {compressed.numel()}"
        )
    return N, K
