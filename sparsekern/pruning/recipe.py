"""A recipe: what a network goes through until it is sparse, as stages in a TOML or JSON file.

::

    seed = 0
    loss = "cross_entropy"               # or package.module:function, called with (output, target)

    [[stages]]
    do = "train"
    epochs = 12
    optimizer = {name = "SGD", lr = 0.05, momentum = 0.9}        # of torch.optim, with its options
    schedule = {name = "ExponentialLR", gamma = 0.85}            # of torch.optim.lr_scheduler; each = "step"

    [[stages]]
    do = "prune"
    pattern = "2:4"                      # or a table: fc1 = "density=0.08", fc2 = "2:4"
    filter = "^(?!head)"                 # a regular expression that the names of layers have to match

    [[stages]]
    do = "retrain"                       # as the training before; what is given here replaces a part of it
    lr_factor = 0.1                      # times its learning rate

    [[stages]]
    do = "finalize"

    [[stages]]
    do = "sparsify"

``do = "iterate"`` with ``patterns = [...]`` stands for a prune and a retrain for each of them. A new kind of stage
is a dataclass here, a reader in ``_READERS`` and what it does in ``training._DOES``.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .patterns import parse


class RecipeError(ValueError):
    """What is wrong with a recipe, and where; the message is all a user needs."""


@dataclass(frozen=True)
class Optimizer:
    """A class of torch.optim by name, and its options."""

    name: str
    options: Mapping[str, object]

    def build(self, parameters) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.name](parameters, **self.options)

    def __str__(self) -> str:
        return _call(self.name, self.options)


@dataclass(frozen=True)
class Schedule:
    """A class of torch.optim.lr_scheduler by name, its options, and whether it steps each "epoch" or "step"."""

    name: str
    options: Mapping[str, object]
    each: str = "epoch"

    def build(self, optimizer: torch.optim.Optimizer, epochs: int, steps: int):
        """The schedule of a stage of `epochs` epochs of `steps` steps; its length is the stage's unless given."""
        kind = SCHEDULES[self.name]
        length = _LENGTH.get(self.name)
        own = {} if length is None else {length: epochs * (steps if self.each == "step" else 1)}
        return kind(optimizer, **(own | dict(self.options)))

    def __str__(self) -> str:
        return f"{_call(self.name, self.options)} each {self.each}"


@dataclass(frozen=True)
class Train:
    """Train for some epochs, with an optimizer made afresh. Masks that are held stay."""

    epochs: int
    optimizer: Optimizer
    schedule: Schedule | None = None
    keep: str = "last"  # or "best": go on from the epoch that tested best
    again: bool = False  # written as retrain

    def __str__(self) -> str:
        text = f"{self.epochs} epochs of {self.optimizer}"
        text += f", {self.schedule}" if self.schedule else ""
        return text + (", keep the best" if self.keep == "best" else "")


@dataclass(frozen=True)
class Prune:
    """:func:`sparsekern.pruning.prune`: by a pattern, or layer names to patterns."""

    pattern: str | Mapping[str, str]
    filter: str = ""

    def __str__(self) -> str:
        pattern = self.pattern
        if not isinstance(pattern, str):
            pattern = ", ".join(f"{name} to {p}" for name, p in pattern.items())
        return f"to {pattern}" + (f", layers that match {self.filter}" if self.filter else "")


@dataclass(frozen=True)
class Finalize:
    """:func:`sparsekern.pruning.finalize`: masks become zeros."""

    def __str__(self) -> str:
        return "masks become zeros"


@dataclass(frozen=True)
class Sparsify:
    """:func:`sparsekern.pruning.sparsify`: 2:4 linear layers are packed."""

    def __str__(self) -> str:
        return "2:4 linear layers are packed"


Stage = Train | Prune | Finalize | Sparsify


def title(stage: Stage) -> str:
    """What a stage is called in tables."""
    if isinstance(stage, Train) and stage.again:
        return "retrain"
    return type(stage).__name__.lower()


