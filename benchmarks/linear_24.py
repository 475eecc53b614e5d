"""linear_24 against torch's dense product on this CPU, interleaved.

    python benchmarks/linear_24.py [--threads 1 2] [--rounds 9] > table.md

Prints a Markdown table: for each dtype, shape and number of threads the median milliseconds of both sides, and the
ratio dense / ours (above 1: ours is faster) as median and 10th to 90th percentile of the pairs. Each round works on
another weight, together larger than the last-level cache, so that both sides read theirs from memory.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track

import sparsekern as sk
from sparsekern.backends import cpu
from sparsekern.info import cpu_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [(M, 14336, 4096) for M in (1, 4)] + [(M, 4096, 4096) for M in (16, 64, 256, 1024)]
CACHE_BYTES = 96 << 20


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def measure(M: int, N: int, K: int, dtype: torch.dtype, rounds: int) -> list[tuple[float, float]]:
    """(dense, ours) in milliseconds, one pair per round after a warm-up."""
    copies = max(2, CACHE_BYTES // (N * K * dtype.itemsize) + 1)
    x = torch.randn(M, K).to(dtype)
    dense = [torch.randn(N, K).to(dtype) for _ in range(copies)]
    packed = [sk.pack_24(w, prune=True) for w in dense]
    pairs = []
    for i in range(rounds + 2):
        w, (values, meta) = dense[i % copies], packed[i % copies]
        pairs.append(
            (
                milliseconds(lambda: F.linear(x, w)),  # noqa: B023
                milliseconds(lambda: sk.linear_24(x, values, meta)),  # noqa: B023
            )
        )
    return pairs[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(
        f"{cpu_name()}, tier {cpu.isa()}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"`{' '.join(['python', *sys.argv])}`\n"
    )
    print("| dtype | M | N x K | threads | dense, ms | linear_24, ms | dense / ours [p10, p90] |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    cases = [(t, d, s) for d in DTYPES for s in SHAPES for t in options.threads]
    console = Console(stderr=True)
    with torch.inference_mode():
        for threads, name, (M, N, K) in track(cases, "measuring", console=console, transient=True):
            torch.set_num_threads(threads)
            pairs = measure(M, N, K, DTYPES[name], options.rounds)
            ratios = statistics.quantiles([d / o for d, o in pairs], n=10)
            dense, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratio = statistics.median(d / o for d, o in pairs)
            print(
                f"| {name} | {M} | {N} x {K} | {threads} | {dense:.2f} | {ours:.2f} "
                f"| {ratio:.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}] |",
                flush=True,
            )


if __name__ == "__main__":
    main()
