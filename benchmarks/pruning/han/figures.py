"""Figures 4, 5 and 6: the mask of the first layer, error against what is pruned, and sensitivity by layer."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from sparsekern.pruning import Sensitivity

from .nets import NETS
from .report import Results

INK, GRID = "#333333", "#e6e6e6"


# As in the paper, dashed is without retraining.
STYLES = {
    "L2, no retraining": ("#1baf7a", "--", "o"),
    "L1, no retraining": ("#4a3aa7", "--", "s"),
    "L1, retrained": ("#4a3aa7", "-", "s"),
    "L2, retrained": ("#1baf7a", "-", "o"),
    "L2, pruned and retrained in rounds": ("#e34948", "-", "D"),
}


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)
    axes.set_axisbelow(True)


def mask(kept: Tensor, path: Path) -> None:
    """Figure 4: what is left of the first layer, bool ``[300, 784]``, and how much of each pixel."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 3.6), width_ratios=[3, 1], layout="constrained"
    )
    left.imshow(kept.numpy(), cmap="Greys", interpolation="nearest", aspect="auto")
    left.set_xticks(range(0, 785, 28), [str(i) if i % 112 == 0 else "" for i in range(0, 785, 28)])
    left.set_xlabel("input pixel, a mark at each of the 28 rows of the image", fontsize=8)
    left.set_ylabel("neuron", fontsize=8)
    _plain(left, "Weights of fc1 that are kept, black")
    share = kept.float().mean(0).view(28, 28).numpy()
    image = right.imshow(share, cmap="Blues", vmin=0)
    figure.colorbar(image, ax=right, pad=0.02).ax.tick_params(labelsize=8)
    _plain(right, "Share kept of each pixel's weights")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def curves(
    found: dict[str, list[tuple[float, float]]], dense: dict[str, float], path: Path
) -> None:
    """Figure 5: label to points of share pruned away and error, from 0 to 1; dense nets' errors."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for label, points in found.items():
        colour, line, marker = STYLES[label]
        x, y = zip(*((100 * p, 100 * e) for p, e in points), strict=True)
        axes.plot(x, y, color=colour, ls=line, marker=marker, ms=4, label=label)
    for (label, value), line in zip(dense.items(), (":", "-."), strict=False):
        axes.axhline(100 * value, color=INK, lw=0.8, ls=line, label=label)
    axes.set_yscale("log")
    axes.set_ylim(1, 100)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("weights pruned away, %", fontsize=8)
    axes.set_ylabel("test error, %", fontsize=8)
    axes.grid(color=GRID, lw=0.7)
    axes.legend(fontsize=8, frameon=False)
    _plain(axes, "LeNet-300-100: error against what is pruned away")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def sensitivities(found: Results, path: Path) -> None:
    """Figure 6, a panel per net."""
    figure, grid = plt.subplots(
        1, len(found.sensitivity), figsize=(11, 4), squeeze=False, layout="constrained"
    )
    for axes, (name, by_layer) in zip(grid[0], found.sensitivity.items(), strict=True):
        named = {layer: [100 * e for e in errors] for layer, errors in by_layer.items()}
        dense = 100 * found.of(name)[0].before
        Sensitivity(dense, found.densities, named).plot(axes)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(which="minor", labelsize=7)
        axes.set_ylabel("test error, %", fontsize=8)
        axes.grid(color=GRID, lw=0.7)
        _plain(axes, f"{NETS[name].title}: one layer pruned, no retraining")
    figure.savefig(path, dpi=90)
    plt.close(figure)
