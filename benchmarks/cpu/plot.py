"""The ratios over M as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .report import Results


def plot(results: Results, path: Path) -> None:
    """Ratio over M, a panel per dtype and op: the line of equal speed, and the targets as marks."""
    rows = [r for r in results.rows if r.section in ("linear", "sweep") and r.ratio and not r.note]
    rows = [r for r in rows if r.tier == results.machine["tier"]]
    panels = sorted({(r.op, r.dtype) for r in rows})
    if not panels:
        return
    dtypes = [d for d in ("fp32", "bf16", "fp16") if any(d == p[1] for p in panels)]
    op_names = sorted({op for op, _ in panels})
    size = (5 * len(dtypes), 4 * len(op_names))
    figure, grid = plt.subplots(
        len(op_names), len(dtypes), figsize=size, squeeze=False, sharex=True, layout="constrained"
    )
    sizes = sorted({(r.case["N"], r.case["K"]) for r in rows})
    for i, op in enumerate(op_names):
        for j, dtype in enumerate(dtypes):
            axes, mine = grid[i][j], [r for r in rows if (r.op, r.dtype) == (op, dtype)]
            for colour, (N, K) in enumerate(sizes):
                for threads, style in zip(
                    results.machine["threads"], ("-", "--", ":"), strict=False
                ):
                    # Rows of `linear` come first and have more rounds: they win over the sweep's.
                    points: dict[float, float] = {}
                    for r in mine:
                        if (r.case["N"], r.case["K"], r.threads) == (N, K, threads):
                            points.setdefault(r.case["M"], r.ratio.median)
                    if points:
                        M, ratio = zip(*sorted(points.items()), strict=True)
                        label = f"{N} x {K}, {threads} threads"
                        axes.plot(
                            M, ratio, style, color=f"C{colour}", marker=".", lw=1, label=label
                        )
            marked = {(r.case["M"], r.must, r.stretch) for r in mine if r.must and r.stretch}
            for M, must, stretch in marked:
                axes.plot(M, must, "v", color="black", ms=6)
                axes.plot(M, stretch, "*", color="black", ms=8)
            axes.axhline(1.0, color="black", lw=0.8)
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            axes.set_title(f"{op}, {dtype}", fontsize=10, loc="left")
            axes.grid(axis="y", color="#e6e6e6", lw=0.7)
    for axes in grid[-1]:
        axes.set_xlabel("M")
    grid[0][0].set_ylabel("dense time / ours")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, fontsize=8, loc="outside lower center", ncols=min(4, 2 * len(dtypes))
    )
    figure.suptitle(
        f"{results.machine['cpu']}, tier {results.machine['tier']}; triangles: must, stars: stretch",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
