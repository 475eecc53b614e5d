"""Masks that hold while a model trains: parametrizations, so nobody has to patch an optimiser.

::

    layer.weight  =  where(mask, original, 0)        what the layer multiplies by
    gradient of original  =  where(mask, gradient of weight, 0)

`original` is the very Parameter that was `weight`, so an optimiser made before still moves it. What
momentum or weight decay do to a dropped element changes nothing that anyone sees. The mask is a bool
buffer: it is in the ``state_dict``, is copied by deepcopy and moves with the module.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..nn import SparsifyReport, padded, sparsify_
from ..ops import is_24


class Mask(nn.Module):
    """The parametrization: a weight to the weight with what is dropped at +0.0.

    Args:
        mask: bool, of the weight's shape; True stays.
    """

    mask: Tensor

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, original: Tensor) -> Tensor:
        # Not a product: an infinity times zero is a NaN.
        return torch.where(self.mask, original, original.new_zeros(()))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What ``layer.weight = weight`` stores."""
        return weight

    def extra_repr(self) -> str:
        return f"{int(self.mask.count_nonzero())} of {self.mask.numel()} kept"


def hold(module: nn.Module, mask: Tensor, name: str = "weight") -> None:
    """Make a parameter show only what `mask` keeps, from now on. A mask held already is replaced.

    Raises:
        TypeError: `mask` is not bool.
        ValueError: `mask` has not the parameter's shape.
    """
    weight = getattr(module, name)
    if mask.dtype is not torch.bool:
        raise TypeError(f"hold: mask must be torch.bool, got {mask.dtype}")
    if mask.shape != weight.shape:
        raise ValueError(
            f"hold: mask must have the shape of {name}, {tuple(weight.shape)}, got {tuple(mask.shape)}"
        )
    mask = mask.detach().to(weight.device, copy=True).contiguous()
    held = mask_of(module, name)
    if held is not None:
        held.mask = mask
    else:
        _own_class(module)
        parametrize.register_parametrization(module, name, Mask(mask))


def _own_class(module: nn.Module) -> None:
    """A parametrized module's class, which has the property, is its deepcopies' too: give it one of its own.

    Otherwise what torch adds to the class or takes from it for one of them breaks the others.
    """
    if parametrize.is_parametrized(module):
        shared = type(module)
        names = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, names)


def mask_of(module: nn.Module, name: str = "weight") -> Mask | None:
    """The parametrization that holds a parameter's mask, if one does."""
    if not parametrize.is_parametrized(module, name):
        return None
    return next((p for p in module.parametrizations[name] if isinstance(p, Mask)), None)


@dataclass(frozen=True)
class Held:
    """A mask that a model holds: ``name`` is of the parameter, dotted, as before any mask was."""

    name: str
    module: nn.Module
    parameter: str
    mask: Tensor


def masks(model: nn.Module) -> Iterator[Held]:
    """All masks that a model holds, in the order of its modules."""
    for path, module in model.named_modules():
        for parameter in list(getattr(module, "parametrizations", ())):
            held = mask_of(module, parameter)
            if held is not None:
                name = f"{path}.{parameter}" if path else parameter
                yield Held(name, module, parameter, held.mask)


def finalize(model: nn.Module) -> nn.Module:
    """Write the masks into the weights, as zeros, and stop holding them; in place.

    Keys of the ``state_dict`` are those of before :func:`hold`.
    """
    for held in list(masks(model)):
        if len(held.module.parametrizations[held.parameter]) > 1:
            raise ValueError(
                f"finalize: {held.name} has other parametrizations than its mask; remove those first"
            )
        _own_class(held.module)
        parametrize.remove_parametrizations(held.module, held.parameter)
    return model


def sparsify(model: nn.Module, prepack: bool = False) -> tuple[nn.Module, SparsifyReport]:
    """A copy of a pruned model, its 2:4 linear layers packed into SparseLinear, and the report of that.

    Layers that are not 2:4 stay dense.
    """
    packed = finalize(copy.deepcopy(model))
    report = sparsify_(
        packed, lambda layer, _: is_24(padded(layer.weight.detach())), prune=False, prepack=prepack
    )
    return packed, report
