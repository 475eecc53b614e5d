"""Two pictures: density and ratio by layer over the steps, and the nets side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from .predictions import FULL, PAPER, full_layers, layers_on, predict
from .report import PAPER_MEAN
from .results import Results, Trained, density, ratio, total

# Codec colours are fixed over all panels; light of a pair is NHWC.
CODECS = {
    "ZVC": ("zvc", "#2a78d6"),
    "tokens": ("tokens", "#1baf7a"),
    "fixed": ("fixed", "#eda100"),
    "zlib": ("zlib", "#4a3aa7"),
}
DENSE, SPARSE, INTEGERS = "#9aa5ad", "#2a78d6", "#eda100"
INK, GRID = "#333333", "#e6e6e6"
FLOPS = np.geomspace(1e12, 64e12, 25)


def plot(results: Results, path: Path) -> None:
    """`path` with ``-layers.png`` and ``-nets.png`` in place of its ending."""
    trained = [t for t in results.trained.values() if t.records]
    if not trained:
        return
    _draw_layers(trained, path.with_name(f"{path.stem}-layers.png"))
    _draw_nets(results, trained, path.with_name(f"{path.stem}-nets.png"))


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)
    axes.set_axisbelow(True)


# ---- by layer ----


def _draw_layers(trained: list[Trained], path: Path) -> None:
    figure, grid = plt.subplots(
        len(trained), 2, figsize=(13, 3.2 * len(trained)), squeeze=False, layout="constrained"
    )
    for (left, right), t in zip(grid, trained, strict=True):
        _density(left, t)
        image = _ratio_by_layer(right, t)
        bar = figure.colorbar(image, ax=right, pad=0.01)
        bar.ax.tick_params(labelsize=8)
        bar.set_label("ZVC ratio", fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _density(axes: Axes, t: Trained) -> None:
    """A line per map, light at the input and dark at the output; all together in black."""
    steps = [r.step + 1 for r in t.records]
    layers = [m.layer for m in t.papers(t.records[0].maps)]
    shades = plt.get_cmap("Blues")(np.linspace(0.25, 0.95, len(layers)))
    for layer, shade in zip(layers, shades, strict=True):
        found = [next(m.density for m in r.maps if m.layer == layer) for r in t.records]
        axes.plot(steps, found, color=shade, lw=1.2)
    together = [density(t.papers(r.maps)) for r in t.records]
    axes.plot(steps, together, color="black", lw=2, marker=".", label="all together")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("share not zero", fontsize=8)
    axes.set_xlabel("step, counted from 1", fontsize=8)
    axes.grid(axis="y", color=GRID, lw=0.7)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    _plain(axes, f"{t.net} on {t.data}: density of each map, light near the input")


def _ratio_by_layer(axes: Axes, t: Trained):
    layers = [m.layer for m in t.papers(t.records[-1].maps)]
    found = np.array([[m.ratio("zvc NCHW") for m in t.papers(r.maps)] for r in t.records])
    image = axes.imshow(found, aspect="auto", cmap="Blues", vmin=0, vmax=max(4.0, found.max()))
    for (row, column), value in np.ndenumerate(found):
        dark = value > 0.6 * max(4.0, found.max())
        colour = "white" if dark else INK
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=6.5, color=colour)
    axes.set_xticks(range(len(layers)), layers, rotation=60, ha="right")
    axes.set_yticks(range(len(t.records)), [str(r.step) for r in t.records])
    axes.set_ylabel("step", fontsize=8)
    _plain(axes, "ZVC ratio of each map, by what reads it")
    axes.tick_params(axis="x", labelsize=6.5)
    return image


# ---- by net ----


def _draw_nets(results: Results, trained: list[Trained], path: Path) -> None:
    figure, grid = plt.subplots(2, 2, figsize=(15, 10), layout="constrained")
    _codecs(grid[0][0], trained)
    _kept(grid[0][1], trained)
    _predicted(grid[1][0], results)
    _over_flops(grid[1][1], results)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _names(axes: Axes, names: list[str]) -> None:
    axes.set_xticks(range(len(names)), [n.replace("transformer-", "transf.\n") for n in names])


def _codecs(axes: Axes, trained: list[Trained]) -> None:
    width = 0.8 / (2 * len(CODECS))
    for i, (name, (form, colour)) in enumerate(CODECS.items()):
        for j, layout in enumerate(("NCHW", "NHWC")):
            found = [ratio(t.papers(t.records[-1].maps), f"{form} {layout}") for t in trained]
            places = np.arange(len(trained)) + (2 * i + j - len(CODECS) + 0.5) * width
            label, alpha = f"{name}, {layout}", 1.0 if j == 0 else 0.45
            axes.bar(places, found, width * 0.92, color=colour, alpha=alpha, label=label)
    axes.axhline(1, color=INK, lw=0.8)
    axes.axhline(PAPER_MEAN, color=INK, lw=0.8, ls="--", label=f"the paper's mean, {PAPER_MEAN}")
    axes.grid(axis="y", color=GRID, lw=0.7)
    handles, labels = (
        axes.get_legend_handles_labels()
    )  # lines come first, and would split the pairs
    axes.legend(
        handles[1:] + handles[:1], labels[1:] + labels[:1], fontsize=7.5, ncols=5, frameon=False
    )
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])
    _names(axes, [t.net for t in trained])
    _plain(axes, "Ratio of what convolutions and pools (dense layers) read, last step, fp32")


def _kept(axes: Axes, trained: list[Trained]) -> None:
    """Per net two bars, as it is and compressed, in shares of the bytes as they are."""
    for i, t in enumerate(trained):
        saved = t.records[-1].saved
        floats, shrunk = total(saved, "floats"), total(saved, "shrunk")
        kept = floats + total(saved, "integers")
        dense = floats - shrunk
        before = (dense, shrunk, total(saved, "integers"))
        after = (dense, total(saved, "floats_zvc") - dense, total(saved, "integers_narrow"))
        for place, parts in ((i - 0.2, before), (i + 0.2, after)):
            bottom = 0.0
            for part, colour in zip(parts, (DENSE, SPARSE, INTEGERS), strict=True):
                axes.bar(place, part / kept, 0.36, bottom=bottom, color=colour, edgecolor="white")
                bottom += part / kept
            axes.text(place, bottom + 0.01, f"{bottom:.0%}", ha="center", fontsize=7.5, color=INK)
    for colour, label in ((DENSE, "does not shrink"), (SPARSE, "shrinks by ZVC")):
        axes.bar(0, 0, color=colour, label=label)
    axes.bar(0, 0, color=INTEGERS, label="integers, then narrowed")
    axes.legend(fontsize=8, ncols=3, frameon=False)
    axes.set_ylim(0, 1.2)
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes.grid(axis="y", color=GRID, lw=0.7)
    _names(axes, [t.net for t in trained])
    _plain(axes, "All that autograd keeps: as it is, and compressed")


def _predicted(axes: Axes, results: Results) -> None:
    found = [p for p in results.predictions if p.machine == PAPER.name]
    for i, p in enumerate(found):
        bars = zip((-0.26, 0, 0.26), p.seconds, (DENSE, INTEGERS, SPARSE), strict=True)
        for place, seconds, colour in bars:
            value = seconds / p.seconds[0]
            axes.bar(i + place, value, 0.24, color=colour)
            axes.text(i + place, value + 0.02, f"{value:.2f}", ha="center", fontsize=7.5, color=INK)
    names = ("everything on the device", "moved raw (vDNN)", "moved compressed (cDMA)")
    for colour, label in zip((DENSE, INTEGERS, SPARSE), names, strict=True):
        axes.bar(0, 0, color=colour, label=label)
    axes.legend(fontsize=8, ncols=3, frameon=False)
    axes.set_ylim(top=1.15 * axes.get_ylim()[1])
    axes.grid(axis="y", color=GRID, lw=0.7)
    _names(axes, [p.net for p in found])
    _plain(axes, f"Predicted time of a step, at full size: {PAPER.name}")


def _over_flops(axes: Axes, results: Results) -> None:
    """The gain against the rate of the products, all else as in PAPER: where it comes from, and where it ends."""
    nets = [n for n in results.trained if n in FULL and results.trained[n].records]
    colours = ("#2a78d6", "#1baf7a", "#eda100", "#4a3aa7", "#e34948", "#8a8f94", "#00798c")
    for net, colour in zip(nets, colours, strict=False):
        full, gains = full_layers(net), []
        for flops in FLOPS:
            machine = replace(PAPER, flops=flops)
            layers = layers_on(full, results.trained[net], machine)
            gains.append(predict(net, layers, machine).speedup)
        axes.plot(FLOPS / 1e12, gains, color=colour, lw=2, label=net)
    axes.axvline(PAPER.flops / 1e12, color=INK, lw=0.8, ls="--")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("TFLOP/s that products reach", fontsize=8)
    axes.grid(color=GRID, lw=0.7)
    if nets:
        axes.legend(fontsize=8, frameon=False)
    _plain(axes, "Predicted speed-up of compressed over raw; dashed: the input on the left")
