"""Zero-value compression in Triton: a bit per element, and the elements whose bits are not all zero.

A program takes a tile of 4096 elements, as the format does::

    x        a 0 0 b 0 c ..      4096 elements, loaded 16 bytes a thread
    mask     1 0 0 1 0 1 ..      eight bits a byte, lowest first
    rank     0 . . 1 . 2 ..      a scan over the tile: how many non-zeros lie before
    values   a b c ..            from the tile's offset on

Where tiles lie in ``values``:

* ``pack_zvc`` reads x twice. The first pass writes the mask and counts, a sum over the tiles' counts says where each
  begins and how many there are, the second pass places them, in order, into memory of the exact size.
* ``pack_zvc_out`` reads x once: a tile reserves its place by an atomic addition to the count. Tiles then lie in the
  order in which they came; where determinism is asked for it makes the two passes, without asking the host. (Waiting
  for the tiles before, "look-back", needs guarantees of progress that Triton does not give.)

All of it is limited by the bytes moved: at 50 % zeros a 16-bit element costs 3.1 bytes in one pass, 5.1 in two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference import ZVC_TILE, bits

TILE = tl.constexpr(ZVC_TILE)

# ---- device functions ----


@triton.jit
def _load(x, n):
    """This program's elements, and 1 where they are stored, int32: a scan of booleans would be an exclusive or."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    words = tl.load(x + at, mask=at < n, other=0)
    return words, (words != 0).to(tl.int32)


