"""How many bytes a map of activations takes in each of the formats that Rhu et al. (arXiv 1705.01626) compare.

All work on the bits of whole elements in storage order: only an element whose bits are all zero is a
zero. The run-length formats are written out here because "run-length" alone does not fix a size:

tokens
    A byte, then what it announces. ``0LLLLLLL`` is a run of L + 1 zeros, one to 128, and nothing
    follows; ``1LLLLLLL`` announces L + 1 elements that are not zero, which follow as they are. A
    longer run is split. Runs end where the other kind begins. PackBits, with runs that can only be of
    zeros.
fixed
    Per element that is not zero, five bits with the number of zeros before it, then the element. 31
    zeros and more: a record of 31 with a zero as its element stands for 32 zeros. So do zeros at the
    end. After Chen et al. 2017, "Eyeriss", whose elements are 16 bits; here they are as wide as the
    map's.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

import sparsekern as sk

TOKEN_RUN = 128  # elements that one token covers at most
FIXED_BITS = 5
FIXED_RUN = 1 << FIXED_BITS  # zeros that a record with a zero element covers
ZLIB_LEVEL = 6  # zlib's own default
ZLIB_BYTES = 1 << 20  # what zlib sees of a map; more costs seconds and moves the ratio little

LAYOUTS = ("NCHW", "NHWC")


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The map in the storage order of `layout`, contiguous.

    Images ``[N, C, H, W]``; sequences ``[N, T, C]``, whose channels are last as in NHWC and for NCHW go
    before the tokens. ``[N, C]`` is the same in both.
    """
    if x.dim() == 4 and layout == "NHWC":
        return x.permute(0, 2, 3, 1).contiguous()
    if x.dim() == 3 and layout == "NCHW":
        return x.transpose(1, 2).contiguous()
    return x.contiguous()


def _runs(x: Tensor) -> tuple[Tensor, bool]:
    """Lengths of the runs of zeros and non-zeros, in turn, int64, and whether the first is of zeros. x is not empty."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    zero = x.contiguous().flatten().view(integers[x.itemsize]) == 0
    edges = (zero[1:] != zero[:-1]).nonzero().flatten() + 1
    ends = torch.tensor([0]), edges, torch.tensor([zero.numel()])
    return torch.cat(ends).diff(), bool(zero[0])


def token_bytes(x: Tensor) -> int:
    """Bytes of `x` as run-length tokens."""
    if not x.numel():
        return 0
    lengths, zero_first = _runs(x)
    tokens = int((lengths + TOKEN_RUN - 1).div(TOKEN_RUN, rounding_mode="floor").sum())
    return tokens + int(lengths[int(zero_first) :: 2].sum()) * x.itemsize


def fixed_bytes(x: Tensor) -> int:
    """Bytes of `x` as run-length records of fixed width, the last byte filled up."""
    if not x.numel():
        return 0
    lengths, zero_first = _runs(x)
    zeros, others = lengths[int(not zero_first) :: 2], lengths[int(zero_first) :: 2]
    records = int(others.sum()) + int(zeros.div(FIXED_RUN, rounding_mode="floor").sum())
    zeros_last = zero_first == bool(len(lengths) % 2)
    if zeros_last and int(lengths[-1]) % FIXED_RUN:
        records += 1
    return -(-records * (FIXED_BITS + 8 * x.itemsize) // 8)


def zlib_bytes(x: Tensor) -> float:
    """Bytes of `x` under zlib, scaled up from its first MiB."""
    data = x.contiguous().flatten().view(torch.uint8).numpy()
    if not data.size:
        return 0.0
    part = data[:ZLIB_BYTES]
    return len(zlib.compress(part, ZLIB_LEVEL)) * (data.size / part.size)


def zvc_bytes(x: Tensor) -> int:
    """Bytes of `x` zero-value compressed: mask, values and the offset of each tile."""
    return sk.pack_zvc(x).nbytes


def measured(x: Tensor) -> dict[str, float]:
    """Format and layout to bytes of a float32 map; "zvc bf16" is of the map rounded to bfloat16, half as large raw."""
    packed = sk.pack_zvc(x)
    found: dict[str, float] = {
        "zvc, no offsets": packed.nbytes - packed.offsets.nbytes,
        "zvc bf16": zvc_bytes(x.bfloat16()),
    }
    for layout in LAYOUTS:
        ordered = in_layout(x, layout)
        found[f"zvc {layout}"] = zvc_bytes(ordered)
        found[f"tokens {layout}"] = token_bytes(ordered)
        found[f"fixed {layout}"] = fixed_bytes(ordered)
        found[f"zlib {layout}"] = zlib_bytes(ordered)
    return found
