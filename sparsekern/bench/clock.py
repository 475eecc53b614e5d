"""How the benchmark times.

* The sides of a comparison take turns: every round draws one sample of each, in an order shuffled anew, so what the
  machine does meanwhile hits all of them. Ratios are per round, not of two medians.
* On a CPU a sample lasts a millisecond or more, shorter calls are repeated within it, and ``call(i)`` works on the
  i-th of several weights or buffers that are together larger than the cache.
* Memory that a CPU's call frees stays with the process. glibc else returns it to the system and takes it anew, or not,
  by what was allocated before: three thousand page faults, 5 ms, for the 12 MB output of one side and none for
  another's.
* On a GPU a sample is one call between two events, behind a write of twice the cache: what is timed is the kernels
  with a cold cache, and the write keeps the device busy while the host launches them.
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
from collections.abc import Callable
from dataclasses import dataclass

import torch

SAMPLE_SECONDS = 1e-3
WARM_UP_SECONDS = 1e-2
LONG_CALL_SECONDS = 0.5  # its first call is warm-up enough
WARM_UP_CALLS = 3  # of a GPU's
FLUSH_BYTES = 256 << 20  # at the least
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h

Sides = dict[str, Callable[[int], object]]


@dataclass(frozen=True)
class Spread:
    """Of a sample: the median, the 10th and 90th percentile, and a 95 % confidence interval of the median."""

    median: float
    p10: float
    p90: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        tenths = statistics.quantiles(values * (1 + (len(values) == 1)), n=10, method="inclusive")
        low, high = _median_interval(sorted(values))
        return cls(statistics.median(values), tenths[0], tenths[-1], low, high, len(values))


def _median_interval(ordered: list[float]) -> tuple[float, float]:
    """The order statistics between which the true median lies in 95 of 100 cases, whatever the distribution.

    Below six samples there are none; the extremes stand in.
    """
    n, below, outside = len(ordered), 0, 0.0
    while below < n // 2:
        outside += math.comb(n, below) / 2**n
        if outside > 0.025:
            break
        below += 1
    below = max(below - 1, 0)
    return ordered[below], ordered[n - 1 - below]


def ratio_of(theirs: list[float], ours: list[float]) -> Spread:
    """Of the samples of one round, theirs over ours."""
    return Spread.of([t / o for t, o in zip(theirs, ours, strict=True)])


@dataclass(frozen=True)
class Budget:
    """Of one case: `rounds`, or fewer, at least `least`, where they take longer than `seconds`."""

    rounds: int
    seconds: float
    least: int = 3

    def cost(self, round_seconds: float) -> float:
        """Seconds that a case is likely to take, for the progress bar."""
        rounds = min(self.rounds, max(self.least, self.seconds / round_seconds))
        return 0.1 + round_seconds * (rounds + 1.5)


def keep_freed_memory() -> None:
    """Of this process, until it ends; where the C library is glibc."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


class Clock:
    """Milliseconds of work on a device.

    Args:
        now: seconds, from any zero; a test's may be one that the calls themselves set forward.
    """

    def __init__(
        self,
        device: torch.device,
        now: Callable[[], float] = time.perf_counter,
        flush_bytes: int = FLUSH_BYTES,
    ):
        self.device, self.now = device, now
        self._flush = None
        if device.type == "cpu":
            keep_freed_memory()
        else:
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            flush = max(flush_bytes, 2 * cache)
            self._flush = torch.empty(flush, dtype=torch.uint8, device=device)

    def interleave(self, sides: Sides, budget: Budget) -> dict[str, list[float]]:
        """Milliseconds per call of every side, one sample per round."""
        turns = {name: itertools.count() for name in sides}
        repeats = {name: self._warm_up(sides[name], turns[name]) for name in sides}
        samples: dict[str, list[float]] = {name: [] for name in sides}
        order, shuffle = list(sides), random.Random(0).shuffle
        gc.collect()
        gc.disable()
        try:
            start = self.now()
            for done in range(budget.rounds):
                if done >= budget.least and self.now() - start > budget.seconds:
                    break
                shuffle(order)
                for name in order:
                    seconds = self._sample(sides[name], turns[name], repeats[name])
                    samples[name].append(1e3 * seconds)
        finally:
            gc.enable()
        return samples

    def _warm_up(self, call, turn) -> int:
        """Calls until the first costs are paid; how often to call within a sample."""
        if self._flush is not None:
            for _ in range(WARM_UP_CALLS):
                call(next(turn))
            return 1
        seconds = self._sample(call, turn, 1)
        if seconds < LONG_CALL_SECONDS:
            seconds = self._sample(call, turn, 1)
            seconds = self._sample(call, turn, max(1, int(WARM_UP_SECONDS / max(seconds, 1e-9))))
        return max(1, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9)))

    def _sample(self, call, turn, repeats: int) -> float:
        if self._flush is None:
            start = self.now()
            for _ in range(repeats):
                call(next(turn))
            return (self.now() - start) / repeats
        self._flush.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call(next(turn))
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3


def copies(nbytes: int, cache_bytes: int) -> int:
    """How many buffers of `nbytes` it takes so that each has left the cache when its turn comes again."""
    return max(2, math.ceil(2 * cache_bytes / max(nbytes, 1)))


def captured(call: Callable[[int], object]) -> Callable[[int], object]:
    """The call as a replayed CUDA graph: no launch cost, and proof that it can be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(WARM_UP_CALLS):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(0)
    return lambda i: graph.replay()
