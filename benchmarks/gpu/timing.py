"""How the GPU's benchmarks time: events around one call, sides in turn, the cache flushed where the case says cold.

A flush is a write of twice the last-level cache before the first event. It also keeps the device busy while the host
launches the call, so that what is timed is the kernels and not the launch.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch

from sparsekern.bench.clock import Spread, ratio_of

Sides = dict[str, Callable[[], object]]
FLUSH_BYTES = 256 << 20  # at the least
WARM_UP = 3


class Clock:
    """Milliseconds of work on a device. A CPU takes part so that the benchmarks' own logic can be tested on one."""

    def __init__(self, device: torch.device, flush_bytes: int = FLUSH_BYTES):
        self.device = device
        self.events = device.type != "cpu"
        if self.events:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            flush_bytes = max(flush_bytes, 2 * cache)
        self._flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def sample(self, call: Callable[[], object], cold: bool) -> float:
        if cold:
            self._flush.zero_()
        if not self.events:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)

    def interleave(
        self, sides: Sides, *, rounds: int, seconds: float, cold: bool
    ) -> dict[str, list[float]]:
        """Samples of every side, one a round, in an order shuffled anew; at least three rounds."""
        for call in sides.values():
            for _ in range(WARM_UP):
                call()
        samples: dict[str, list[float]] = {name: [] for name in sides}
        order, shuffle = list(sides), random.Random(0).shuffle
        start = time.perf_counter()
        for done in range(rounds):
            if done >= 3 and time.perf_counter() - start > seconds:
                break
            shuffle(order)
            for name in order:
                samples[name].append(self.sample(sides[name], cold))
        return samples


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a replayed CUDA graph: no launch cost, and proof that it can be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def rows(
    case: dict,
    samples: dict[str, list[float]],
    baseline: str,
    nbytes: dict[str, int],
    flop: int = 0,
) -> list[dict]:
    """One row a side: times, rates and the ratio to the baseline of the same round (above 1 is faster than it)."""
    found = []
    for name, ms in samples.items():
        spread = Spread.of(ms)
        row = {**case, "side": name, "ms": spread.median, "p10": spread.p10, "p90": spread.p90}
        row["ratio"] = ratio_of(samples[baseline], ms).median
        if name in nbytes:
            row["GB/s"] = nbytes[name] / spread.median / 1e6
        if flop:
            row["TFLOP/s"] = flop / spread.median / 1e9
        found.append(row)
    return found
