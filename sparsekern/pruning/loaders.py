"""A user's data: two loaders of (input, target), and the random generators that decide what they give."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor


class TrainingError(ValueError):
    """Data, a folder or a checkpoint that does not fit, or a loss that went away; the message is all a user needs."""


def seed(number: int) -> None:
    """Of torch, numpy and Python. In numpy the old global generator: what data sets draw from."""
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002
    random.seed(number)


def loaders(data: object) -> tuple[Iterable, Iterable]:
    """Train and test data of what a user's function returned."""
    if isinstance(data, Mapping):
        found = data.get("train"), data.get("test")
    elif isinstance(data, tuple | list) and len(data) == 2:
        found = tuple(data)
    else:
        found = getattr(data, "train", None), getattr(data, "test", None)
    for loader, name in zip(found, ("train", "test"), strict=True):
        if not isinstance(loader, Iterable):
            raise TrainingError(
                f"the data is a {type(data).__name__} whose {name} is a {type(loader).__name__}; it takes (train,"
                " test), or train and test by key or attribute, each an iterable of (input, target)"
            )
        if isinstance(loader, Iterator):
            raise TrainingError(
                f"the {name} data is an iterator, which ends after one epoch; it takes a loader"
            )
    return found


def batches(loader: Iterable, device: torch.device) -> Iterator[tuple[object, object]]:
    for batch in loader:
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
            raise TrainingError(
                f"the data gave a {type(batch).__name__}{size} as batch; it takes pairs (input, target)"
            )
        yield _to(batch[0], device), _to(batch[1], device)


def _to(value: object, device: torch.device) -> object:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _to(v, device) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_to(v, device) for v in value)
    return value


def length(loader: Iterable) -> int | None:
    try:
        return len(loader)
    except TypeError:  # of an iterable data set
        return None


def _own(*of: Iterable) -> list[torch.Generator]:
    """The generators that loaders and their samplers draw from, each once."""
    found: dict[int, torch.Generator] = {}
    for loader in of:
        batches = getattr(loader, "batch_sampler", None)
        for holder in (
            loader,
            getattr(loader, "sampler", None),
            batches,
            getattr(batches, "sampler", None),
        ):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                found.setdefault(id(generator), generator)
    return list(found.values())


def generators_state(*of: Iterable) -> dict:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, list(internal), gauss],
        "loaders": [generator.get_state() for generator in _own(*of)],
    }


def set_generators(state: dict, *of: Iterable) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    for generator, own in zip(_own(*of), state["loaders"], strict=True):
        generator.set_state(own.cpu())
