"""How much of one layer a model can lose: each layer pruned alone, tested and restored (Han et al. 2015, figure 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .masks import mask_of
from .patterns import Density, Layer, layers, matrix, unmatrix
from .prune import magnitude

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DENSITIES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)


@dataclass
class Sensitivity:
    """What `evaluate` said of a model with one layer pruned.

    Attributes:
        baseline: with none pruned.
        densities: of the pruned layer.
        layers: name to values, one per density.
        skipped: name to why a layer was left out.
    """

    baseline: float
    densities: tuple[float, ...]
    layers: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{'density':24s}" + "".join(f"{d:>9.3g}" for d in self.densities)]
        for name, values in self.layers.items():
            lines.append(f"{name:24s}" + "".join(f"{v:>9.4g}" for v in values))
        lines += [f"{name:24s} left out: {why}" for name, why in self.skipped.items()]
        return "\n".join([*lines, f"{'none pruned':24s}{self.baseline:>9.4g}"])

    def plot(self, axes: Axes | None = None) -> Axes:
        """A curve per layer over the density, falling from left to right. Needs matplotlib."""
        if axes is None:
            try:
                import matplotlib.pyplot as plt
            except ImportError:
                raise ImportError(
                    "Sensitivity.plot needs matplotlib: pip install matplotlib"
                ) from None
            axes = plt.figure(layout="constrained").add_subplot()
        for name, values in self.layers.items():
            axes.plot(self.densities, values, marker=".", label=name)
        axes.axhline(self.baseline, color="black", lw=0.8, ls="--", label="none pruned")
        axes.set_xlim(max(self.densities), min(self.densities))
        axes.set_xlabel("density of the layer")
        axes.legend(frameon=False)
        return axes


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    densities: Sequence[float] = DENSITIES,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    score: Callable[[Tensor, str], Tensor] = magnitude,
    progress: bool = False,
) -> Sensitivity:
    """Prune one layer at a time to each density, evaluate, restore every bit.

    Args:
        model: pruned or not; what is pruned stays so, and a density is of the whole weight.
        evaluate: called with the model; what it returns is recorded, such as the error.
        densities: each from 0 to 1.
        filter_fn: called with (layer, its name); False leaves the layer out.
        score: see :func:`prune`.
        progress: show a bar.

    Raises:
        ValueError: a density is none, or there is none.

    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0, 1.0]]))
    >>> sensitivity(model, lambda m: m(torch.ones(1, 2)).item(), [1.0, 0.5, 0.0]).layers
    {'0': [4.0, 3.0, 0.0]}
    """
    patterns = [Density(d) for d in densities]
    if not patterns:
        raise ValueError("sensitivity: densities is empty; it takes one or more")
    found = [
        (layer, layer.skipped or _foreign(layer.module))
        for layer in layers(model, "density=1", filter_fn)
    ]
    tried = [layer for layer, skipped in found if not skipped]
    result = Sensitivity(float(evaluate(model)), tuple(densities))
    result.skipped = {layer.name: skipped for layer, skipped in found if skipped}
    with _bar(progress, len(tried) * len(patterns)) as advance:
        for layer in tried:
            values = result.layers[layer.name] = []
            for pattern in patterns:
                with _pruned(layer, pattern, score):
                    values.append(float(evaluate(model)))
                advance(layer.name)
    return result


def _foreign(module: nn.Module) -> str:
    """Why a weight's stored values are not its own, or ""."""
    if not parametrize.is_parametrized(module, "weight"):
        return ""
    own = mask_of(module) is not None and len(module.parametrizations.weight) == 1
    return "" if own else "has other parametrizations than its mask"


@contextmanager
def _pruned(layer: Layer, pattern: Density, score: Callable[[Tensor, str], Tensor]):
    """Zeros in the stored parameter, so that nothing of the module changes but values, and these come back."""
    weight = layer.weight
    mask = unmatrix(pattern.mask(matrix(score(weight, layer.name))), weight.shape)
    stored = (
        layer.module.weight
        if mask_of(layer.module) is None
        else layer.module.parametrizations.weight.original
    )
    before = stored.detach().clone()
    try:
        with torch.no_grad():
            stored.masked_fill_(~mask, 0)
        yield
    finally:
        with torch.no_grad():
            stored.copy_(before)


def _bar(wanted: bool, total: int) -> Any:
    """A context that gives what is called with a layer's name after every evaluation."""
    if not wanted:
        return nullcontext(lambda name: None)
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    @contextmanager
    def shown():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as progress:
            task = progress.add_task("", total=total)
            yield lambda name: progress.update(task, advance=1, description=name)

    return shown()
