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

from .linear import Weights, weights
from .timing import Cell, Row, Sides, interleave, setting

ops = torch.ops.sparsekern

SHAPE, QUICK_SHAPE = (4096, 4096), (64, 64)
FORMATS = ("prune_24", "pack_24", "unpack_24", "gather_24", "prune_24_transposable")
DTYPES = ("fp32", "bf16", "int8")
CHECKED_ROWS = 64  # of each result are compared with the reference
CONVERSION = "torch's conversion"


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
    dense, values, meta = w.dense[0].nbytes, w.packed[0][0].nbytes, w.packed[0][1].nbytes
    function = getattr(ops, op)
    sides: Sides = {
        "clone": lambda i: w.dense[i % w.count].clone(),
        op: lambda i: function(*_arguments(op, w, i)),
    }
    if op == "pack_24":
        pruned = [sk.prune_24(d) for d in w.dense]
        sides[CONVERSION] = lambda i: torch_conversion(pruned[i % w.count])

    def row(baseline: str) -> Row:
        return Row("formats", op, dtype, {"N": N, "K": K}, threads, cpu.isa(), baseline)

    against_clone = row("clone")
    against_clone.bytes = {
        "pack_24": dense + values + meta,
        "unpack_24": values + meta + dense,
        "gather_24": dense + meta + values,
    }.get(op, 2 * dense)
    against_clone.baseline_bytes = 2 * dense
    with setting(threads, cpu.isa()):
        first = _arguments(op, w, 0, slice(CHECKED_ROWS))
        against_clone.exact = _same(function(*first), getattr(reference, op)(*first))
        samples = interleave(sides, budget)
    rows = [against_clone.timed(samples, op)]
    if op == "pack_24":
        rows.append(row(CONVERSION).timed(samples, op))
        rows[-1].exact = against_clone.exact
        rows[-1].bytes = against_clone.bytes
    return rows
