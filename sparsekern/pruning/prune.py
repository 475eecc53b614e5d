"""prune(): score, take the pattern's mask, hold it. Training goes on as before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .masks import hold, mask_of
from .patterns import Layer, Pattern, layers, matrix, parse, unmatrix


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune` did to one layer.

    Attributes:
        pattern: as text, "" where the layer stays dense.
        density: share of the weight's elements that stay.
        kept: share of the sum of magnitudes that stays; of the weight as it was before this pruning.
        skipped: why the layer stays dense, "" if it was pruned.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    density: float
    kept: float
    skipped: str = ""

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        if self.skipped:
            return f"{self.name:24s} {shape:16s} dense: {self.skipped}"
        return (
            f"{self.name:24s} {shape:16s} {self.pattern}: {self.density:.1%} of the weights,"
            f" {self.kept:.1%} of their magnitude"
        )


class PruneReport(list[Pruned]):
    """One :class:`Pruned` per linear and convolution layer; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def magnitude(weight: Tensor, name: str) -> Tensor:
    """The score of Han et al. and of Mishra et al.: the absolute value."""
    return weight.abs()


@torch.no_grad()
def prune(
    model: nn.Module,
    pattern: str | Pattern | Mapping[str, str | Pattern] = "2:4",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    score: Callable[[Tensor, str], Tensor] = magnitude,
) -> PruneReport:
    """Prune the linear and convolution layers of a model and hold the masks, in place.

    Survivors keep their values. What was pruned before stays pruned: its score is zero. Training
    then goes on with any optimiser; :func:`finalize` ends it, :func:`sparsify` packs.

    Args:
        model: layers whose input features do not fit the pattern stay dense, with the reason.
        pattern: ``"2:4"``, any ``"N:M"``, ``"2:4-transposable"``, ``"density=0.1"``, ``"quality=1.2"``,
            or a mapping of layer names to these; layers it does not name stay dense.
        filter_fn: called with (layer, its name); False leaves the layer dense.
        score: called with (weight, the layer's name), gives what decides, of the weight's shape.

    Raises:
        ValueError: the pattern is none, or names a layer that the model has not.

    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> report = prune(model, "2:4")
    >>> [(layer.name, layer.density) for layer in report]
    [('0', 0.5), ('2', 0.5)]
    """
    if isinstance(pattern, Mapping):
        wanted = {name: parse(p) for name, p in pattern.items()}
        known = {layer.name for layer in layers(model, "density=1")}
        if unknown := sorted(wanted.keys() - known):
            raise ValueError(
                f"prune: pattern names {', '.join(unknown)}; the model has {', '.join(sorted(known))}"
            )
    else:
        wanted = parse(pattern)
    report = PruneReport()
    for layer in layers(model, "density=1", filter_fn):
        weight, skipped = layer.weight, layer.skipped
        own = wanted.get(layer.name) if isinstance(wanted, dict) else wanted
        if not skipped and own is None:
            skipped = "not named by the pattern"
        if not skipped:
            skipped = own.why_not(tuple(matrix(weight).shape)) or ""
        if skipped:
            report.append(left(layer, skipped))
            continue
        scores = matrix(score(weight, layer.name))
        mask = unmatrix(own.mask(scores), weight.shape)
        if (held := mask_of(layer.module)) is not None:
            mask &= held.mask
        report.append(pruned(layer.name, weight, mask, own))
        hold(layer.module, mask)
    return report


def pruned(name: str, weight: Tensor, mask: Tensor, pattern: Pattern) -> Pruned:
    """The line of the report for a weight, as it was, and the mask that it gets."""
    total = weight.abs().double().sum().item()
    kept = weight[mask].abs().double().sum().item() / total if total else 1.0
    return Pruned(name, tuple(weight.shape), str(pattern), _share(mask), kept)


def left(layer: Layer, why: str) -> Pruned:
    """The line of the report for a layer that stays as it is."""
    held = mask_of(layer.module)
    density = 1.0 if held is None else _share(held.mask)
    return Pruned(layer.name, tuple(layer.weight.shape), "", density, 1.0, why)


def _share(mask: Tensor) -> float:
    return mask.count_nonzero().item() / max(1, mask.numel())
