"""Sparse training from the first step: the mask follows the weight, the gradient passes it by.

::

    mask                  =  pattern of |original|, anew in every forward
    layer.weight          =  where(mask, original, 0)
    gradient of original  =  gradient of weight + where(mask, 0, decay * original)

Without `decay` that is the straight-through estimator; with it SR-STE, which draws what is dropped
towards zero so that the mask comes to rest. Like a held mask it is a parametrization: any optimiser
moves `original`, the very Parameter that was `weight`, and the ``state_dict`` holds that dense weight.

Source: Bengio et al. 2013 (arXiv 1308.3432); Zhou et al. 2021, "Learning N:M fine-grained structured
sparse neural networks from scratch" (arXiv 2102.04010), whose decay is 2e-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .masks import Mask, _own_class, mask_of
from .patterns import Pattern, layers, matrix, parse, unmatrix
from .prune import PruneReport, left, pruned


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, original: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.decay = decay
        if decay:
            ctx.save_for_backward(original, mask)
        return torch.where(mask, original, original.new_zeros(()))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.decay:
            original, mask = ctx.saved_tensors
            grad = torch.where(mask, grad, grad + ctx.decay * original)
        return grad, None, None


class StraightThrough(nn.Module):
    """The parametrization: a dense weight to the pattern's choice of it."""

    def __init__(self, pattern: Pattern, decay: float = 0.0):
        super().__init__()
        self.pattern = pattern
        self.decay = decay

    @torch.no_grad()
    def mask(self, original: Tensor) -> Tensor:
        """bool, of the weight's shape: what the pattern keeps of it now."""
        return unmatrix(self.pattern.mask(matrix(original.detach().abs())), original.shape)

    def forward(self, original: Tensor) -> Tensor:
        return _Function.apply(original, self.mask(original), self.decay)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What ``layer.weight = weight`` stores."""
        return weight

    def extra_repr(self) -> str:
        return f"{self.pattern}, decay={self.decay:g}"


def straight_through(
    model: nn.Module,
    pattern: str | Pattern = "2:4",
    decay: float = 0.0,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> PruneReport:
    """Train the linear and convolution layers of a model sparse from here on, in place; masks may change.

    :func:`freeze_masks` ends it. Layers that train so already get the new pattern and decay.

    Args:
        model: layers that the pattern does not fit, that hold a mask or have another parametrization stay as
            they are, with the reason.
        pattern: as of :func:`prune`.
        decay: 0 is the plain straight-through estimator, 2e-4 is SR-STE's. It joins the gradient at every
            use of the layer: where the loss is scaled or gradients are accumulated, scale it alike.
        filter_fn: called with (layer, its name); False leaves the layer dense.

    Returns:
        What the pattern takes at present.

    Raises:
        ValueError: the pattern is none, or `decay` is negative or not finite.

    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> report = straight_through(model, "2:4", decay=2e-4)
    >>> model[0].weight.count_nonzero(), model[0].parametrizations.weight.original.count_nonzero()
    (tensor(256), tensor(512))
    """
    pattern = parse(pattern)
    if not (decay >= 0 and math.isfinite(decay)):
        raise ValueError(f"straight_through: decay takes a finite number from 0 on, got {decay}")
    report = PruneReport()
    for layer in layers(model, pattern, filter_fn):
        skipped, module, found = layer.skipped, layer.module, _of(layer.module)
        if not skipped and found is None and parametrize.is_parametrized(module, "weight"):
            skipped = "holds a mask" if mask_of(module) else "has another parametrization"
        if skipped:
            report.append(left(layer, skipped))
            continue
        if found is not None:
            found.pattern, found.decay = pattern, decay
            weight = module.parametrizations.weight.original.detach()
        else:
            weight, found = layer.weight, StraightThrough(pattern, decay)
            _own_class(module)
            parametrize.register_parametrization(module, "weight", found)
        report.append(pruned(layer.name, weight, found.mask(weight), pattern))
    return report


def freeze_masks(model: nn.Module) -> nn.Module:
    """Hold the masks that the weights of :func:`straight_through` have now, in place.

    The layers compute what they computed. From here on the masks stay, gradients reach what is kept only, and
    :func:`finalize` and :func:`sparsify` work.
    """
    for module in model.modules():
        found = _of(module)
        if found is not None:
            chain = module.parametrizations.weight
            chain[list(chain).index(found)] = Mask(found.mask(chain.original)).train(chain.training)
    return model


def _of(module: nn.Module) -> StraightThrough | None:
    if not parametrize.is_parametrized(module, "weight"):
        return None
    chain = module.parametrizations.weight
    return next((p for p in chain if isinstance(p, StraightThrough)), None)
