"""What retraining takes besides the mask: one kind of layer that stands still, and the L1 penalty.

Han et al. retrain the dense layers with the convolutions fixed, then the other way round (section 3.3).
L2 is the optimiser's ``weight_decay``: on what is pruned it has no effect that anyone sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .patterns import layers

FC = (nn.Linear,)
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def frozen(
    model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...]
) -> Iterator[None]:
    """Parameters of all modules of these kinds stand still within, under any optimiser.

    Their gradients are dropped at the start, for momentum moves what has one, and their
    ``requires_grad`` is at the end what it was. Running statistics of normalisation go on as they do.

    Args:
        kinds: classes, such as :data:`CONV` or :data:`FC`.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    >>> with frozen(model, CONV):
    ...     [p.requires_grad for p in model.parameters()]
    [False, False, True, True]
    """
    still = {p for m in model.modules() if isinstance(m, kinds) for p in m.parameters()}
    before = {p: p.requires_grad for p in still}
    for parameter in still:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)


def l1_penalty(model: nn.Module) -> Tensor:
    """The sum of magnitudes of what survives in the weights of linear and convolution layers.

    ``loss = task_loss + strength * l1_penalty(model)``. A weight that layers share counts once.
    """
    weights = [layer.module.weight for layer in layers(model, "density=1") if not layer.skipped]
    if not weights:
        raise ValueError("l1_penalty: the model has no linear or convolution layer")
    return torch.stack([weight.abs().sum() for weight in weights]).sum()
