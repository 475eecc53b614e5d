"""Reorder a model's channels so that N:M pruning keeps more of its weights, without changing what it computes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .channels import Axis, Channels, State, leaves
from .masks import masks
from .patterns import NM, Layer, Pattern, layers, matrix
from .permutation import n_of_m, search_permutation, top_sum

# Of the largest magnitude of an output: what another order of its sums may change.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


# A step of a search takes as long as this many rows do, however few there are.
_STEP_ROWS = 1024


@dataclass(frozen=True)
class Permuted:
    """What :func:`permute` did to one layer.

    Attributes:
        before: share of the sum of magnitudes that the pattern keeps of the weight as it was; 1 where the
            pattern does not fit.
        after: and as it is now.
        skipped: why the layer's input channels stay in their order, "" if they do not.
    """

    name: str
    shape: tuple[int, ...]
    before: float
    after: float
    skipped: str = ""

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        kept = f"{self.before:.2%} kept"
        if self.after != self.before:
            kept = f"{self.before:.2%} kept before, {self.after:.2%} now"
        return f"{self.name:24s} {shape:16s} {kept}" + (f"; {self.skipped}" if self.skipped else "")


class PermuteReport(list[Permuted]):
    """One :class:`Permuted` per linear and convolution layer; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def permute(
    model: nn.Module,
    example_inputs: Tensor | tuple | dict,
    pattern: str | Pattern = "2:4",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    budget_s: float = 60.0,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> PermuteReport:
    """Reorder the input channels of a model's layers where that lets N:M pruning keep more, in place.

    A layer's input channels are other layers' output channels: their filters, biases and normalisations
    move along, and all layers that read the same channels share one order. Which those are is read from
    the graph that ``torch.export`` makes; the model's inputs and outputs keep their order, and so does
    whatever passes an op that needs it. The model then runs on the examples in evaluation mode; where
    outputs are not what they were, up to rounding, everything is put back.

    Call it on a trained model, before :func:`prune`, and make the optimiser afterwards: its moments are
    not reordered. What runs in training mode alone (an auxiliary head) is not seen: leave such models
    as they are.

    Args:
        model: any device and dtype; keys of its ``state_dict`` stay as they are.
        example_inputs: what the model is called with: a tensor, a tuple of arguments, or a dict of
            keyword arguments. A batch of 2 is enough.
        pattern: ``"2:4"`` or any ``"N:M"``.
        filter_fn: called with (layer, its name); a layer with False is not to be pruned and has no say in
            the order.
        budget_s: seconds for all searches together, shared out by the size of the layers.
        steps: exchanges of two columns after which each search ends, so that the result does not depend
            on the machine's speed.

    Raises:
        ValueError: the pattern is no N:M, the model holds masks already, a weight to be ordered has NaNs
            or infinities, or a budget is negative.
        RuntimeError: torch.export cannot follow the model, or outputs were not what they were.

    Source: Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> report = permute(model, torch.randn(2, 8), steps=20)
    >>> report[1].after > report[1].before, report[0].skipped
    (True, "its input channels stay: they are the model's input")
    """
    n, m = n_of_m("permute", pattern)
    if not budget_s >= 0:
        raise ValueError(f"permute: budget_s is {budget_s}; it takes seconds from 0 on")
    held = next(masks(model), None)
    if held is not None:
        raise ValueError(
            f"permute: {held.name} holds a mask already; permute the dense model first, then prune"
        )
    if isinstance(example_inputs, dict):
        args, kwargs = (), example_inputs
    else:
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        kwargs = {}
    training = {module: module.training for module in model.modules()}
    model.eval()
    moves = _Moves()
    try:
        channels = Channels(model, args, kwargs)
        work = _Work(model, NM(n, m), filter_fn, channels)
        with torch.no_grad():
            before = _outputs(model, args, kwargs)
            shares = work.kept()
            work.order(moves, budget_s, steps, seed, progress)
            if moves.done:
                _compare(before, _outputs(model, args, kwargs))
            return work.report(shares)
    except BaseException:
        moves.undo()
        raise
    finally:
        for module, was in training.items():
            module.training = was


def _outputs(model: nn.Module, args: tuple, kwargs: dict) -> list[Tensor]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        outputs = model(*args, **kwargs)
    return [leaf.clone() for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _compare(before: list[Tensor], after: list[Tensor]) -> None:
    for number, (a, b) in enumerate(zip(before, after, strict=True)):
        if not a.is_floating_point():
            same, off = torch.equal(a, b), "it is not equal"
        else:
            finite = a[a.isfinite()].abs()
            scale = finite.max().item() if finite.numel() else 0.0
            limit = TOLERANCE.get(a.dtype, 1e-1) * scale
            same = torch.allclose(a, b, rtol=0, atol=limit, equal_nan=True)
            difference = (a.double() - b.double()).abs()
            off = f"it differs by up to {difference.nan_to_num().max():.3g}, more than {limit:.3g}"
        if not same:
            raise RuntimeError(
                f"permute: output {number} of {len(before)} is not what it was: {off}; the model is as it was"
            )
    if not before:
        raise RuntimeError("permute: the model returns no tensors to compare; it is as it was")


class _Moves:
    """Reorderings that were made, to be undone."""

    def __init__(self) -> None:
        self.done: list[tuple[Tensor, int, list[int], int, Tensor]] = []

    @torch.no_grad()
    def make(self, axis: Axis, states: list[State], permutation: Tensor) -> None:
        """Wherever the axis occurs."""
        for state in states:
            for d, dim in enumerate(state.layout):
                factors = leaves(dim)
                for place, factor in enumerate(factors):
                    if factor is axis:
                        sizes = [f.size for f in factors]
                        self._move(state.tensor, d, sizes, place, permutation)

    def _move(self, tensor: Tensor, d: int, sizes: list[int], place: int, order: Tensor) -> None:
        order = order.to(tensor.device)
        for t in (tensor, tensor.grad):
            if t is not None:
                parts = t.unflatten(d, sizes).index_select(d + place, order)
                t.copy_(parts.flatten(d, d + len(sizes) - 1))
        self.done.append((tensor, d, sizes, place, order))

    @torch.no_grad()
    def undo(self, to: int = 0) -> None:
        while len(self.done) > to:
            tensor, d, sizes, place, order = self.done.pop()
            self._move(tensor, d, sizes, place, order.argsort())
            self.done.pop()


class _Work:
    """Layers, the axes of their inputs, and the searches."""

    def __init__(
        self,
        model: nn.Module,
        pattern: NM,
        filter_fn: Callable[[nn.Module, str], bool] | None,
        channels: Channels,
    ) -> None:
        self.pattern = pattern
        self.states = list(channels.states.values())
        self.layers = layers(model, pattern, filter_fn)
        self.why = ["" for _ in self.layers]
        self.readers: dict[Axis, list[int]] = {}  # axis to the layers whose input is that
        for number, layer in enumerate(self.layers):
            state = channels.states.get(id(layer.module.weight))
            axis = self._input(layer, state)
            if isinstance(axis, Axis):
                self.readers.setdefault(axis, []).append(number)
            else:
                self.why[number] = axis

    def _input(self, layer: Layer, state: State | None) -> Axis | str:
        """The axis whose order decides what the pattern keeps, or why there is none."""
        if layer.skipped:
            return layer.skipped
        if state is None:
            return "the examples do not reach its weight, or not as a parameter"
        axes = leaves(state.layout[1])
        if not axes:
            return "it has one input channel"
        axis, m = axes[-1], self.pattern.m
        if axis.size % m == 0 and not axis.frozen:
            return axis
        free = [place for place, outer in enumerate(axes) if not outer.frozen]
        if axis.frozen and free:
            block = math.prod(inner.size for inner in axes[free[-1] + 1 :])
            return f"its input is flattened: channels are blocks of {block} columns"
        if axis.frozen:
            return f"its input channels stay: {axis.frozen}"
        return f"its input channels are runs of {axis.size}, no multiple of {m}"

    def _rows(self, number: int) -> Tensor:
        return matrix(self.layers[number].weight)

    def _kept(self, number: int) -> float:
        return top_sum(self._rows(number).abs().T, self.pattern.n, self.pattern.m)

    def kept(self) -> list[float]:
        """The share of each layer's magnitude that the pattern keeps."""
        shares = []
        for number in range(len(self.layers)):
            rows = self._rows(number).abs()
            fits = rows.shape[1] % self.pattern.m == 0 and rows.is_floating_point()
            total = rows.sum(dtype=torch.float64).item() if fits else 0.0
            shares.append(self._kept(number) / total if total else 1.0)
        return shares

    def order(
        self, moves: _Moves, budget_s: float, steps: int | None, seed: int, progress: bool
    ) -> None:
        """Search the order of every axis that layers read, and make it."""
        deadline = time.monotonic() + budget_s
        shares = {
            axis: sum(self.layers[r].weight.numel() for r in readers) + _STEP_ROWS * axis.size
            for axis, readers in self.readers.items()
        }
        left = sum(shares.values())
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        bar = Progress(
            TextColumn("permute {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not progress,
        )
        with bar:
            task = bar.add_task("", total=len(self.readers))
            for axis, readers in self.readers.items():
                bar.update(task, description=self.layers[readers[0]].name)
                seconds = max(0.0, deadline - time.monotonic()) * shares[axis] / left
                permutation = search_permutation(
                    self._together(axis, readers),
                    self.pattern,
                    budget_s=seconds,
                    steps=steps,
                    seed=seed,
                )
                left -= shares[axis]
                if torch.equal(permutation.cpu(), torch.arange(axis.size)):
                    why = f"no better order was found in {seconds:.1f} s"
                else:
                    why = self._make(axis, moves, permutation)
                for number in readers:
                    self.why[number] = why
                bar.advance(task)

    def _together(self, axis: Axis, readers: list[int]) -> Tensor:
        """The rows of all layers that read the axis."""
        device = self.layers[readers[0]].weight.device
        for number in readers:
            if not self.layers[number].weight.isfinite().all():
                raise ValueError(
                    f"permute: {self.layers[number].name}.weight has NaNs or infinities; it takes finite ones"
                )
        return torch.cat([self._rows(r).reshape(-1, axis.size).to(device) for r in readers])

    def _make(self, axis: Axis, moves: _Moves, permutation: Tensor) -> str:
        """Reorder, unless that is worse for layers that read the axis flattened; the reason if not."""
        inputs = {
            id(state.tensor): leaves(state.layout[1])
            for state in self.states
            if state.tensor.dim() > 1
        }
        moved = [
            number
            for number, layer in enumerate(self.layers)
            if axis in inputs.get(id(layer.module.weight), ()) and not layer.skipped
        ]
        made, before = len(moves.done), sum(map(self._kept, moved))
        moves.make(axis, self.states, permutation)
        if sum(map(self._kept, moved)) < before * (1 - 1e-12):
            moves.undo(made)
            return "a layer that reads the same channels flattened would keep less"
        return ""

    def report(self, before: list[float]) -> PermuteReport:
        after = self.kept()
        return PermuteReport(
            Permuted(layer.name, tuple(layer.weight.shape), b, a, why)
            for layer, b, a, why in zip(self.layers, before, after, self.why, strict=True)
        )
