"""The 2:4 formats against `clone`, and packing against torch's own conversion."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass as torch_conversion,
)

import sparsekern as sk
from sparsekern import reference
from sparsekern.backends import cpu
from sparsekern.bench.clock import Sides
from sparsekern.bench.session import reused_memory

from .linear import Weights, weights
from .timing import Cell, Row, can_reuse_memory, interleave, setting

ops = torch.ops.sparsekern

SHAPE, QUICK_SHAPE = (4096, 4096), (64, 64)
FORMATS = ("prune_24", "pack_24", "unpack_24", "gather_24", "prune_24_transposable")
PACKED_SIDE = ("pack_24", "unpack_24", "gather_24")  # read or write values and meta
DTYPES = ("fp32", "bf16", "int8")
CHECKED_ROWS = 64  # of each result are compared with the reference
CLONE, REUSING, CONVERSION = "clone", "clone, memory reused", "torch's conversion"


def cells(options, cache_bytes: int) -> Iterator[Cell]:
    N, K = QUICK_SHAPE if options.quick else SHAPE
    for dtype in (d for d in DTYPES if d in options.dtype):
        for threads in options.threads:
            for op in FORMATS:
                run = functools.partial(
                    _format, op, N, K, dtype, threads, options.budget, cache_bytes
                )
                cost = options.budget.cost(0.4 if op == "pack_24" else 0.05)
                yield Cell(f"{op} {dtype} {N} x {K}, threads: {threads}", cost, run)


def _arguments(op: str, w: Weights, i: int, rows: slice = slice(None)) -> tuple[torch.Tensor, ...]:
    values, meta = (t[rows] for t in w.packed[i % w.count])
    dense = w.dense[i % w.count][rows]
    return {"unpack_24": (values, meta), "gather_24": (dense, meta)}.get(op, (dense,))


def _same(ours, theirs) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    return all(torch.equal(o, t) for o, t in zip(ours, theirs, strict=True))


def _format(op, N, K, dtype, threads, budget, cache_bytes) -> list[Row]:
    w = weights(N, K, dtype, cache_bytes, cpu.isa())
    dense, (values, meta) = w.dense[0].nbytes, (t.nbytes for t in w.packed[0])
    function = getattr(ops, op)
    sides: Sides = {
        CLONE: lambda i: w.dense[i % w.count].clone(),
        op: lambda i: function(*_arguments(op, w, i)),
    }
    with setting(threads, cpu.isa()):
        first = _arguments(op, w, 0, slice(CHECKED_ROWS))
        exact = _same(function(*first), getattr(reference, op)(*first))
        samples = {CLONE: interleave(sides, budget)}
        if can_reuse_memory():
            with reused_memory():
                samples[REUSING] = interleave(sides, budget)
        if op == "pack_24":
            pruned = [sk.prune_24(d) for d in w.dense]
            sides[CONVERSION] = lambda i: torch_conversion(pruned[i % w.count])
            samples[CONVERSION] = interleave(sides, budget)
    rows = []
    for baseline, found in samples.items():
        row = Row("formats", op, dtype, {"N": N, "K": K}, threads, cpu.isa(), baseline)
        row.exact = exact
        row.bytes = dense + values + meta if op in PACKED_SIDE else 2 * dense
        row.baseline_bytes = 0 if baseline == CONVERSION else 2 * dense
        rows.append(row.timed(found, op, CONVERSION if baseline == CONVERSION else CLONE))
    return rows