@dataclass(frozen=True)
class Recipe:
    """Stages in order, each ready to be run."""

    stages: tuple[Stage, ...]
    loss: str = "cross_entropy"
    seed: int = 0

    def as_dict(self) -> dict:
        return {
            "seed": self.seed,
            "loss": self.loss,
            "stages": [{"do": title(stage)} | asdict(stage) for stage in self.stages],
        }

    def digest(self) -> str:
        """The same for two recipes that do the same, in whatever words."""
        return hashlib.sha256(
            json.dumps(self.as_dict(), sort_keys=True, default=str).encode()
        ).hexdigest()


def read(recipe: str | Path | Mapping) -> Recipe:
    """A recipe by the name of a built-in one, from a .toml or .json file, or of a table with that content.

    Raises:
        RecipeError: it is none; says where it goes wrong and what is allowed there.
    """
    if isinstance(recipe, Mapping):
        return _recipe(recipe)
    if str(recipe) in BUILT_IN:
        return _recipe(BUILT_IN[str(recipe)])
    path = Path(recipe)
    if path.suffix not in (".toml", ".json"):
        raise RecipeError(
            f"{recipe} is no recipe; it takes {', '.join(BUILT_IN)}, or a .toml or .json file"
        )
    try:
        text = path.read_text(encoding="utf-8")
        table = json.loads(text) if path.suffix == ".json" else _toml(path, text)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # of either parser, or bytes that are no text
        raise RecipeError(f"{path}: {error}") from None
    if not isinstance(table, Mapping):
        raise RecipeError(f"{path} holds a {type(table).__name__}; it takes a table")
    try:
        return _recipe(table)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def _toml(path: Path, text: str) -> dict:
    try:
        import tomllib
    except ImportError:
        raise RecipeError("TOML needs Python 3.11; the same tables as .json do here") from None
    return tomllib.loads(text)


# ---- built in ----

_TRAIN = {
    "do": "train",
    "epochs": 12,
    "optimizer": {"name": "Adam", "lr": 1e-3},
    "schedule": {"name": "CosineAnnealingLR", "each": "step"},
}
_END = [{"do": "finalize"}, {"do": "sparsify"}]

BUILT_IN: dict[str, dict] = {
    # Mishra et al. 2021: prune once by magnitude, repeat the training as it was.
    "2:4": {"stages": [_TRAIN, {"do": "prune", "pattern": "2:4"}, {"do": "retrain"}, *_END]},
    # Han et al. 2015: prune a part, retrain at a tenth of the learning rate, and again.
    "iterative": {
        "stages": [
            _TRAIN,
            {
                "do": "iterate",
                "patterns": ["density=0.5", "density=0.25", "density=0.12"],
                "lr_factor": 0.1,
            },
            *_END,
        ]
    },
}


# ---- reading, strictly ----

# Those that step without a closure, and take dense gradients.
OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
    and name not in ("LBFGS", "SparseAdam")
}
# Those whose options can be written down, and whose state is numbers.
SCHEDULES = {
    name: getattr(torch.optim.lr_scheduler, name)
    for name in (
        "ConstantLR",
        "CosineAnnealingLR",
        "CosineAnnealingWarmRestarts",
        "ExponentialLR",
        "LinearLR",
        "MultiStepLR",
        "OneCycleLR",
        "PolynomialLR",
        "ReduceLROnPlateau",
        "StepLR",
    )
}
_LENGTH = {"CosineAnnealingLR": "T_max", "OneCycleLR": "total_steps", "PolynomialLR": "total_iters"}


