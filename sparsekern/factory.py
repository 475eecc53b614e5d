"""``package.module:function``: how commands take what is Python from their users."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn


class FactoryError(ValueError):
    """A name that leads nowhere, or what it leads to failed; the message is all a user needs."""


def load(name: str) -> Callable:
    """What ``package.module:function`` names. The current folder is searched first, as by ``python -m``.

    Raises:
        FactoryError: no such module or function, or importing it failed.
    """
    module, colon, function = name.partition(":")
    if not (colon and module and function):
        raise FactoryError(f"{name!r} is no factory; it takes package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise FactoryError(f"cannot import {name}: {error}") from None
    except Exception as error:
        raise FactoryError(f"cannot import {name}: {_described(error)}") from error
    if not callable(found):
        raise FactoryError(f"{name} is a {type(found).__name__}; it takes a function")
    return found


def call(name: str) -> object:
    """What the function ``package.module:function`` returns.

    Raises:
        FactoryError: as :func:`load`, or the function raised.
    """
    function = load(name)
    try:
        return function()
    except Exception as error:
        raise FactoryError(f"{name}() raised {_described(error)}") from error


def model_or_state(name: str) -> nn.Module | Mapping[str, Tensor]:
    """The model of a factory, or the weights in a file of safetensors or of ``torch.save``.

    Raises:
        FactoryError: as :func:`call`, or it is no nn.Module; or a file that cannot be read or holds no ``state_dict``.
    """
    if not Path(name).is_file():
        if ":" not in name:
            raise FactoryError(f"{name}: no such file; it takes one, or package.module:function")
        made = call(name)
        if not isinstance(made, nn.Module):
            raise FactoryError(f"{name}() returned {type(made).__name__}; it takes an nn.Module")
        return made
    try:
        if name.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(name)
        state = torch.load(name, map_location="cpu", weights_only=True)
    except ModuleNotFoundError as error:
        raise FactoryError(f"{name}: {error}; pip install 'sparsekern[prune]'") from None
    except Exception as error:  # safetensors and torch.load raise kinds of their own
        words = str(error).partition("\n")[0] or type(error).__name__
        raise FactoryError(f"{name} cannot be read: {words}") from None
    if not (isinstance(state, Mapping) and any(isinstance(t, Tensor) for t in state.values())):
        raise FactoryError(f"{name} holds a {type(state).__name__}; it takes a state_dict")
    return state


def _described(error: Exception) -> str:
    """Kind, message and place, which lies in the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})"
    return f"{type(error).__name__}: {error}{where}"
