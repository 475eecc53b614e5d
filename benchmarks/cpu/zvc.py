"""Zero-value compression against copying the same bytes, and beside general compressors."""

from __future__ import annotations

import functools
import importlib
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from sparsekern.backends import cpu
from sparsekern.bench.clock import Budget, Sides, copies, ratio_of
from sparsekern.bench.session import reused_memory
from sparsekern.bench.zvc import blosc2_codec, lz4_codec, zlib_codec, zstd_codec

from .timing import Cell, Row, can_reuse_memory, interleave, setting

ops = torch.ops.sparsekern

NBYTES, QUICK_NBYTES = 64 << 20, 64 << 10
ELEMENTS = {1: torch.int8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
ZEROS = (0.5, 0.9)
COPY, CLONE, REUSING = "copy_", "clone", "clone, memory reused"


def _data(dtype: torch.dtype, zeros: float, nbytes: int) -> torch.Tensor:
    """Normal deviates (non-zero integers where there are no others), so many of them zero, at random places."""
    n = nbytes // dtype.itemsize
    integers = not dtype.is_floating_point
    x = torch.randint(1, 128, (n,), dtype=dtype) if integers else torch.randn(n).to(dtype)
    return x.masked_fill_(torch.rand(n) < zeros, 0)


class Buffers:
    """Inputs, their compressed forms, and room for both to write to; each past the cache."""

    def __init__(self, dtype: torch.dtype, zeros: float, nbytes: int, cache_bytes: int) -> None:
        self.count = copies(nbytes, cache_bytes)
        self.x = [_data(dtype, zeros, nbytes) for _ in range(self.count)]
        self.packed = [ops.pack_zvc(x) for x in self.x]
        self.target = [torch.zeros_like(x) for x in self.x]
        self.room = [
            (
                torch.zeros_like(mask),
                torch.zeros_like(x),
                torch.zeros_like(offsets),
                torch.zeros(1, dtype=torch.int64),
            )
            for x, (mask, _, offsets) in zip(self.x, self.packed, strict=True)
        ]
        self.packed_bytes = sum(t.nbytes for t in self.packed[0])


@functools.lru_cache(maxsize=1)
def buffers(element: int, zeros: float, nbytes: int, cache_bytes: int) -> Buffers:
    return Buffers(ELEMENTS[element], zeros, nbytes, cache_bytes)


def cells(options, cache_bytes: int) -> Iterator[Cell]:
    nbytes = QUICK_NBYTES if options.quick else NBYTES
    for element in (1, 4) if options.quick else ELEMENTS:
        for zeros in ZEROS[:1] if options.quick else ZEROS:
            for threads in options.threads:
                run = functools.partial(
                    _zvc, element, zeros, threads, nbytes, options.budget, cache_bytes
                )
                label = f"{element} bytes, {zeros:.0%} zeros, threads: {threads}"
                if "zvc" in options.section:
                    yield Cell(f"zvc {label}", options.budget.cost(0.2), run)
                run = functools.partial(_codecs, element, zeros, threads, nbytes, cache_bytes)
                if "codecs" in options.section:
                    yield Cell(f"codecs {label}", 9.0 / threads, run)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _zvc(element, zeros, threads, nbytes, budget, cache_bytes) -> list[Row]:
    b = buffers(element, zeros, nbytes, cache_bytes)
    n, size = b.count, [b.x[0].numel()]
    packing: Sides = {
        "pack_zvc_out": lambda i: ops.pack_zvc_out(b.x[i % n], *b.room[i % n]),
        COPY: lambda i: b.target[i % n].copy_(b.x[i % n]),
    }
    allocating: Sides = {
        "pack_zvc": lambda i: ops.pack_zvc(b.x[i % n]),
        "unpack_zvc": lambda i: ops.unpack_zvc(*b.packed[i % n], size),
        CLONE: lambda i: b.x[i % n].clone(),
    }
    with setting(threads, cpu.isa()):
        packing["pack_zvc_out"](0)
        mask, values, offsets, count = b.room[0]
        again = {
            "pack_zvc_out": ops.unpack_zvc(mask, values[: int(count)], offsets, size),
            "pack_zvc": ops.unpack_zvc(*ops.pack_zvc(b.x[0]), size),
            "unpack_zvc": allocating["unpack_zvc"](0),
        }
        samples = {COPY: interleave(packing, budget), CLONE: interleave(allocating, budget)}
        if can_reuse_memory():
            with reused_memory():
                samples[REUSING] = interleave(allocating, budget)
    rows = []
    for op, baseline in itertools.product(again, samples):
        if (op == "pack_zvc_out") != (baseline == COPY):
            continue
        case = {"bytes": element, "zeros": zeros}
        row = Row("zvc", op, f"{element} B", case, threads, cpu.isa(), baseline)
        row.exact = _same_bits(again[op], b.x[0])
        row.bytes, row.baseline_bytes = nbytes + b.packed_bytes, 2 * nbytes
        row.more = {"compression": nbytes / b.packed_bytes, "input_bytes": nbytes}
        rows.append(row.timed(samples[baseline], op, COPY if baseline == COPY else CLONE))
    return rows


# ---- general compressors ----


@dataclass(frozen=True)
class Codec:
    """A peer: how to make its two functions for an element size and a number of threads."""

    name: str
    module: str
    threaded: bool
    make: Callable[[object, int, int], tuple[Callable, Callable]]


CODECS = [
    Codec("zlib, level 1", "zlib", False, zlib_codec),
    Codec("LZ4", "lz4.frame", False, lz4_codec),
    Codec("Zstandard, level 1", "zstandard", True, zstd_codec),
    Codec("Blosc2, LZ4 with bitshuffle", "blosc2", True, blosc2_codec),
]


def _codecs(element, zeros, threads, nbytes, cache_bytes) -> list[Row]:
    b = buffers(element, zeros, nbytes, cache_bytes)
    x, size = b.x[0], [b.x[0].numel()]
    data = x.view(torch.uint8).numpy().data
    pack: Sides = {"pack_zvc": lambda i: ops.pack_zvc(x)}
    unpack: Sides = {"unpack_zvc": lambda i: ops.unpack_zvc(*b.packed[0], size)}
    rows = []
    for codec in CODECS:
        case = {"bytes": element, "zeros": zeros}
        row = Row("codecs", "pack_zvc", f"{element} B", case, threads, cpu.isa(), codec.name)
        rows.append(row)
        if threads > 1 and not codec.threaded:
            row.note = "has no threads of its own"
            continue
        try:
            module = importlib.import_module(codec.module)
        except ImportError:
            row.note = f"missing: {codec.module.partition('.')[0]} (pip install '.[bench]')"
            continue
        compress, decompress = codec.make(module, element, threads)
        packed = compress(data)
        row.exact = bytes(decompress(packed)) == bytes(data)
        row.more = {"compression": nbytes / len(packed), "input_bytes": nbytes}
        pack[codec.name] = lambda i, compress=compress: compress(data)
        unpack[codec.name] = lambda i, decompress=decompress, packed=packed: decompress(packed)
    with setting(threads, cpu.isa()):
        budget = Budget(rounds=5, seconds=2, least=2)
        packing, unpacking = interleave(pack, budget), interleave(unpack, budget)
    for row in rows:
        if not row.note:
            row.timed(packing, "pack_zvc")
            theirs, mine = unpacking[row.baseline], unpacking["unpack_zvc"]
            row.more |= {
                "unpack_ms": statistics.median(theirs),
                "ours_unpack_ms": statistics.median(mine),
                "unpack_ratio": ratio_of(theirs, mine).median,
                "ours_compression": nbytes / b.packed_bytes,
            }
    return rows