def _recipe(table: Mapping) -> Recipe:
    _check(table, "the recipe", {"stages": list}, {"seed": int, "loss": str})
    seed = table.get("seed", 0)
    if not 0 <= seed < 2**31:
        raise RecipeError(f"seed is {seed}; it takes 0 to 2147483647")
    loss = table.get("loss", "cross_entropy")
    if loss != "cross_entropy" and ":" not in loss:
        raise RecipeError(f"loss is {loss!r}; it takes cross_entropy or package.module:function")
    stages: list[Stage] = []
    for i, stage in enumerate(table["stages"], 1):
        where = f"stage {i}"
        do = stage.get("do") if isinstance(stage, Mapping) else None
        if do not in _READERS:
            found = f"do is {do!r}" if isinstance(stage, Mapping) else f"it is {stage!r}"
            raise RecipeError(f"{where}: {found}; it takes do = one of {', '.join(_READERS)}")
        last = next((type(s) for s in reversed(stages) if isinstance(s, Finalize | Sparsify)), None)
        if last is Sparsify or (last is Finalize and do != "sparsify"):
            raise RecipeError(
                f"{where}: {do} cannot come after {last.__name__.lower()}, which ends what masks hold"
            )
        stages += _READERS[do](stage, f"{where} ({do})", stages)
    if not stages:
        raise RecipeError("stages is empty")
    return Recipe(tuple(stages), loss, seed)


def _check(table: Mapping, where: str, required: Mapping, optional: Mapping) -> None:
    """Every key known, every required one there, every value of its type."""
    known = dict(required) | dict(optional)
    if unknown := [key for key in table if key not in known]:
        raise RecipeError(f"{where}: unknown key {', '.join(unknown)}; it takes {', '.join(known)}")
    if missing := [key for key in required if key not in table]:
        raise RecipeError(f"{where}: {', '.join(missing)} is missing")
    for key, value in table.items():
        kinds = known[key] if isinstance(known[key], tuple) else (known[key],)
        right = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
        if not right or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(_KINDS.get(kind, kind.__name__) for kind in kinds)
            raise RecipeError(f"{where}: {key} is {value!r}; it takes {names}")


_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    Mapping: "a table",
    list: "a list",
}
_HYPERPARAMETERS = {"epochs": int, "optimizer": Mapping, "schedule": (Mapping, bool), "keep": str}


def _train(table: Mapping, where: str, before: list[Stage]) -> list[Stage]:
    required = {"do": str, "epochs": int, "optimizer": Mapping}
    _check(table, where, required, _HYPERPARAMETERS)
    return [_hyperparameters(table, where, Train(0, Optimizer("", {})))]


def _retrain(table: Mapping, where: str, before: list[Stage]) -> list[Stage]:
    _check(table, where, {"do": str}, _HYPERPARAMETERS | {"lr_factor": float})
    model = next((s for s in reversed(before) if isinstance(s, Train) and not s.again), None)
    if model is None:
        if missing := [key for key in ("epochs", "optimizer") if key not in table]:
            raise RecipeError(
                f"{where}: {', '.join(missing)} is missing, and no train stage comes before that has it"
            )
        model = Train(0, Optimizer("", {}))
    stage = replace(_hyperparameters(table, where, model), again=True)
    if (factor := table.get("lr_factor")) is not None:
        if not factor > 0:
            raise RecipeError(f"{where}: lr_factor is {factor}; it takes a number above 0")
        options = dict(stage.optimizer.options)
        default = inspect.signature(OPTIMIZERS[stage.optimizer.name]).parameters["lr"].default
        options["lr"] = options.get("lr", default) * factor
        stage = replace(stage, optimizer=replace(stage.optimizer, options=options))
    return [stage]


