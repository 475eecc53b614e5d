"""Dropout for retraining, by what is left of the layer before it (Han et al. 2015, equation 2).

::

    D_r = D_o sqrt(C_ir / C_io)

C is the number of connections of a layer: all weights before pruning, the kept ones after. A pruned
layer is a smaller model that overfits less, and its neurons, of which dropout takes a share, go with the
root of its connections.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .chains import chains
from .masks import mask_of
from .patterns import PRUNABLE

DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)

# Modules with parameters that make no new neurons.
KEEPS_NEURONS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.PReLU)


def retrain_rate(rate: float, before: int, after: int) -> float:
    """Equation 2: the dropout rate `rate` when of `before` connections `after` are left.

    >>> retrain_rate(0.5, 1000, 90)
    0.15
    """
    if not 0 <= rate <= 1 or before < 1 or not 0 <= after <= before:
        raise ValueError(
            "retrain_rate: takes a rate of 0 to 1, 1 connection or more, and as many at most after, "
            f"got {rate}, {before}, {after}"
        )
    return rate * math.sqrt(after / before)


@dataclass(frozen=True)
class AdjustedDropout:
    """One dropout module and the layer it follows.

    Attributes:
        follows: name of the layer, "" if none was found.
        original, rate: of dropout before any adjustment, and now.
        reason: why it was left alone, "" if it was not.
    """

    name: str
    follows: str
    original: float
    rate: float
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"{self.name:24s} stays at {self.rate:g}: {self.reason}"
        return f"{self.name:24s} follows {self.follows}: {self.original:g} to {self.rate:.3g}"


class DropoutReport(list[AdjustedDropout]):
    """One :class:`AdjustedDropout` per dropout module; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


class Dropouts:
    """The dropout modules of a model, with their rates as they are before pruning.

    In an ``nn.Sequential`` a dropout follows the last linear or convolution layer before it. For any
    other, say it.

    Args:
        model: not pruned yet, or with the rates of the original.
        follows: dropout's name to its layer's name.

    Raises:
        ValueError: `follows` names what the model has not.

    >>> model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Dropout(0.5), nn.Linear(10, 2))
    >>> dropouts = Dropouts(model)
    >>> from sparsekern.pruning import prune
    >>> _ = prune(model, "density=0.04")
    >>> print(dropouts.adjust())
    2                        follows 0: 0.5 to 0.1
    >>> model[2].p
    0.1
    """

    def __init__(self, model: nn.Module, follows: Mapping[str, str] | None = None):
        self._modules = dict(model.named_modules())
        self._follows = {**_followed(model), **(follows or {})}
        self._original = {
            name: module.p for name, module in self._modules.items() if isinstance(module, DROPOUTS)
        }
        for dropout, layer in (follows or {}).items():
            if dropout not in self._original:
                raise ValueError(
                    f"Dropouts: follows names {dropout!r}; the model's dropouts are "
                    f"{', '.join(self._original) or 'none'}"
                )
            if not isinstance(self._modules.get(layer), PRUNABLE):
                raise ValueError(
                    f"Dropouts: {dropout!r} follows {layer!r}, which is no linear or convolution layer"
                )

    def adjust(self) -> DropoutReport:
        """Set every rate by what its layer's mask keeps now; call it after each pruning."""
        report = DropoutReport()
        for name, original in self._original.items():
            module, layer = self._modules[name], self._follows.get(name, "")
            reason = "" if layer else "no layer found before it; name it in `follows`"
            if layer:
                held = mask_of(self._modules[layer])
                if held is not None:
                    kept = int(held.mask.count_nonzero())
                    module.p = retrain_rate(original, held.mask.numel(), kept)
                else:
                    module.p, reason = original, f"{layer} is not pruned"
            report.append(AdjustedDropout(name, layer, original, module.p, reason))
        return report

    def restore(self) -> None:
        """Set every rate to that of before."""
        for name, original in self._original.items():
            self._modules[name].p = original


def _followed(model: nn.Module) -> dict[str, str]:
    """Dropout to layer. A link of unknown class may be a layer too, so nothing is said of what comes after it."""
    found: dict[str, str] = {}
    for chain in chains(model):
        layer = ""
        for name, module in chain:
            if isinstance(module, PRUNABLE):
                layer = name
            elif isinstance(module, DROPOUTS):
                if layer:
                    found[name] = layer
            elif any(True for _ in module.parameters()) and not isinstance(module, KEEPS_NEURONS):
                layer = ""
    return found
