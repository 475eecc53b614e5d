"""Rows and cells of the CPU benchmark. How it times is told in sparsekern/bench/clock.py."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from sparsekern.backends import cpu
from sparsekern.bench.clock import Budget, Clock, Sides, Spread, ratio_of

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
IDENTITY = "prepacking is the identity: times of linear_24"  # the note of such a row


@dataclass
class Row:
    """One comparison: a baseline and ours in one case, and what it takes to judge them."""

    section: str
    op: str
    dtype: str
    case: dict[str, float | str]  # M, N, K of a product; bytes and zeros of a compression
    threads: int
    tier: str
    baseline: str
    baseline_ms: Spread | None = None
    ours_ms: Spread | None = None
    ratio: Spread | None = None  # baseline over ours, per round: above 1 ours is faster
    rounds: int = 0
    flop: int = 0  # of the dense product
    bytes: int = 0  # that ours has to read and write
    baseline_bytes: int = 0
    error: float | None = None  # RMS error against float64, over that of torch's dense product
    exact: bool | None = None  # of what has one right answer
    must: float | None = None
    stretch: float | None = None
    verdict: str = ""
    note: str = ""
    more: dict[str, float] = field(default_factory=dict)

    def timed(self, samples: dict[str, list[float]], ours: str, baseline: str | None = None) -> Row:
        """Fills in the times of two sides out of what `interleave` gave."""
        theirs, mine = samples[baseline or self.baseline], samples[ours]
        self.baseline_ms, self.ours_ms = Spread.of(theirs), Spread.of(mine)
        self.ratio = ratio_of(theirs, mine)
        self.rounds = len(mine)
        return self


@dataclass(frozen=True)
class Cell:
    """A case to measure: what the progress bar says, the seconds it is likely to take, and the measurement."""

    label: str
    cost: float
    run: Callable[[], list[Row]]


def interleave(sides: Sides, budget: Budget) -> dict[str, list[float]]:
    """Milliseconds per call of every side, one sample per round."""
    return Clock(torch.device("cpu")).interleave(sides, budget)


@contextlib.contextmanager
def setting(threads: int, tier: str) -> Iterator[None]:
    """Measure with so many threads and on this tier; set up with what there was."""
    before = torch.get_num_threads(), cpu.isa()
    torch.set_num_threads(threads)
    cpu.set_isa(tier)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cpu.set_isa(before[1])


def can_reuse_memory() -> bool:
    return hasattr(ctypes.CDLL(None), "mallopt")