def _hyperparameters(table: Mapping, where: str, stage: Train) -> Train:
    """`stage` with what the table gives replaced, tried out on a parameter that is nobody's."""
    if "epochs" in table:
        if table["epochs"] < 0:
            raise RecipeError(f"{where}: epochs is {table['epochs']}; it takes 0 or more")
        stage = replace(stage, epochs=table["epochs"])
    if (keep := table.get("keep", stage.keep)) not in ("last", "best"):
        raise RecipeError(f"{where}: keep is {keep!r}; it takes last or best")
    stage = replace(stage, keep=keep)
    if "optimizer" in table:
        name, options = _named(table["optimizer"], f"{where}: optimizer", OPTIMIZERS)
        stage = replace(stage, optimizer=Optimizer(name, options))
    if "schedule" in table and table["schedule"] is not False:
        schedule = table["schedule"]
        if schedule is True:
            raise RecipeError(f"{where}: schedule is true; it takes a table, or false for none")
        each = schedule.get("each", "epoch")
        if each not in ("epoch", "step"):
            raise RecipeError(f"{where}: schedule: each is {each!r}; it takes epoch or step")
        rest = {key: value for key, value in schedule.items() if key != "each"}
        name, options = _named(rest, f"{where}: schedule", SCHEDULES)
        if name == "ReduceLROnPlateau" and each == "step":
            raise RecipeError(
                f"{where}: schedule: ReduceLROnPlateau steps each epoch, on test loss"
            )
        stage = replace(stage, schedule=Schedule(name, options, each))
    elif "schedule" in table:
        stage = replace(stage, schedule=None)
    tried = [nn.Parameter(torch.zeros(2, 2))]
    try:
        optimizer = stage.optimizer.build(tried)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: optimizer {stage.optimizer.name}: {error}") from None
    if stage.schedule is not None:
        try:
            stage.schedule.build(optimizer, max(1, stage.epochs), 2)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise RecipeError(f"{where}: schedule {stage.schedule.name}: {error}") from None
    return stage


def _named(table: Mapping, where: str, classes: Mapping[str, type]) -> tuple[str, dict]:
    """A class by its name in any case, and options that it takes."""
    name = table.get("name")
    by_lower = {known.lower(): known for known in classes}
    if not isinstance(name, str) or name.lower() not in by_lower:
        raise RecipeError(f"{where}: name is {name!r}; it takes one of {', '.join(classes)}")
    name = by_lower[name.lower()]
    known = list(inspect.signature(classes[name]).parameters)[1:]
    options = {key: value for key, value in table.items() if key != "name"}
    if unknown := [key for key in options if key not in known]:
        raise RecipeError(
            f"{where}: {name} has no option {', '.join(unknown)}; it takes {', '.join(known)}"
        )
    return name, options


def _prune(table: Mapping, where: str, before: list[Stage]) -> list[Stage]:
    _check(table, where, {"do": str, "pattern": (str, Mapping)}, {"filter": str})
    return [_pruning(table["pattern"], table.get("filter", ""), where)]


def _pruning(pattern: object, regex: str, where: str) -> Prune:
    for one in pattern.values() if isinstance(pattern, Mapping) else [pattern]:
        if not isinstance(one, str):
            raise RecipeError(f"{where}: pattern is {one!r}; it takes a string")
        try:
            parse(one)
        except ValueError as error:
            raise RecipeError(f"{where}: {error}") from None
    try:
        re.compile(regex)
    except re.error as error:
        raise RecipeError(f"{where}: filter {regex!r} is no regular expression: {error}") from None
    return Prune(pattern if isinstance(pattern, str) else dict(pattern), regex)


def _iterate(table: Mapping, where: str, before: list[Stage]) -> list[Stage]:
    retraining = _HYPERPARAMETERS | {"lr_factor": float}
    _check(table, where, {"do": str, "patterns": list}, {"filter": str} | retraining)
    if not table["patterns"]:
        raise RecipeError(f"{where}: patterns is empty")
    rest = {key: value for key, value in table.items() if key in retraining or key == "do"}
    stages: list[Stage] = []
    for pattern in table["patterns"]:
        stages.append(_pruning(pattern, table.get("filter", ""), where))
        stages += _retrain(rest, where, before)
    return stages


def _finalize(table: Mapping, where: str, before: list[Stage]) -> list[Stage]:
    _check(table, where, {"do": str}, {})
    return [Finalize()]


def _sparsify(table: Mapping, where: str, before: list[Stage]) -> list[Stage]:
    _check(table, where, {"do": str}, {})
    return [Sparsify()]


_READERS: dict[str, Callable[[Mapping, str, list[Stage]], list[Stage]]] = {
    "train": _train,
    "prune": _prune,
    "retrain": _retrain,
    "iterate": _iterate,
    "finalize": _finalize,
    "sparsify": _sparsify,
}


def _call(name: str, options: Mapping) -> str:
    return f"{name}({', '.join(f'{k}={v:g}' if isinstance(v, float) else f'{k}={v}' for k, v in options.items())})"
