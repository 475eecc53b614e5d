"""How the benchmark times.

* The sides of a comparison take turns: every round draws one sample of each, in an order shuffled anew, so what the
  machine does meanwhile hits all of them. The result is the distribution of the per-round ratio, not a ratio of two
  medians.
* `call(i)` works on the i-th of several weights or buffers, together larger than the last-level cache: every side reads
  its own from memory.
* A sample lasts a millisecond or more; shorter calls are repeated within it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from sparsekern.backends import cpu

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
IDENTITY = "prepacking is the identity: times of linear_24"  # the note of such a row
SAMPLE_SECONDS = 1e-3
WARM_UP_SECONDS = 1e-2
LONG_CALL_SECONDS = 0.5  # its first call is warm-up enough
ERROR_ROWS = 64  # of the output, spread over all of it, are compared with float64

Sides = dict[str, Callable[[int], object]]


@dataclass(frozen=True)
class Spread:
    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        tenths = statistics.quantiles(values * (1 + (len(values) == 1)), n=10, method="inclusive")
        return cls(statistics.median(values), tenths[0], tenths[-1])

    def times(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.p10 * factor, self.p90 * factor)


def ratio_of(theirs: list[float], ours: list[float]) -> Spread:
    """Of the samples of one round, theirs over ours."""
    return Spread.of([t / o for t, o in zip(theirs, ours, strict=True)])


@dataclass(frozen=True)
class Budget:
    """Of one cell: `rounds`, or fewer, at least `least`, where they take longer than `seconds`."""

    rounds: int
    seconds: float
    least: int = 3

    def cost(self, round_seconds: float) -> float:
        """Seconds that a cell is likely to take, for the progress bar."""
        rounds = min(self.rounds, max(self.least, self.seconds / round_seconds))
        return 0.1 + round_seconds * (rounds + 1.5)


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
    turns = {name: itertools.count() for name in sides}

    def sample(name: str, repeats: int) -> float:
        call, turn = sides[name], turns[name]
        start = time.perf_counter()
        for _ in range(repeats):
            call(next(turn))
        return (time.perf_counter() - start) / repeats

    repeats = {}
    for name in sides:
        seconds = sample(name, 1)
        if seconds < LONG_CALL_SECONDS:
            seconds = sample(name, 1)
            seconds = sample(name, max(1, int(WARM_UP_SECONDS / seconds)))
        repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / seconds))

    samples: dict[str, list[float]] = {name: [] for name in sides}
    order, shuffle = list(sides), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(budget.rounds):
            if done >= budget.least and time.perf_counter() - start > budget.seconds:
                break
            shuffle(order)
            for name in order:
                samples[name].append(1e3 * sample(name, repeats[name]))
    finally:
        gc.enable()
    return samples


def copies(nbytes: int, cache_bytes: int) -> int:
    """How many buffers of `nbytes` it takes so that each has left the cache when its turn comes again."""
    return max(2, math.ceil(2 * cache_bytes / nbytes))


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


# glibc's mallopt parameters, and what it comes to by itself once a process has freed large blocks.
_TRIM, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_DEFAULTS = {_TRIM: 64 << 20, _MMAP_THRESHOLD: 32 << 20, _MMAP_MAX: 65536}


def can_reuse_memory() -> bool:
    return hasattr(ctypes.CDLL(None), "mallopt")


@contextlib.contextmanager
def reused_memory() -> Iterator[None]:
    """Large tensors take memory that was freed before, instead of pages that fault anew in every call.

    By itself glibc hands every block above 32 MB back to the system when it is freed.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM, 2**31 - 1)
    try:
        yield
    finally:
        for parameter, value in _DEFAULTS.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


def some_rows(n: int) -> torch.Tensor:
    """Indices of up to ERROR_ROWS rows of n, the first and the last among them."""
    return torch.linspace(0, n - 1, min(n, ERROR_ROWS)).round().long()


def error_ratio(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> float:
    """RMS error of ours over that of theirs, both against float64."""

    def rms(t: torch.Tensor) -> float:
        return (t.double() - exact).square().mean().sqrt().item()

    return rms(ours) / max(rms(theirs), 1e-300)