@triton.jit
def _store_mask(mask, stored, n):
    weighted = tl.reshape(stored, [TILE // 8, 8]) << tl.arange(0, 8)[None, :]
    byte = tl.program_id(0).to(tl.int64) * (TILE // 8) + tl.arange(0, TILE // 8)
    tl.store(mask + byte, tl.sum(weighted, 1).to(tl.uint8), mask=byte < (n + 7) // 8)


@triton.jit
def _store_values(values, words, stored, offset, room):
    """The stored elements from `offset` on, none at or past `room`."""
    at = offset + tl.cumsum(stored, 0) - stored
    tl.store(values + at, words, mask=(stored != 0) & (at < room))


# ---- kernels ----


@triton.jit
def _mark(x, mask, counts, n):
    """First of two passes: the mask, and how many elements each tile stores."""
    _, stored = _load(x, n)
    _store_mask(mask, stored, n)
    tl.store(counts + tl.program_id(0), tl.sum(stored).to(tl.int64))


@triton.jit
def _place(x, values, offsets, n, room):
    """Second of two passes: the values, where `offsets` says."""
    words, stored = _load(x, n)
    _store_values(values, words, stored, tl.load(offsets + tl.program_id(0)), room)


@triton.jit
def _pack_zvc(x, mask, values, offsets, count, n, room):
    """Both in one pass, tiles in the order in which they come."""
    words, stored = _load(x, n)
    _store_mask(mask, stored, n)
    offset = tl.atomic_add(count, tl.sum(stored).to(tl.int64))
    tl.store(offsets + tl.program_id(0), offset)
    _store_values(values, words, stored, offset, room)


@triton.jit
def _load_mask(mask, n):
    """1 where an element of this program's tile is stored, int32."""
    byte = tl.program_id(0).to(tl.int64) * (TILE // 8) + tl.arange(0, TILE // 8)
    bytes_ = tl.load(mask + byte, mask=byte < (n + 7) // 8, other=0).to(tl.int32)
    return tl.reshape(bytes_[:, None] >> tl.arange(0, 8)[None, :] & 1, [TILE])


@triton.jit
def _count(mask, counts, n):
    tl.store(counts + tl.program_id(0), tl.sum(_load_mask(mask, n)).to(tl.int64))


@triton.jit
def _unpack_zvc(mask, values, offsets, out, n, room):
    """Whatever mask and offsets say, nothing outside values[room] is read."""
    stored = _load_mask(mask, n)
    place = tl.load(offsets + tl.program_id(0)) + tl.cumsum(stored, 0) - 1
    inside = (stored != 0) & (place >= 0) & (place < room)
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tl.store(out + at, tl.load(values + place, mask=inside, other=0), mask=at < n)


# ---- launchers ----

_CONFIGS = [{"num_warps": 8, "enable_fp_fusion": True}]  # 16 elements a thread


def _in_order(x: Tensor, mask: Tensor, offsets: Tensor) -> Tensor:
    """The first pass: fills mask and offsets, returns the total, int64 [], on the device."""
    counts = torch.empty_like(offsets)
    _mark[(offsets.numel(),)](bits(x), mask, counts, x.numel(), **_CONFIGS[0])
    torch.cumsum(counts, 0, out=offsets)
    total = offsets[-1].clone()
    offsets -= counts
    return total


def pack_zvc(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    n = x.numel()
    mask = x.new_empty((n + 7) // 8, dtype=torch.uint8)
    offsets = x.new_empty(triton.cdiv(n, ZVC_TILE), dtype=torch.int64)
    if n == 0:
        return mask, x.new_empty(0), offsets
    values = x.new_empty(int(_in_order(x, mask, offsets)))
    room = values.numel()
    _place[(offsets.numel(),)](bits(x), bits(values), offsets, n, room, **_CONFIGS[0])
    return mask, values, offsets


def pack_zvc_out(x: Tensor, mask: Tensor, values: Tensor, offsets: Tensor, count: Tensor) -> None:
    x = x.contiguous()
    n, room, grid = x.numel(), values.numel(), (offsets.numel(),)
    count.zero_()
    if n == 0:
        return
    if torch.are_deterministic_algorithms_enabled():
        count.copy_(_in_order(x, mask, offsets))
        _place[grid](bits(x), bits(values), offsets, n, room, **_CONFIGS[0])
    else:
        _pack_zvc[grid](bits(x), mask, bits(values), offsets, count, n, room, **_CONFIGS[0])


def unpack_zvc(mask: Tensor, values: Tensor, offsets: Tensor, size: list[int]) -> Tensor:
    mask, values, offsets = mask.contiguous(), values.contiguous(), offsets.contiguous()
    out = values.new_empty(size)
    # A graph under capture cannot ask what it found. Its replays read nothing outside of values.
    if not (values.is_cuda and torch.cuda.is_current_stream_capturing()):
        _check(mask, values.numel(), offsets, out.numel())
    if out.numel():
        _unpack_zvc[(offsets.numel(),)](
            mask, bits(values), offsets, bits(out), out.numel(), values.numel(), **_CONFIGS[0]
        )
    return out


def _check(mask: Tensor, stored: int, offsets: Tensor, n: int) -> None:
    """Raise unless mask and offsets describe `stored` values of n elements; asks the device once."""
    counts = torch.zeros_like(offsets)
    if n:
        _count[(offsets.numel(),)](mask, counts, n, **_CONFIGS[0])
    beyond = (mask[-1:] >> (n % 8)).any() if n % 8 else counts.new_zeros(())
    outside = ((offsets < 0) | (offsets > stored - counts)).any()
    # Sorted by where they begin, the tiles that store anything must follow one another.
    begin, order = torch.where(counts > 0, offsets, stored + 1).sort()
    length = counts[order]
    apart = ((begin != length.cumsum(0) - length) & (length > 0)).any()
    beyond, total, outside, apart = torch.stack(
        [beyond.long(), counts.sum(), outside.long(), apart.long()]
    ).tolist()
    if beyond:
        raise ValueError("unpack_zvc: mask has bits set past the last element")
    if total != stored:
        raise ValueError(f"unpack_zvc: mask marks {total} non-zero elements, values holds {stored}")
    if outside:
        raise ValueError(f"unpack_zvc: offsets point outside the {stored} values there are")
    if apart:
        raise ValueError("unpack_zvc: offsets overlap or leave a gap")
