"""Products: linear_24 and linear_24_prepacked against F.linear, the gradients against the dense ones."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import sparsekern as sk
from sparsekern.backends import cpu
from sparsekern.bench.clock import Budget, Sides, copies, ratio_of
from sparsekern.bench.linear import compiled, csr, reordered
from sparsekern.bench.session import error_ratio, some_rows

from .timing import DTYPES, IDENTITY, Cell, Row, interleave, setting

ops = torch.ops.sparsekern

SHAPES = [(M, 14336, 4096) for M in (1, 4, 16, 64)]
SHAPES += [(M, 4096, 4096) for M in (16, 64, 256, 1024, 2048)]
OTHER_TIER_SHAPES = [(1024, 4096, 4096)]
PEER_SHAPES = [(1, 14336, 4096), (16, 4096, 4096), (256, 4096, 4096), (1024, 4096, 4096)]
BACKWARD_SHAPES = [(M, 4096, 4096) for M in (1, 16, 64, 256, 1024)]
SWEEP_M = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048]
SWEEP_WEIGHTS = [(1024, 1024), (4096, 4096), (14336, 4096), (4096, 14336)]
QUICK_SHAPES = [(1, 64, 64), (16, 64, 64)]

# What torch's dense product reaches on a server core, in GFLOP/s: only so that the progress bar can foretell.
_GUESS = {"fp32": 110, "bf16": 400, "fp16": 32}


class Weights:
    """Dense weights, the same pruned and packed, and prepacked; each form past the cache by itself."""

    def __init__(self, N: int, K: int, dtype: torch.dtype, cache_bytes: int) -> None:
        self.count = copies(N * K // 2 * dtype.itemsize + N * -(-K // 8), cache_bytes)
        if dtype.is_floating_point:
            self.dense = [torch.randn(N, K).to(dtype) for _ in range(self.count)]
        else:
            self.dense = [torch.randint(-127, 128, (N, K), dtype=dtype) for _ in range(self.count)]
        self.packed = [sk.pack_24(w, prune=True) for w in self.dense]
        self.nbytes = self.packed[0][0].nbytes + self.packed[0][1].nbytes

    @functools.cached_property
    def prepacked(self) -> list[torch.Tensor] | None:
        """None where prepacking is the identity."""
        values, meta = self.packed[0]
        plain = torch.cat([values.view(torch.uint8).flatten(), meta.flatten()])
        if torch.equal(sk.prepack_24(values, meta), plain):
            return None
        return [sk.prepack_24(*packed) for packed in self.packed]


@functools.lru_cache(maxsize=1)
def weights(N: int, K: int, dtype: str, cache_bytes: int, tier: str) -> Weights:
    """The last set is kept, as the cases that share one follow each other. A tier may have its own prepacking."""
    return Weights(N, K, DTYPES[dtype], cache_bytes)


def _cell(
    name: str, run: Callable, M: int, N: int, K: int, dtype: str, threads: int, budget
) -> Cell:
    seconds = 2 * M * N * K / (_GUESS[dtype] * 1e9 * threads) + N * K * 2 / 20e9
    label = f"{name} {dtype} {M} x {N} x {K}, threads: {threads}"
    return Cell(label, budget.cost(2.5 * seconds), run)


def _case(M: int, N: int, K: int) -> dict[str, float | str]:
    return {"M": M, "N": N, "K": K}


def _ours(x: torch.Tensor, w: Weights, N: int) -> Sides:
    """Our forms of the product: the packed one, and the prepacked one where it differs."""
    sides: Sides = {"linear_24": lambda i: sk.linear_24(x, *w.packed[i % w.count])}
    if (prepacked := w.prepacked) is not None:
        sides["linear_24_prepacked"] = lambda i: sk.linear_24_prepacked(
            x, prepacked[i % w.count], N
        )
    return sides


# ---- linear, and the sweep over M ----


def linear_cells(options, cache_bytes: int) -> Iterator[Cell]:
    best, shapes = cpu.isa(), QUICK_SHAPES if options.quick else SHAPES
    for dtype in options.floats:
        for M, N, K in shapes:
            for threads in options.threads:
                run = functools.partial(
                    _linear, "linear", M, N, K, dtype, threads, best, options.budget, cache_bytes
                )
                yield _cell("linear", run, M, N, K, dtype, threads, options.budget)
    if "fp32" in options.floats and "avx2" in cpu.isas() and best != "avx2":
        for M, N, K in QUICK_SHAPES[-1:] if options.quick else OTHER_TIER_SHAPES:
            for threads in options.threads:
                run = functools.partial(
                    _linear, "linear", M, N, K, "fp32", threads, "avx2", options.budget, cache_bytes
                )
                yield _cell("avx2 linear", run, M, N, K, "fp32", threads, options.budget)


def sweep_cells(options, cache_bytes: int) -> Iterator[Cell]:
    sizes = [(64, 64)] if options.quick else SWEEP_WEIGHTS
    budget = Budget(min(9, options.rounds), 0.3, least=2)
    for dtype in options.floats:
        for N, K in sizes:
            for M in (1, 3) if options.quick else SWEEP_M:
                for threads in options.threads:
                    run = functools.partial(
                        _linear, "sweep", M, N, K, dtype, threads, cpu.isa(), budget, cache_bytes
                    )
                    yield _cell("sweep", run, M, N, K, dtype, threads, budget)


def _linear(section, M, N, K, dtype, threads, tier, budget: Budget, cache_bytes) -> list[Row]:
    with setting(torch.get_num_threads(), tier):
        w = weights(N, K, dtype, cache_bytes, tier)
        x = torch.randn(M, K).to(DTYPES[dtype])
        ours = _ours(x, w, N)
    with setting(threads, tier):
        errors = _linear_errors(x, w, ours) if section == "linear" else {}
        samples = interleave(
            {"F.linear": lambda i: F.linear(x, w.dense[i % w.count]), **ours}, budget
        )
    rows = []
    for op in ("linear_24", "linear_24_prepacked"):
        side = op if op in ours else "linear_24"
        if section == "sweep" and side != op:
            continue
        row = Row(section, op, dtype, _case(M, N, K), threads, tier, "F.linear")
        row.flop, row.error = 2 * M * N * K, errors.get(side)
        row.bytes = w.nbytes + (M * K + M * N) * x.itemsize
        row.baseline_bytes = (N * K + M * K + M * N) * x.itemsize
        row.note = "" if side == op else IDENTITY
        rows.append(row.timed(samples, side))
    return rows


def _linear_errors(x: torch.Tensor, w: Weights, ours: Sides) -> dict[str, float]:
    pruned, rows = sk.unpack_24(*w.packed[0]), some_rows(len(x))
    exact = x[rows].double() @ pruned.double().T
    dense = F.linear(x, pruned)[rows]
    return {name: error_ratio(call(0)[rows], dense, exact) for name, call in ours.items()}


# ---- the other ways to such a product that torch has ----


def peer_cells(options, cache_bytes: int) -> Iterator[Cell]:
    for dtype in options.floats:
        for M, N, K in QUICK_SHAPES[:1] if options.quick else PEER_SHAPES:
            for threads in options.threads:
                run = functools.partial(
                    _peers, M, N, K, dtype, threads, options.budget, cache_bytes
                )
                yield _cell("peers", run, M, N, K, dtype, threads, options.budget)


PEERS = {"torch.compile": compiled, "oneDNN, reordered": reordered, "torch CSR": csr}


def _peers(M, N, K, dtype, threads, budget: Budget, cache_bytes) -> list[Row]:
    tier = cpu.isa()
    w = weights(N, K, dtype, cache_bytes, tier)
    x = torch.randn(M, K).to(DTYPES[dtype])
    ours = _ours(x, w, N)
    best = list(ours)[-1]
    sides: Sides = {"F.linear": lambda i: F.linear(x, w.dense[i % w.count]), best: ours[best]}
    missing = {}
    with setting(threads, tier):
        for name, prepare in PEERS.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # CSR is in beta, and unchecked
                    call = prepare(x, w)
                    call(0)
                sides[name] = call
            except Exception as error:  # whatever a peer raises, it is named and the others go on
                missing[name] = str(error).partition("\n")[0][:80] or type(error).__name__
        samples = interleave(sides, budget)
    rows = []
    for name in PEERS:
        row = Row("peers", best, dtype, _case(M, N, K), threads, tier, name, flop=2 * M * N * K)
        if name in missing:
            row.note = f"not here: {missing[name]}"
        else:
            row.timed(samples, best)
            row.more["over_linear"] = ratio_of(samples["F.linear"], samples[name]).median
            if name == "torch CSR":
                row.flop = 0  # not a dense product: no part in the ceiling
        rows.append(row)
    return rows


# ---- the gradients ----


def backward_cells(options, cache_bytes: int) -> Iterator[Cell]:
    for dtype in options.floats:
        for M, N, K in QUICK_SHAPES if options.quick else BACKWARD_SHAPES:
            for threads in options.threads:
                for op in (_dx, _dvalues):
                    run = functools.partial(
                        op, M, N, K, dtype, threads, options.budget, cache_bytes
                    )
                    yield _cell("backward", run, M, N, K, dtype, threads, options.budget)


def _dx(M, N, K, dtype, threads, budget: Budget, cache_bytes) -> list[Row]:
    w = weights(N, K, dtype, cache_bytes, cpu.isa())
    dy, rows = torch.randn(M, N).to(DTYPES[dtype]), some_rows(M)
    pruned = sk.unpack_24(*w.packed[0])
    row = Row("backward", "linear_24_dx", dtype, _case(M, N, K), threads, cpu.isa(), "dy @ W")
    with setting(threads, cpu.isa()):
        row.error = error_ratio(
            ops.linear_24_dx(dy, *w.packed[0])[rows],
            (dy @ pruned)[rows],
            dy[rows].double() @ pruned.double(),
        )
        sides: Sides = {
            "dy @ W": lambda i: dy @ w.dense[i % w.count],
            row.op: lambda i: ops.linear_24_dx(dy, *w.packed[i % w.count]),
        }
        row.timed(interleave(sides, budget), row.op)
    row.flop = 2 * M * N * K
    row.bytes = w.nbytes + (M * K + M * N) * dy.itemsize
    row.baseline_bytes = (N * K + M * K + M * N) * dy.itemsize
    return [row]


def _dvalues(M, N, K, dtype, threads, budget: Budget, cache_bytes) -> list[Row]:
    w = weights(N, K, dtype, cache_bytes, cpu.isa())
    dy, x = torch.randn(M, N).to(DTYPES[dtype]), torch.randn(M, K).to(DTYPES[dtype])
    meta, rows = w.packed[0][1], some_rows(N)
    row = Row("backward", "linear_24_dvalues", dtype, _case(M, N, K), threads, cpu.isa(), "dyᵀ @ x")
    with setting(threads, cpu.isa()):
        exact = dy[:, rows].double().T @ x.double()
        row.error = error_ratio(
            ops.linear_24_dvalues(dy, x, meta)[rows],
            ops.gather_24((dy.T @ x)[rows], meta[rows]),
            ops.gather_24(exact, meta[rows]),
        )
        sides: Sides = {
            "dyᵀ @ x": lambda i: dy.T @ x,
            row.op: lambda i: ops.linear_24_dvalues(dy, x, w.packed[i % w.count][1]),
        }
        row.timed(interleave(sides, budget), row.op)
    row.flop = 2 * M * N * K
    return [row]
