"""run_recipe(): a network goes through the stages of a recipe. A run that was killed goes on where it was.

After every epoch and every pruning ``checkpoint.pt`` is replaced as a whole. It holds all that decides what comes
next: the model with its masks, optimizer and schedule, the states of the random generators, the place in the recipe.
So a run that goes on ends with the same bits as one that was never stopped, as far as the device computes the same
bits twice and the data depends on nothing but these generators.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import factory
from ..nn import SparseLinear
from . import recipe as recipes
from .loaders import TrainingError, batches, generators_state, length, loaders, seed, set_generators
from .masks import finalize, hold, masks, sparsify
from .patterns import PRUNABLE
from .prune import PruneReport, prune
from .recipe import Finalize, Prune, Recipe, Sparsify, Train, title
from .results import Epoch, Result, Score, StageResult, plain
from .verify import verify

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_FORMAT = 1
_MASK = re.compile(r"(?:(.+)\.)?parametrizations\.(\w+)\.\d+\.mask")


class Interrupted(Exception):
    """The run was stopped from the keyboard; says what was written and how to go on."""


def run_recipe(
    recipe: str | Path | Mapping | Recipe,
    model: str | Callable[[], nn.Module],
    data: str | Callable[[], object],
    out: str | Path,
    *,
    loss: Callable[[object, object], Tensor] | None = None,
    device: str | torch.device = "cpu",
    restart: bool = False,
    keep_dense: bool = True,
    console: Console | None = None,
) -> Result:
    """Take a network through a recipe; writes into `out`, and goes on with what is there.

    ``out`` then holds model.safetensors (packed, if the recipe says so), dense.safetensors (as it was
    before the first pruning), report.json, curves.png and layers.png where matplotlib is installed, and
    checkpoint.pt.

    Args:
        recipe: as :func:`sparsekern.pruning.recipe.read` takes it: "2:4", "iterative", a file, a table.
        model: a function, or package.module:function, that returns the network; called after seeding.
        data: the same for the data: (train, test), or a mapping or object with these two: loaders, that is iterables
            that begin anew each time, of pairs (input, target). An input may be a tensor, or a tuple or
            mapping of arguments. A ``torch.utils.data.DataLoader`` goes on exactly where it was, with a
            generator of its own or without; loaders with persistent workers do not.
        loss: called with (output, target); the recipe's by default.
        device: where to train.
        restart: begin again, whatever is in `out`.
        keep_dense: write dense.safetensors, against which the report says what was kept.
        console: shows progress; nothing is printed without.

    Raises:
        RecipeError, FactoryError, TrainingError: bad input, named; the loss became infinite or NaN.
        Interrupted: stopped from the keyboard; best.safetensors and last.safetensors were written.
    """
    if not isinstance(recipe, Recipe):
        recipe = recipes.read(recipe)
    run = _Run(recipe, model, data, Path(out), loss, torch.device(device), keep_dense, console)
    if restart:
        run.checkpoint.unlink(missing_ok=True)
    run.resume()
    try:
        with run.progress:
            run.go()
    except KeyboardInterrupt:
        raise Interrupted(run.stopped(restart)) from None
    return run.finish()


class _Run:
    """A run under way: all that a checkpoint holds, and what it is made of."""

    def __init__(self, recipe, model, data, out, loss, device, keep_dense, console):
        _require_safetensors()
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{out} cannot be made: {error.strerror}") from None
        self.recipe: Recipe = recipe
        self.out: Path = out
        self.checkpoint = out / "checkpoint.pt"
        self.device: torch.device = device
        self.keep_dense: bool = keep_dense
        self.console: Console | None = console
        self.names = [_name(model), _name(data), *([] if loss is None else [_name(loss)])]
        self.loss = loss or loss_function(recipe)
        seed(recipe.seed)
        self.model: nn.Module = _network(model).to(device)
        self.train, self.test = loaders(_made(data))
        self.stage = self.epoch = 0
        self.optimizer: torch.optim.Optimizer | None = None
        self.schedule = None
        self.stages: list[StageResult] = []
        self.history: list[Epoch] = []
        self.best: tuple[Score, dict[str, Tensor]] | None = None
        self.seconds = 0.0  # of the stage under way, before it was stopped
        self.pruned: PruneReport | None = None
        self.progress = _progress(console)

    # ---- the stages ----

    def go(self) -> None:
        if not self.stages:
            start = time.perf_counter()
            self.note("start", "as the function returned it", 0, self.evaluate(), start)
        while self.stage < len(self.recipe.stages):
            stage = self.recipe.stages[self.stage]
            start = time.perf_counter() - self.seconds
            task = self.progress.add_task(title(stage), total=1, note="")
            score = _DOES[type(stage)](self, stage, task)
            self.note(title(stage), str(stage), self.epoch, score, start)
            self.progress.update(task, total=1, completed=1, note=str(score))
            self.stage, self.epoch, self.seconds = self.stage + 1, 0, 0.0
            self.optimizer = self.schedule = self.pruned = None
            if isinstance(stage, Train | Prune):  # the rest is done again in no time
                self.save()

    def note(self, do: str, text: str, epochs: int, score: Score, start: float) -> None:
        layers = [vars(layer) | {"shape": list(layer.shape)} for layer in self.pruned or ()]
        seconds = time.perf_counter() - start
        self.stages.append(
            StageResult(do, text, epochs, score, density(self.model), seconds, layers)
        )

    def do_train(self, stage: Train, task) -> Score:
        if stage.epochs == 0:
            return self.evaluate()
        if self.optimizer is None:
            self.prepare(stage)
        started = time.perf_counter() - self.seconds
        steps = length(self.train)
        self.progress.update(task, total=None if steps is None else stage.epochs * steps)
        self.progress.update(task, completed=self.epoch * (steps or 0))
        while self.epoch < stage.epochs:
            lr = self.optimizer.param_groups[0]["lr"]
            where = f"epoch {self.epoch + 1}/{stage.epochs}"
            train_loss = self.train_epoch(stage, task, where)
            score = self.evaluate()
            if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
                self.schedule.step(score.loss)
            elif self.schedule is not None and stage.schedule.each == "epoch":
                self.schedule.step()
            self.epoch += 1
            self.history.append(Epoch(self.stage, self.epoch, float(lr), train_loss, score))
            if self.best is None or score < self.best[0]:
                self.best = score, {k: v.clone() for k, v in self.model.state_dict().items()}
            if self.epoch < stage.epochs:
                self.seconds = time.perf_counter() - started
                self.save()
        if stage.keep == "best":
            score, state = self.best
            self.model.load_state_dict(state)
        return score

    def prepare(self, stage: Train) -> None:
        """Optimizer and schedule of a stage."""
        try:
            self.optimizer = stage.optimizer.build(self.model.parameters())
        except ValueError as error:  # such as one that takes matrices alone
            raise TrainingError(f"stage {self.stage + 1} ({title(stage)}): {error}") from None
        if stage.schedule is not None:
            steps = length(self.train)
            if stage.schedule.each == "step" and steps is None:
                raise TrainingError(
                    "a schedule with each = step needs train data that has a length"
                )
            self.schedule = stage.schedule.build(self.optimizer, stage.epochs, steps or 1)

    def train_epoch(self, stage: Train, task, where: str) -> float:
        """The mean loss."""
        self.model.train()
        if callable(set_epoch := getattr(getattr(self.train, "sampler", None), "set_epoch", None)):
            set_epoch(len(self.history))
        total = count = 0
        for inputs, target in batches(self.train, self.device):
            self.optimizer.zero_grad(set_to_none=True)
            value = self.loss(_apply(self.model, inputs), target)
            value.backward()
            self.optimizer.step()
            if self.schedule is not None and stage.schedule.each == "step":
                self.schedule.step()
            total, count = total + value.item(), count + 1
            if not math.isfinite(total):
                raise TrainingError(
                    f"the loss is {value.item()} in stage {self.stage + 1} ({title(stage)}), {where}, batch {count};"
                    " a lower learning rate may help"
                )
            note = f"{where}, loss {total / count:.4f}"
            if self.history:
                note += f", test {self.history[-1].test.short}"
            self.progress.update(task, advance=1, note=note)
        if not count:
            raise TrainingError("the train data has no batches")
        return total / count

    def do_prune(self, stage: Prune, task) -> Score:
        if self.keep_dense and not any(done.do == "prune" for done in self.stages):
            _write_model(self.model, self.out / "dense.safetensors")
        self.pruned = prune_stage(self.model, stage, self.stage)
        self.best = None  # a denser network's score is no measure for this one
        return self.evaluate()

    def do_finalize(self, stage: Finalize, task) -> Score:
        finalize(self.model)
        return self.stages[-1].test

    def do_sparsify(self, stage: Sparsify, task) -> Score:
        self.model = sparsify(self.model)[0]
        return self.evaluate()

    @torch.no_grad()
    def evaluate(self) -> Score:
        self.model.eval()
        return evaluate(self.model, self.test, self.loss, self.device)

    # ---- stopping and going on ----

    def save(self) -> None:
        state = {
            "format": _FORMAT,
            "run": self.digest(),
            "stage": self.stage,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer and self.optimizer.state_dict(),
            "schedule": self.schedule and self.schedule.state_dict(),
            "best": self.best and {**vars(self.best[0]), "state": self.best[1]},
            "stages": [plain(stage) for stage in self.stages],
            "history": [plain(epoch) for epoch in self.history],
            "generators": generators_state(self.train, self.test),
        }
        _replace(self.checkpoint, lambda path: torch.save(state, path))

    def digest(self) -> str:
        return " ".join([self.recipe.digest(), *self.names])

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one.

        Raises:
            TrainingError: it cannot be read, is of another run, or does not fit the model.
        """
        if not self.checkpoint.exists():
            return
        again = "take another folder, or --restart to begin again"
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever the bytes lead it to
            words = str(error).partition("\n")[0] or type(error).__name__
            raise TrainingError(f"{self.checkpoint} cannot be read ({words}); {again}") from None
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise TrainingError(f"{self.checkpoint} is no checkpoint of this version; {again}")
        if state.get("run") != self.digest():
            raise TrainingError(
                f"{self.out} holds a run of another recipe, model or data ({state.get('run')}; this one is"
                f" {self.digest()}); {again}"
            )
        try:
            self.load(state)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            words = " ".join(str(error).split())
            raise TrainingError(
                f"{self.checkpoint} does not fit: {type(error).__name__}: {words}; {again}"
            ) from None
        if self.console is not None:
            done = f", epoch {self.epoch}" if self.epoch else ""
            self.console.print(
                f"going on from {self.checkpoint}: {self.stage} of {len(self.recipe.stages)} stages done{done}"
            )

    def load(self, state: dict) -> None:
        stage, epoch = state["stage"], state["epoch"]
        if not 0 <= stage <= len(self.recipe.stages):
            raise ValueError(f"stage is {stage} of {len(self.recipe.stages)}")
        under_way = self.recipe.stages[stage] if epoch else None
        if epoch and not (isinstance(under_way, Train) and 0 < epoch < under_way.epochs):
            raise ValueError(f"epoch is {epoch} in stage {stage}")
        hold_masks(self.model, state["model"])
        self.model.load_state_dict(state["model"])
        self.stage, self.epoch, self.seconds = stage, epoch, float(state["seconds"])
        if state["optimizer"] is not None:
            self.prepare(self.recipe.stages[stage])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.schedule is not None:
                self.schedule.load_state_dict(state["schedule"])
        if (best := state["best"]) is not None:
            self.best = Score(best["loss"], best["error"]), best["state"]
        self.stages = [StageResult(**s | {"test": Score(**s["test"])}) for s in state["stages"]]
        self.history = [Epoch(**e | {"test": Score(**e["test"])}) for e in state["history"]]
        set_generators(state["generators"], self.train, self.test)

    def stopped(self, restarted: bool) -> str:
        """Write the best and the last weights; what to tell."""
        wrote = [self.out / "last.safetensors"]
        _write_model(self.model, wrote[0])
        masked = not any(
            isinstance(s, Finalize | Sparsify) for s in self.recipe.stages[: self.stage + 1]
        )
        if self.best is not None and masked:
            best = copy.deepcopy(self.model)
            hold_masks(best, self.best[1])
            best.load_state_dict(self.best[1])
            wrote.append(self.out / "best.safetensors")
            _write_model(best, wrote[1])
        going_on = (
            f"the same command{' without --restart' * restarted} goes on from {self.checkpoint}"
            if self.checkpoint.exists()
            else "no epoch was done: the same command begins again"
        )
        return f"stopped; wrote {' and '.join(map(str, wrote))}; {going_on}"

    # ---- the end ----

    def finish(self) -> Result:
        from ..info import cpu_name

        dense = self.out / "dense.safetensors"
        reference = None
        if self.keep_dense and dense.exists():
            from safetensors.torch import load_file

            reference = load_file(dense)
        machine: dict[str, str | int] = {
            "device": str(self.device),
            "name": torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else cpu_name(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        result = Result(
            self.recipe, self.out, self.model.eval(), self.stages, self.history,
            verify(self.model, reference), machine,
        )  # fmt: skip
        _write_model(self.model, self.out / "model.safetensors")
        text = json.dumps(
            result.as_dict() | {"model": self.names[0], "data": self.names[1]}, indent=1
        )
        _replace(self.out / "report.json", lambda path: path.write_text(text + "\n"))
        try:
            if self.history:
                result.draw().savefig(self.out / "curves.png", dpi=140)
            result.verification.plot(self.out / "layers.png")
        except ImportError:
            if self.console is not None:
                self.console.print("no pictures: pip install 'sparsekern[prune]' brings matplotlib")
        return result


# What each kind of stage does, with the run, the stage and the task of its progress bar.
_DOES: dict[type, Callable[[_Run, object, object], Score]] = {
    Train: _Run.do_train,
    Prune: _Run.do_prune,
    Finalize: _Run.do_finalize,
    Sparsify: _Run.do_sparsify,
}


# ---- a dry run ----


def plan(
    recipe: Recipe,
    model: str | Callable[[], nn.Module] | None = None,
    data: str | Callable[[], object] | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[str]:
    """What a run would do, line by line; with `model` which layers it prunes, with `data` the loss of one batch.

    Raises:
        RecipeError, FactoryError, TrainingError: as :func:`run_recipe`.
    """
    loss, device = loss_function(recipe), torch.device(device)
    for i, stage in enumerate(recipe.stages, 1):
        yield f"{i}. {title(stage)}: {stage}"
    epochs = sum(stage.epochs for stage in recipe.stages if isinstance(stage, Train))
    yield f"{epochs} epochs in all, seed {recipe.seed}, loss {recipe.loss}"
    if model is None:
        return
    seed(recipe.seed)
    built = _network(model).to(device)
    parameters = sum(p.numel() for p in built.parameters())
    yield f"{type(built).__name__} of {parameters:,} parameters"
    if data is not None:
        train, test = loaders(_made(data))
        score = evaluate(built.eval(), _First(test), loss, device)
        yield f"{length(train)} batches to train on, {length(test)} to test; the first of these: {score}"
    for i, stage in enumerate(recipe.stages):
        if isinstance(stage, Prune):
            report = prune_stage(built, stage, i)
            yield f"{i + 1}. prune: {stage}; as the weights are now"
            yield from ("   " + str(layer) for layer in report)


class _First:
    """The first batch of a loader."""

    def __init__(self, loader: Iterable):
        self.loader = loader

    def __iter__(self):
        yield next(iter(self.loader))


# ---- parts ----


def loss_function(recipe: Recipe) -> Callable[[object, object], Tensor]:
    return F.cross_entropy if recipe.loss == "cross_entropy" else factory.load(recipe.loss)


def density(model: nn.Module) -> float:
    """The share of all linear and convolution weights that is not zero."""
    layers = [m for m in model.modules() if isinstance(m, (*PRUNABLE, SparseLinear))]
    weights = [layer.weight.detach() for layer in layers]
    kept = sum(int(weight.count_nonzero()) for weight in weights)
    return kept / max(1, sum(weight.numel() for weight in weights))


def prune_stage(model: nn.Module, stage: Prune, index: int) -> PruneReport:
    """Prune as a stage says; it is an error if that does nothing, or cannot be finalized."""
    where = f"stage {index + 1} (prune)"
    chosen = re.compile(stage.filter)
    try:
        report = prune(model, stage.pattern, lambda layer, name: bool(chosen.search(name)))
    except ValueError as error:
        raise TrainingError(f"{where}: {error}") from None
    if all(layer.skipped for layer in report):
        reasons = "; ".join(f"{layer.name}: {layer.skipped}" for layer in report) or "it has none"
        raise TrainingError(f"{where}: no layer can be pruned: {reasons}")
    for held in masks(model):
        if len(held.module.parametrizations[held.parameter]) > 1:
            raise TrainingError(
                f"{where}: {held.name} has another parametrization, which no mask can be written under"
            )
    return report


def hold_masks(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Hold masks where a ``state_dict`` has some, so that it can be loaded."""
    for key, tensor in state.items():
        if found := _MASK.fullmatch(key):
            hold(model.get_submodule(found[1] or ""), tensor, found[2])


@torch.no_grad()
def evaluate(model: nn.Module, test: Iterable, loss: Callable, device: torch.device) -> Score:
    """`model` as it is: call eval() before."""
    total = samples = wrong = answers = 0
    for inputs, target in batches(test, device):
        output = _apply(model, inputs)
        size = len(target) if isinstance(target, Tensor) else 1
        total, samples = total + loss(output, target).item() * size, samples + size
        if _classes(output, target):
            wrong, answers = (
                wrong + int((output.argmax(1) != target).sum()),
                answers + target.numel(),
            )
    if not samples:
        raise TrainingError("the test data has no batches")
    return Score(total / samples, wrong / answers if answers else None)


def _classes(output: object, target: object) -> bool:
    """Whether `output` scores classes ``[n, classes, ...]`` and `target` names them ``[n, ...]``."""
    return (
        isinstance(output, Tensor)
        and isinstance(target, Tensor)
        and output.dim() == target.dim() + 1
        and not target.is_floating_point()
        and output.shape[:1] + output.shape[2:] == target.shape
    )


def _apply(model: nn.Module, inputs: object) -> object:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _name(function: object) -> str:
    if isinstance(function, str):
        return function
    module = getattr(function, "__module__", type(function).__module__)
    return f"{module}:{getattr(function, '__qualname__', type(function).__qualname__)}"


def _made(function: str | Callable[[], object]) -> object:
    return factory.call(function) if isinstance(function, str) else function()


def _network(function: str | Callable[[], nn.Module]) -> nn.Module:
    made = _made(function)
    if not isinstance(made, nn.Module):
        raise TrainingError(
            f"{_name(function)}() returned {type(made).__name__}; it takes an nn.Module"
        )
    return made


# ---- files ----


def _require_safetensors() -> None:
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        raise TrainingError(
            "safetensors is missing: pip install 'sparsekern[prune]' brings it"
        ) from None


def _write_model(model: nn.Module, file: Path) -> None:
    """Plain keys, zeros where masks are; weights that are shared are written once."""
    from safetensors.torch import save_model

    ready = finalize(copy.deepcopy(model)).cpu()
    _replace(file, lambda path: save_model(ready, str(path)))


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file as a whole or not at all."""
    new = file.with_name(file.name + ".new")
    write(new)
    with open(new, "rb+") as written:
        os.fsync(written.fileno())
    os.replace(new, file)


def _progress(console: Console | None) -> Progress:
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (  # with the longest note no more than 80 characters
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=9),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console, disable=console is None)
