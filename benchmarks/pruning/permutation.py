"""The table of Pool and Yu, "Channel Permutations for N:M Sparsity" (NeurIPS 2021), by our search.

    python -m benchmarks.pruning.permutation [--budgets S ...] [--seeds N] [--threads N] [--out FILE.md]

Searches the matrix of apex's permutation test, 128 filters by 64 channels, for several budgets of time,
and larger ones to show how the search scales; writes a dated Markdown file.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import output
from sparsekern.info import usable_cores
from sparsekern.pruning import kept_magnitude, search_permutation

UNPRUNED, DEFAULT = 4083.169, 2852.377  # magnitudes that apex's permutation test prints


@dataclass(frozen=True)
class Published:
    """A row of the table in apex's README, contrib/sparsity/permutation_tests at commit 6424da3b."""

    strategy: str
    efficacy: float
    gpu_s: float
    cpu_s: float | None = None


PUBLISHED = (
    Published("optimize_stripe_groups,8,0", 35.5, 0.013, 60.7),
    Published("channel_swap,0", 32.1, 0.214, 56.0),
    Published("optimize_stripe_groups,12,0", 36.6, 0.860),
    Published("channel_swap,1000", 36.0, 20.2),
)
# rows, K and how the columns differ: not at all, or by factors as trained layers have them
SCALES = ((512, 512), (1024, 1024), (4096, 4096))
SPREAD = {"normal": 0.0, "normal, columns scaled log-normally": 1.0}


def the_matrix() -> Tensor:
    """fp32 ``[128, 64]``: what ``--filters 128 --channels 64 --seed 1`` stands for there."""
    return torch.from_numpy(np.random.RandomState(1).rand(128, 64)).float()


def best_rows(weight: Tensor) -> float:
    """The magnitude that the best half of each row has: efficacy 100."""
    return weight.abs().topk(weight.shape[1] // 2).values.sum(dtype=torch.float64).item()


@dataclass(frozen=True)
class Found:
    """`seconds` is what the search took, `magnitude` what 2:4 keeps in the order it found."""

    seconds: float
    magnitude: float


def search(weight: Tensor, budget_s: float, seed: int) -> Found:
    start = time.perf_counter()
    permutation = search_permutation(weight, budget_s=budget_s, seed=seed)
    seconds = time.perf_counter() - start
    return Found(seconds, kept_magnitude(weight[:, permutation]))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def anchor(budgets: list[float], seeds: int) -> str:
    weight = the_matrix()
    unpruned, default, rows = (
        weight.sum(dtype=torch.float64).item(),
        kept_magnitude(weight),
        best_rows(weight),
    )
    if (round(unpruned, 3), round(default, 3)) != (UNPRUNED, DEFAULT):
        raise RuntimeError(
            f"not the matrix: {unpruned:.3f} and {default:.3f}, not {UNPRUNED} and {DEFAULT}"
        )

    def efficacy(magnitude: float) -> float:
        return 100 * (magnitude - default) / (rows - default)

    lines = [
        ["unpruned", f"{unpruned:.3f}", "", "", ""],
        ["best half of each row", f"{rows:.3f}", "100.0", "", ""],
        ["2:4 as it is", f"{default:.3f}", "0.0", "", ""],
    ]
    for p in PUBLISHED:
        cpu = f"{p.cpu_s} s" if p.cpu_s else ""
        lines.append([f"apex, {p.strategy}", "", f"{p.efficacy}", f"{p.gpu_s} s", cpu])
    for budget in budgets:
        found = [search(weight, budget, seed) for seed in range(seeds)]
        magnitude = statistics.median(f.magnitude for f in found)
        reached = sorted(efficacy(f.magnitude) for f in found)
        lines.append(
            [
                f"sparsekern, {budget:g} s",
                f"{magnitude:.3f}",
                f"{statistics.median(reached):.1f} ({reached[0]:.1f} to {reached[-1]:.1f})",
                "",
                f"{max(f.seconds for f in found):.2f} s",
            ]
        )
        print(*lines[-1], file=sys.stderr, flush=True)
    return table(["strategy", "magnitude", "efficacy", "time, V100", "time, CPU"], lines)


def scales(budgets: list[float]) -> str:
    lines = []
    for (N, K), (kind, spread) in itertools.product(SCALES, SPREAD.items()):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(N, K, generator=generator)
        weight *= (spread * torch.randn(K, generator=generator)).exp()
        total, default, rows = (
            weight.abs().sum(dtype=torch.float64).item(),
            kept_magnitude(weight),
            best_rows(weight),
        )
        for budget in budgets:
            found = search(weight, budget, 0)
            lines.append(
                [
                    f"{N} x {K}",
                    kind,
                    f"{default / total:.2%}",
                    f"{found.magnitude / total:.2%}",
                    f"{100 * (found.magnitude - default) / (rows - default):.1f}",
                    f"{found.seconds:.1f} s",
                ]
            )
            print(*lines[-1], file=sys.stderr, flush=True)
    return table(["matrix", "values", "kept as it is", "kept", "efficacy", "time"], lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pruning.permutation", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("--budgets", type=float, nargs="+", default=[0.1, 0.3, 1.0, 3.0, 10.0], metavar="S")
    add("--scale-budgets", type=float, nargs="*", default=[2.0, 20.0], metavar="S")
    add("--seeds", type=int, default=5, help="searches of the published matrix, for each budget")
    add("--threads", type=int, default=min(2, usable_cores()))
    add("--note", default="", help="a sentence on the machine")
    add("--out", type=Path, help="the Markdown file; default: a dated one in benchmarks/results")
    options = parser.parse_args()
    if options.out and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no such folder")
    torch.set_num_threads(options.threads)
    f = output.facts("benchmarks.pruning.permutation", options.threads)
    f["cpu"] += f", {usable_cores()} cores"
    parts = [
        f"# {f['date']}, channel permutation before 2:4 pruning",
        f"{output.origin(f)}. {options.note}".strip(),
        'Anchor: Pool and Yu, "Channel Permutations for N:M Sparsity" (NeurIPS 2021). Efficacy is '
        "100 · (magnitude − 2:4 as it is) / (best half of each row − 2:4 as it is).",
        "## The matrix of apex's permutation test",
        "128 filters, 64 channels, seed 1. apex's rows are efficacies and times of its README (commit 6424da3b). "
        f"Ours: the median of {options.seeds} seeds, the least and the most, and the longest time.",
        anchor(options.budgets, options.seeds),
    ]
    if options.scale_budgets:
        parts += [
            "## Larger matrices",
            "Values drawn with seed 0; one search for each budget. Columns that differ in scale have more to gain.",
            scales(options.scale_budgets),
        ]
    path = options.out or output.dated(f"{f['date']}-pruning-permutation")
    path.write_text("\n\n".join(parts) + "\n")
    print(f"written to {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
