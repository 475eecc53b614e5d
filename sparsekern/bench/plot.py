"""Two pictures of one run: a roofline with our points and the peers', and the speed-up over M."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from .results import Results, Row

OURS, DENSE, OTHERS, LINE, GRID = "#2a78d6", "#9aa5ad", "#c9a227", "#333333", "#e6e6e6"


def plot(results: Results, path: Path) -> None:
    """Writes `path`; the format is that of its ending.

    Raises:
        ValueError: the run has no products to draw.
    """
    rows = [r for r in results.rows if r.suite == "linear_24" and r.ms and not r.graph]
    if not rows:
        raise ValueError("--plot draws products, and this run has none: add linear_24")
    threads = max(r.threads for r in rows)
    rows = [r for r in rows if r.threads == threads]
    dtypes = list(dict.fromkeys(r.dtype for r in rows))
    figure, grid = plt.subplots(
        2, len(dtypes), figsize=(6 * len(dtypes), 8), squeeze=False, layout="constrained"
    )
    for (top, bottom), dtype in zip(grid.T, dtypes, strict=True):
        mine = [r for r in rows if r.dtype == dtype]
        _roofline(top, results, mine, dtype, threads)
        _speed_up(bottom, mine, dtype)
    m = results.machine
    where = m.get("device") or f"{m['cpu']}, {m['cores']} cores"
    figure.suptitle(
        f"{where}, threads: {threads}; torch {m['torch']}, sparsekern {m['sparsekern']}, {m['date']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", color=LINE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=LINE)
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)


def _roofline(axes: Axes, results: Results, rows: list[Row], dtype: str, threads: int) -> None:
    """Dense-equivalent operations per second over operations per byte that ours moves."""
    bandwidth = results.ceiling("copy", "", threads)
    dense = results.ceiling("dense", dtype, threads)
    x = np.geomspace(
        min(r.flop / r.nbytes for r in rows) / 2, max(r.flop / r.nbytes for r in rows) * 2, 100
    )
    if bandwidth and dense:
        axes.plot(
            x,
            np.minimum(x * bandwidth, dense),
            color=DENSE,
            lw=1.2,
            label="copy bandwidth, dense rate",
        )
        axes.plot(
            x,
            np.minimum(x * bandwidth, 2 * dense),
            "--",
            color=OURS,
            lw=1.0,
            label="with half of the operations",
        )
    for name in dict.fromkeys(p for r in rows for p in r.peers):
        points = [
            (r.flop / r.nbytes, r.flop / r.peers[name].ms.median / 1e6)
            for r in rows
            if _has(r, name)
        ]
        if points:
            colour, mark = (DENSE, "s") if name == "torch" else (OTHERS, "^v<>d"[hash(name) % 5])
            axes.plot(*zip(*points, strict=True), mark, color=colour, ms=4, label=name)
    for op, mark in (("linear_24", "o"), ("linear_24_prepacked", "D")):
        points = [(r.flop / r.nbytes, r.tflops * 1e3) for r in rows if r.op == op]
        if points:
            axes.plot(*zip(*points, strict=True), mark, color=OURS, ms=5, label=op)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("dense-equivalent operations per byte that ours moves", fontsize=8)
    axes.set_ylabel("GFLOP/s, dense-equivalent", fontsize=8)
    _plain(axes, f"{dtype}: roofline")
    axes.legend(fontsize=7, frameon=False)


def _has(row: Row, peer: str) -> bool:
    return peer in row.peers and row.peers[peer].ms is not None


def _speed_up(axes: Axes, rows: list[Row], dtype: str) -> None:
    """torch's time over ours, a line per weight and form, the spread as a band."""
    lines = dict.fromkeys((r.op, r.case["N"], r.case["K"]) for r in rows)
    sizes = list(dict.fromkeys(line[1:] for line in lines))
    for op, N, K in lines:
        mine = sorted(
            (
                r
                for r in rows
                if (r.op, r.case["N"], r.case["K"]) == (op, N, K) and _has(r, "torch")
            ),
            key=lambda r: r.case["M"],
        )
        if not mine:
            continue
        ratios = [r.peers["torch"].ratio for r in mine]
        M, style = [r.case["M"] for r in mine], "-" if op == "linear_24" else "--"
        colour = f"C{sizes.index((N, K)) % 10}"
        axes.plot(
            M,
            [r.median for r in ratios],
            style,
            marker=".",
            color=colour,
            lw=1.2,
            label=f"{op}, {N} x {K}",
        )
        axes.fill_between(
            M, [r.p10 for r in ratios], [r.p90 for r in ratios], color=colour, alpha=0.12, lw=0
        )
    axes.axhline(1.0, color=LINE, lw=1.0)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("M, tokens", fontsize=8)
    axes.set_ylabel("torch's dense time / ours", fontsize=8)
    _plain(axes, f"{dtype}: speed-up over M, band 10 % to 90 %")
    axes.legend(fontsize=7, frameon=False)
