"""Training in stages that a kill does not cost: state is written after every epoch and goes on bit for bit.

A checkpoint has the model with its masks, the optimiser, both random generators, the stage and the
epoch, what was measured, and the weights at the end of each stage that is asked for later.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekern.pruning import CONV, FC, frozen, hold, l1_penalty, prune

KINDS = {"fc": FC, "conv": CONV, "": ()}


@dataclass(frozen=True)
class Stage:
    """Prune, then train. The rate falls linearly to 0 over the stage.

    Attributes:
        prune: layer to pattern, at its start.
        frozen: which kind of layer stands still: "fc", "conv" or "".
    """

    name: str
    epochs: int
    rate: float
    prune: Mapping[str, str] = field(default_factory=dict)
    frozen: str = ""
    l1: float = 0.0
    l2: float = 5e-4


@dataclass(frozen=True)
class Images:
    """Inputs in the net's shape, labels int64; test ones apart."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


@dataclass(frozen=True)
class Plan:
    """A whole training. Two runs of equal plans give equal bits.

    Attributes:
        start: key of the state of another plan to begin with, for the record.
    """

    name: str
    seed: int
    stages: tuple[Stage, ...]
    batch: int = 128
    momentum: float = 0.9
    start: str = ""


@dataclass
class Record:
    """One stage: wrong test images, of all, after its pruning and after its training."""

    stage: str
    density: float
    pruned: float
    error: float = float("nan")


@dataclass
class State:
    """What a checkpoint holds. `models` has the state_dict at the end of every stage."""

    plan: dict[str, Any]
    stage: int = 0
    epoch: int = 0
    model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    rng: Tensor | None = None
    order: Tensor | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    models: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Whole or not at all: a kill while it writes leaves the one before."""
        part = path.with_suffix(".part")
        torch.save(vars(self), part)
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path, plan: Plan) -> State:
        """The checkpoint, or the beginning where there is none.

        Raises:
            ValueError: it is of another plan, or is no checkpoint.
        """
        if not path.exists():
            return cls(asdict(plan))
        try:
            state = cls(**torch.load(path, weights_only=True))
        except (RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is no checkpoint of this: {error}") from None
        if state.plan != asdict(plan):
            raise ValueError(f"{path} is of other settings; name another folder, or remove it")
        return state


def restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """A state_dict with masks into a model that may have none yet."""
    ending = ".parametrizations.weight.0.mask"
    for key, mask in state.items():
        if key.endswith(ending):
            hold(model.get_submodule(key.removesuffix(ending)), mask)
    model.load_state_dict(state)


@torch.no_grad()
def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of wrong answers."""
    model.eval()
    wrong = sum(
        int((model(a).argmax(1) != b).sum())
        for a, b in zip(x.split(500), y.split(500), strict=True)
    )
    model.train()
    return wrong / len(y)


def density(model: nn.Module) -> float:
    """Share of weights, without biases, that are not zero."""
    weights = [m.weight for m in model.modules() if isinstance(m, (*FC, *CONV))]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def train(
    plan: Plan,
    build: Callable[[], nn.Module],
    images: Images,
    path: Path,
    start: Mapping[str, Tensor] | None = None,
) -> Iterator[State]:
    """Train by a plan, from its checkpoint if there is one. Gives the state after every epoch, and once at least.

    Args:
        path: of the checkpoint; written after every epoch.
        start: a state_dict to begin with instead of random weights.
    """
    state = State.load(path, plan)
    torch.manual_seed(plan.seed)
    model = build().to(memory_format=torch.channels_last)
    order = torch.Generator().manual_seed(plan.seed)
    if start is not None:
        restore(model, start)
    if state.model:
        restore(model, state.model)
        torch.set_rng_state(state.rng)
        order.set_state(state.order)
    if state.stage == len(plan.stages):
        yield state
    while state.stage < len(plan.stages):
        stage = plan.stages[state.stage]
        if state.epoch == 0:
            if stage.prune:
                prune(model, stage.prune)
            state.records.append(
                asdict(
                    Record(stage.name, density(model), error(model, images.x_test, images.y_test))
                )
            )
        with frozen(model, KINDS[stage.frozen]):
            optimizer = torch.optim.SGD(
                model.parameters(),
                lr=stage.rate,
                momentum=plan.momentum,
                weight_decay=stage.l2,
                foreach=True,
            )
            if state.epoch:
                optimizer.load_state_dict(state.optimizer)
            while state.epoch < stage.epochs:
                begun = time.monotonic()
                _epoch(model, optimizer, images, plan.batch, stage, state.epoch, order)
                state.epoch += 1
                state.seconds += time.monotonic() - begun
                if state.epoch < stage.epochs:
                    _remember(state, model, optimizer, order)
                    state.save(path)
                    yield state
        state.records[-1]["error"] = error(model, images.x_test, images.y_test)
        state.stage, state.epoch = state.stage + 1, 0
        _remember(state, model, optimizer, order)
        state.models[stage.name] = state.model
        state.save(path)
        yield state


def _remember(
    state: State, model: nn.Module, optimizer: torch.optim.Optimizer, order: torch.Generator
) -> None:
    state.model = {name: t.detach().clone() for name, t in model.state_dict().items()}
    state.optimizer = optimizer.state_dict()
    state.rng, state.order = torch.get_rng_state(), order.get_state()


def _epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    batch: int,
    stage: Stage,
    epoch: int,
    order: torch.Generator,
) -> None:
    shuffled = torch.randperm(len(images.y), generator=order).split(batch)
    for i, chosen in enumerate(shuffled):
        done = (epoch + i / len(shuffled)) / stage.epochs
        for group in optimizer.param_groups:
            group["lr"] = stage.rate * (1 - done)
        loss = F.cross_entropy(model(images.x[chosen]), images.y[chosen])
        if stage.l1:
            loss = loss + stage.l1 * l1_penalty(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
