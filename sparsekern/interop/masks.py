"""Masks that other libraries keep in a state_dict, held by :func:`sparsekern.pruning.hold`.

=======================  ===============================================================================
torch.ao.pruning         ``sparsifier.state_dict()``: ``["state"]["fc.weight"]["mask"]``; the model's own has
                         ``fc.parametrizations.weight.original`` and no mask
sparsekern.pruning       ``fc.parametrizations.weight.original``, ``fc.parametrizations.weight.0.mask``
apex ASP                 ``fc.weight``, ``fc.__weight_mma_mask``, maybe ``fc.__weight_mma_pruned_p``
torch.nn.utils.prune     ``fc.weight_orig``, ``fc.weight_mask``
=======================  ===============================================================================

A checkpoint whose masks were squashed into its weights holds none: load it, and ``pruning.prune(model, "2:4")`` takes
the pattern that is there.

Source: torch 2.13 ``ao/pruning/sparsifier``, ``nn/utils/prune.py``; NVIDIA/apex ``apex/contrib/sparsity/asp.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from ..pruning import hold

_MASK = re.compile(
    r"(?P<layer>.*\.|)(?:parametrizations\.(?P<a>\w+)\.\d+\.mask|__(?P<b>\w+)_mma_mask|(?P<c>\w+)_mask)"
)
_ORIGINAL = re.compile(
    r"(?P<layer>.*\.|)(?:parametrizations\.(?P<a>\w+)\.original|(?P<b>\w+)_orig)"
)
_PRUNED = re.compile(r"(?:.*\.|)__\w+_mma_pruned_p")


def load_masks(model: nn.Module, state_dict: Mapping) -> list[str]:
    """Hold the masks of a state_dict on a model's parameters, as training with this library does.

    The weights stay as they are: ``model.load_state_dict(plain_state_dict(state_dict))`` before this loads them.

    Args:
        model: with the layers that the masks are of.
        state_dict: a model's, or that of a ``torch.ao.pruning`` sparsifier.

    Returns:
        The parameters that are masked now, dotted.

    Raises:
        ValueError: there is no mask, or one is of no parameter of the model, has not its shape, or has elements other
            than 0 and 1. The model is then as it was.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 1))
    >>> load_masks(model, {"0.__weight_mma_mask": torch.tensor([[True, False, True, False]])})
    ['0.weight']
    """
    found = _masks(state_dict)
    if not found:
        raise ValueError(
            "load_masks: state_dict has no mask (of torch.ao.pruning take the sparsifier's; of squashed weights "
            'pruning.prune(model, "2:4") takes the pattern that is there)'
        )
    checked = []
    for name, (key, mask) in found.items():
        layer, _, parameter = name.rpartition(".")
        try:
            module = model.get_submodule(layer)
            weight = getattr(module, parameter)
        except AttributeError:
            weight = None
        if not isinstance(weight, Tensor):
            raise ValueError(f"load_masks: {key} is a mask of {name}, which the model has not")
        if mask.shape != weight.shape:
            raise ValueError(
                f"load_masks: {key} has shape {tuple(mask.shape)}; {name} has {tuple(weight.shape)}"
            )
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"load_masks: {key} has elements other than 0 and 1")
        checked.append((module, parameter, mask.bool()))
    for module, parameter, mask in checked:
        hold(module, mask, parameter)
    return list(found)


def plain_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A pruned model's state_dict with the names of before it was pruned, and without masks."""
    plain = {}
    for key, value in state_dict.items():
        if _PRUNED.fullmatch(key) or _parameter(key, state_dict) is not None:
            continue
        original = _ORIGINAL.fullmatch(key)
        if original:
            key = original["layer"] + (original["a"] or original["b"])
        plain[key] = value
    return plain


def _masks(state_dict: Mapping) -> dict[str, tuple[str, Tensor]]:
    """The masked parameters, each with the key of its mask and the mask."""
    state = state_dict.get("state")
    if isinstance(state, Mapping):  # of a torch.ao.pruning sparsifier
        found = {name: (f"state.{name}.mask", entry.get("mask")) for name, entry in state.items()}
        return {name: entry for name, entry in found.items() if isinstance(entry[1], Tensor)}
    named = ((_parameter(key, state_dict), key, value) for key, value in state_dict.items())
    return {name: (key, value) for name, key, value in named if name is not None}


def _parameter(key: str, state_dict: Mapping) -> str | None:
    """The parameter that `key` is the mask of, or None."""
    mask = _MASK.fullmatch(key)
    if mask is None or not isinstance(state_dict[key], Tensor):
        return None
    # Any buffer may be called …_mask: it is one of torch.nn.utils.prune only beside its …_orig.
    if mask["c"] and f"{mask['layer']}{mask['c']}_orig" not in state_dict:
        return None
    return mask["layer"] + (mask["a"] or mask["b"] or mask["c"])
