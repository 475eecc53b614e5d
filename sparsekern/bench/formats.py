"""The 2:4 formats beside a copy of the weight, and packing beside torch's own conversion."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from .. import reference
from .clock import Budget, Sides
from .linear import weights
from .results import Row
from .session import CHECKED_ROWS, DTYPES, Case, Session, reused_memory
from .shapes import Shape

OPS = ("prune_24", "pack_24", "unpack_24", "prune_24_transposable")
CLONE, CONVERSION = "clone", "conversion"  # torch.sparse's, for CUTLASS


def cases(session: Session) -> Iterator[Case]:
    shapes = {(s.N, s.K): s for s in session.options.shapes}
    for dtype in session.options.dtypes:
        for shape in sorted(shapes.values(), key=lambda s: (s.N, s.K)):
            for threads in session.each_threads():
                label = f"formats {dtype} {shape.N} x {shape.K}, threads: {threads}"
                run = functools.partial(_measure, shape=shape, dtype=dtype, threads=threads)
                yield Case(label, 1.0, run)


def _arguments(op: str, w, i: int, rows: slice = slice(None)) -> tuple[Tensor, ...]:
    if op == "unpack_24":
        return tuple(t[rows] for t in w.packed[i % w.count])
    return (w.dense[i % w.count][rows],)


def _right(op: str, w) -> bool:
    """Whether the first rows have the reference's bits."""
    rows = slice(len(w.dense[0]) // 4 * 4)  # whole tiles of the transposable mask
    rows = slice(min(CHECKED_ROWS, rows.stop) or None)
    got = getattr(torch.ops.sparsekern, op)(*_arguments(op, w, 0, rows))
    want = getattr(reference, op)(*_arguments(op, w, 0, rows))
    pairs = [(got, want)] if isinstance(got, Tensor) else zip(got, want, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _measure(session: Session, budget: Budget, shape: Shape, dtype: str, threads: int) -> list[Row]:
    kind, rows = DTYPES[dtype], []
    w = weights(session, shape, dtype)
    dense = w.dense[0].nbytes
    served = next(iter(session.backends_for("pack_24", kind)))
    with session.threads(threads), reused_memory():
        for op in OPS:
            if op == "prune_24_transposable" and shape.N % 4:
                continue
            function = getattr(torch.ops.sparsekern, op)
            sides: Sides = {
                op: lambda i, f=function, op=op: f(*_arguments(op, w, i)),
                CLONE: lambda i: w.dense[i % w.count].clone(),
            }
            peers = [CLONE]
            if op == "pack_24" and session.wants(CONVERSION) and shape.N % 32 == shape.K % 64 == 0:
                sides[CONVERSION] = lambda i: sparse_semi_structured_from_dense_cutlass(
                    w.dense[i % w.count]
                )
                peers.append(CONVERSION)
            case = {"N": shape.N, "K": shape.K}
            label = f"{shape.N} x {shape.K} {shape.label}".strip()
            row = session.row(
                op,
                "pack_24",
                case,
                label,
                dtype,
                threads,
                (served, session.kernel(served, op, kind)),
            )
            row.nbytes = dense + w.nbytes if op in ("pack_24", "unpack_24") else 2 * dense
            row.compression = dense / w.nbytes if op in ("pack_24", "unpack_24") else None
            if session.options.check:
                row.exact = _right(op, w)
                row.wrong = "" if row.exact else "differs from the reference"
            row.timed(session.clock.interleave(sides, budget), op, peers)
            row.bound_ms = session.bound_ms(row.nbytes, 0, dtype, threads)
            rows.append(row)
    return rows
