"""The layout of ``torch.sparse.SparseSemiStructuredTensorCUTLASS``: packed elements, and metadata in CUTLASS's order.

::

    dtype        packed         meta                       one element of meta   N multiple of   K multiple of
    fp16, bf16   [N, K/2]       int16 [N, K/16]            4 groups of four      32              32
    int8         [N, K/2]       int32 [N, K/32]            8 groups of four      16              64
    fp32         [N, K/2]       int16 [N, K/8]             4 pairs               32              16

A group's nibble is ours. fp32 keeps one of every two (the tensor cores' 1:2 of TF32): a pair's nibble is 4 for the
first and 14 for the second. Of the logical meta ``[N, columns]`` memory then holds, rows as bits ``… r2 r1 r0``::

    column / 2 , row block , r2 r1 r0 , (32 rows: r4) , column % 2 , r3

Source:
torch 2.13 ``sparse/_semi_structured_conversions.py``; CUTLASS's ``host_reorder.h``, ``ColumnMajorInterleaved<2>``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import bits
from .packed import check, nibbles_to_meta, positions

# By dtype: element of meta, rows that are reordered together, dense columns of one element of meta.
_LAYOUTS = {
    torch.float16: (torch.int16, 32, 16),
    torch.bfloat16: (torch.int16, 32, 16),
    torch.int8: (torch.int32, 16, 32),
    torch.float32: (torch.int16, 32, 8),
}


def why_not(N: int, K: int, dtype: torch.dtype) -> str | None:
    """Why a weight ``[N, K]`` cannot have this layout, or None."""
    if dtype not in _LAYOUTS:
        return f"PyTorch has no such layout for {dtype}"
    _, rows, columns = _LAYOUTS[dtype]
    if N % rows or K % (2 * columns):
        return f"PyTorch takes rows in multiples of {rows} and columns in multiples of {2 * columns} for {dtype}"
    return None


def to_cutlass(values: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """A packed weight as PyTorch's `packed` and `meta`.

    ``SparseSemiStructuredTensorCUTLASS(shape, packed=packed, meta=meta, packed_t=None, meta_t=None,
    compressed_swizzled_bitmask=None)`` takes them.

    Args:
        values: ``[N, K/2]``, fp16, bf16, int8 or fp32.
        meta: uint8 ``[N, K/8]``.

    Raises:
        ValueError: not a legal packed weight, a shape the layout has no place for, or fp32 with two non-zeros in a
            pair; names the first row and pair.
        TypeError: another dtype.
    """
    check(values, meta)
    N, K = values.shape[0], 2 * values.shape[1]
    if values.dtype not in _LAYOUTS:
        raise TypeError(f"to_cutlass: {why_not(N, K, values.dtype)}")
    if reason := why_not(N, K, values.dtype):
        raise ValueError(f"to_cutlass: the weight has shape {(N, K)}; {reason}")
    packed = values
    if values.dtype is torch.float32:
        packed, second = _pairs(values, meta)
        meta = nibbles_to_meta((4 + 10 * second).to(torch.uint8))
    element, rows, _ = _LAYOUTS[values.dtype]
    logical = meta.contiguous().view(element)
    order = _order(rows)
    return packed, _split(logical, rows).permute(order).reshape(N, logical.shape[1])


def from_cutlass(packed: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`to_cutlass`: ``values [N, K/2]`` and ``meta [N, K/8]``.

    Raises:
        ValueError: the two do not belong together, or hold an illegal nibble.
        TypeError: a dtype.
    """
    if packed.dtype not in _LAYOUTS:
        raise TypeError(
            f"from_cutlass: packed has dtype {packed.dtype}; it takes fp16, bf16, int8 or fp32"
        )
    element, rows, columns = _LAYOUTS[packed.dtype]
    if meta.dtype is not element:
        raise TypeError(
            f"from_cutlass: meta has dtype {meta.dtype}; with {packed.dtype} it takes {element}"
        )
    if packed.dim() != 2:
        raise ValueError(f"from_cutlass: packed has shape {tuple(packed.shape)}; it takes [N, K/2]")
    N, K = packed.shape[0], 2 * packed.shape[1]
    if reason := why_not(N, K, packed.dtype):
        raise ValueError(f"from_cutlass: packed has shape {tuple(packed.shape)}; {reason}")
    if tuple(meta.shape) != (N, K // columns):
        raise ValueError(
            f"from_cutlass: meta has shape {tuple(meta.shape)}; for N = {N}, K = {K} it takes {(N, K // columns)}"
        )
    order = _order(rows)
    split = _split(meta.new_empty(meta.shape), rows)
    memory = meta.contiguous().view([split.shape[axis] for axis in order])
    inverse = sorted(range(len(order)), key=order.__getitem__)
    logical = memory.permute(inverse).reshape(N, K // columns).view(torch.uint8)
    if packed.dtype is torch.float32:
        nibbles = torch.stack([logical & 15, logical >> 4], dim=-1).flatten(1)
        if not bool(((nibbles == 4) | (nibbles == 14)).all()):
            row, pair = ((nibbles != 4) & (nibbles != 14)).nonzero()[0].tolist()
            raise ValueError(
                f"from_cutlass: meta row {row}, pair {pair} is the nibble {int(nibbles[row, pair])}; fp32 takes 4 or 14"
            )
        second = (nibbles == 14).to(torch.uint8).unflatten(1, (K // 4, 2))
        logical = nibbles_to_meta(second[..., 0] | (2 + second[..., 1]) << 2)
    check(packed, logical)
    return packed, logical


def _split(logical: Tensor, rows: int) -> Tensor:
    """logical [N, columns] by the bits that the order of memory takes apart."""
    high = (2,) if rows == 32 else ()
    N, columns = logical.shape
    return logical.view(N // rows, *high, 2, 8, columns // 2, 2)


def _order(rows: int) -> tuple[int, ...]:
    """Of the axes of :func:`_split`, memory's, slowest first."""
    # 32 rows: block, r4, r3, r2r1r0, column / 2, column % 2. 16 rows: the same without r4.
    return (4, 0, 3, 1, 5, 2) if rows == 32 else (3, 0, 2, 4, 1)


def _pairs(values: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """2:4 to 1:2: the kept elements [N, K/2], and for each pair whether it is the second that is kept."""
    N, groups = values.shape[0], values.shape[1] // 2
    kept = positions(meta, groups)
    fits = (kept[..., :1] < 2) & (kept[..., 1:] >= 2)  # one in each pair already
    dense = values.new_zeros(N, groups, 4)
    bits(dense).scatter_(-1, kept, bits(values).view(N, groups, 2))
    pairs = bits(dense).view(N, 2 * groups, 2)
    both = (pairs != 0).all(-1)
    if bool(both.any()):
        row, pair = both.nonzero()[0].tolist()
        raise ValueError(
            f"to_cutlass: row {row}, pair {pair} (columns {2 * pair} and {2 * pair + 1}) has two non-zeros; "
            "PyTorch's fp32 layout keeps one of every two"
        )
    placed = ((pairs[..., 0] == 0) & (pairs[..., 1] != 0)).view(N, groups, 2)
    second = torch.where(fits, kept % 2 == 1, placed).view(N, 2 * groups)
    packed = pairs.gather(-1, second.long().unsqueeze(-1)).view(N, 2 * groups)
    return packed.view(values.dtype), second
