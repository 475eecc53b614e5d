"""Eager cost of SparseLinear.forward over nn.Linear.forward, where the arithmetic is next to nothing.

    python benchmarks/overhead.py [--rounds 200] [--features 16]

The two sides are interleaved, round by round, on one thread; the table gives the median and the 10th and 90th
percentile of the per-call times, and of their difference. The aim is at most 5 µs more in inference.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import sparsekern as sk


def call_time(call: Callable[[], object], mode: Callable, calls: int = 200) -> float:
    """Microseconds per call, over `calls` calls, within the context that `mode` makes."""
    with mode():
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls * 1e6


def spread(values: list[float]) -> str:
    tenths = statistics.quantiles(values, n=10)
    return f"{statistics.median(values):.1f} [{tenths[0]:.1f}, {tenths[-1]:.1f}]"


def cases(features: int) -> dict[str, tuple[Callable, Callable, Callable]]:
    """Name to (context, dense call, sparse call)."""
    dense, sparse = nn.Linear(features, features), sk.SparseLinear(features, features)
    frozen = sk.SparseLinear(features, features).prepack()
    x = torch.randn(1, features)

    def step(layer: nn.Module) -> Callable:
        return lambda: layer(x).sum().backward()

    def call(layer: nn.Module) -> Callable:
        return lambda: layer(x)

    return {
        "inference_mode": (torch.inference_mode, call(dense), call(sparse)),
        "inference_mode, prepacked": (torch.inference_mode, call(dense), call(frozen)),
        "no_grad": (torch.no_grad, call(dense), call(sparse)),
        "forward, grad": (torch.enable_grad, call(dense), call(sparse)),
        "forward and backward": (torch.enable_grad, step(dense), step(sparse)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=200, help="interleaved rounds of 200 calls each"
    )
    parser.add_argument("--features", type=int, default=16, help="in and out features")
    options = parser.parse_args()

    torch.set_num_threads(1)
    table = Table(
        title=f"µs per call, batch 1, {options.features} features, median \\[p10, p90]; "
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.processor() or platform.machine()}"
    )
    for column in ("case", "nn.Linear", "SparseLinear", "difference"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, (mode, *sides) in track(cases(options.features).items(), "measuring", transient=True):
        for side in sides:
            call_time(side, mode)
        pairs = [[call_time(side, mode) for side in sides] for _ in range(options.rounds)]
        dense_times, sparse_times = ([p[side] for p in pairs] for side in (0, 1))
        table.add_row(
            name, spread(dense_times), spread(sparse_times), spread([s - d for d, s in pairs])
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
