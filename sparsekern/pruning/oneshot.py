"""prune_oneshot(): prune a trained model without training it again, by what its layers are fed.

A few batches go through the model block by block, each block fed by the pruned ones before it. At any
time one block has hooks and statistics.

::

    magnitude    score = |W|
    wanda        score = |W[i, j]| * norm of input j       compared within the row i
    sparsegpt    score = W[i, j]² / U[j, j]²               U upper, UᵀU = H⁻¹, H = 2XᵀX + damping
                 a dropped element's error moves the elements after it: W[i, j:] -= W[i, j] / U[j, j] * U[j, j:]

Source: Sun et al. 2023, "A simple and effective pruning approach for large language models" (arXiv
2306.11695); Frantar and Alistarh 2023, "SparseGPT" (arXiv 2301.00774).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from .masks import hold, mask_of
from .patterns import (
    NM,
    Density,
    Layer,
    Pattern,
    Quality,
    Transposable,
    layers,
    matrix,
    parse,
    unmatrix,
)
from .prune import Pruned, PruneReport, left, pruned

METHODS = ("wanda", "sparsegpt", "magnitude")
# How much the damping grows where H has no Cholesky factor; the last is 1e4 times what was asked for.
DAMPINGS = (1.0, 10.0, 100.0, 1e3, 1e4)

Forward = Callable[[nn.Module, Any], Any]


def call(model: nn.Module, batch: Any) -> Any:
    """A mapping's items are keyword arguments, a tuple's or list's are positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


@torch.no_grad()
def prune_oneshot(
    model: nn.Module,
    batches: Iterable[Any],
    method: str = "wanda",
    pattern: str | Pattern = "2:4",
    *,
    blocks: str | Sequence[str] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    forward: Forward = call,
    store: torch.device | str | None = None,
    percdamp: float = 0.01,
    blocksize: int = 128,
) -> PruneReport:
    """Prune a trained model once, with what its layers are fed as a guide, and hold the masks, in place.

    What was pruned before stays pruned. Modes, gradients and buffers stay as they are. After an
    exception no hook is left; blocks that were done by then stay pruned.

    Args:
        model: layers outside the blocks, and those whose input features do not fit, stay dense, with the
            reason.
        batches: calibration data on the model's device; 128 sequences are what the papers take. All are
            kept for the time of the call.
        method: ``"wanda"`` leaves the survivors as they are, ``"sparsegpt"`` moves them to make up for what
            is dropped, ``"magnitude"`` looks at no batch.
        pattern: ``"2:4"``, any ``"N:M"``, ``"2:4-transposable"`` or ``"density=0.5"``, which is a share of
            every output row in wanda, of every `blocksize` columns in sparsegpt, and of the layer in
            magnitude.
        blocks: names of modules; of a ModuleList or Sequential, its children. By default the lists of
            equal children, as transformers have, where they hold at least half of the weights; else the
            model is one block.
        filter_fn: called with (layer, its name); False leaves the layer dense.
        forward: called with (model, batch). By default a mapping is passed as keyword arguments, a tuple
            or list as positional ones, all else as the one argument.
        store: the device that keeps the activations between blocks; default: where they are.
        percdamp: sparsegpt's damping, as a share of the mean of the diagonal of H; tenfold, up to 1e4
            times, where there is no Cholesky factor.
        blocksize: sparsegpt's columns between two updates of all that follow.

    Convolutions: wanda takes the norm of an input channel over batch and places. sparsegpt leaves
    them dense.

    Raises:
        ValueError: the method or pattern is none, or one that the method does not take; `batches` is
            empty; `blocks` names no module; `percdamp` or `blocksize` is out of range; a layer is fed
            infinities or NaNs; its H has no Cholesky factor at any damping.

    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 12))
    >>> print(prune_oneshot(model, [torch.randn(64, 16)], "sparsegpt")[1].density)
    0.5
    """
    pattern = parse(pattern)
    if method not in METHODS:
        raise ValueError(
            f"prune_oneshot: method is {method!r}; it takes one of {', '.join(METHODS)}"
        )
    if isinstance(pattern, Quality) and method != "magnitude":
        raise ValueError(
            f"prune_oneshot: pattern is {pattern}; {method} takes N:M, 2:4-transposable and density"
        )
    if not 0 < percdamp < math.inf:
        raise ValueError(f"prune_oneshot: percdamp takes a positive number, got {percdamp}")
    if blocksize < 1 or blocksize % _group(pattern):
        raise ValueError(
            f"prune_oneshot: blocksize is {blocksize}; it takes a multiple of {_group(pattern)}"
        )
    batches = [] if method == "magnitude" else list(batches)
    if not batches and method != "magnitude":
        raise ValueError("prune_oneshot: batches is empty; it takes at least one")
    stacks = _stacks(model, blocks)

    fits = {}
    for layer in layers(model, pattern, filter_fn):
        skipped = layer.skipped
        if not skipped and method == "sparsegpt" and not isinstance(layer.module, nn.Linear):
            skipped = "sparsegpt takes linear layers"
        if not skipped and method == "sparsegpt" and _other_parametrization(layer.module):
            skipped = "has another parametrization, so that its weight cannot be moved"
        fits[layer.module] = Layer(layer.name, layer.module, skipped)
    report: dict[str, Pruned] = {}

    def prune_block(block: nn.Module, run: Callable[[int], Any]) -> None:
        mine = [fits[module] for module in block.modules() if module in fits]
        mine = [layer for layer in mine if not layer.skipped and layer.name not in report]
        sums: dict[str, Tensor] = {}
        with _summing(mine, sums, _squares if method == "wanda" else _hessian):
            for i in range(len(batches)):
                run(i)
        for layer in mine:
            dense, inputs = layer.weight.clone(), sums.pop(layer.name, None)
            if inputs is None and method != "magnitude":
                report[layer.name] = left(layer, "no batch calls it")
                continue
            if inputs is not None and not inputs.isfinite().all():
                raise ValueError(
                    f"prune_oneshot: the inputs of {layer.name} have infinities or NaNs"
                )
            if method == "sparsegpt":
                weight, mask = _sparsegpt(layer, inputs, pattern, percdamp, blocksize)
            elif method == "wanda":
                mask = _by_score(layer, _times_norms(layer.module, inputs), pattern, by_row=True)
            else:
                mask = _by_score(layer, dense.abs(), pattern, by_row=False)
            hold(layer.module, mask)
            if method == "sparsegpt":
                layer.module.parametrizations.weight.original.copy_(weight)
            report[layer.name] = pruned(layer.name, dense, mask, pattern)

    with _evaluating(model):
        for stack in stacks:
            _prune_stack(model, stack, batches, forward, store, prune_block)
    for layer in fits.values():
        if layer.name not in report:
            report[layer.name] = left(layer, layer.skipped or "outside the blocks")
    return PruneReport(report[layer.name] for layer in fits.values())


# ---- blocks ----


def _stacks(model: nn.Module, blocks: str | Sequence[str] | None) -> list[list[nn.Module]]:
    """Runs of blocks that feed one another, maybe."""
    if blocks is not None:
        named = dict(model.named_modules())
        names = [blocks] if isinstance(blocks, str) else list(blocks)
        if unknown := [n for n in names if n not in named]:
            raise ValueError(
                f"prune_oneshot: blocks names {', '.join(unknown)}; the model has no such module"
            )
        return [
            list(named[n]) if isinstance(named[n], (nn.ModuleList, nn.Sequential)) else [named[n]]
            for n in names
        ]
    found = list(_repeated(model))
    weights = sum(layer.weight.numel() for layer in layers(model, "density=1"))
    inside = sum(
        layer.weight.numel()
        for layer in layers(nn.ModuleList(itertools.chain.from_iterable(found)), "density=1")
    )
    return found if 2 * inside >= weights > 0 else [[model]]


def _repeated(module: nn.Module) -> Iterator[list[nn.Module]]:
    """The outermost lists of at least two modules of one class."""
    children = list(module.children())
    is_list = isinstance(module, (nn.ModuleList, nn.Sequential))
    if is_list and len(children) > 1 and len({type(c) for c in children}) == 1:
        yield children
    else:
        for child in children:
            yield from _repeated(child)


class _Reached(Exception):
    """The block whose inputs are wanted has been called."""


def _prune_stack(
    model: nn.Module,
    stack: list[nn.Module],
    batches: list,
    forward: Forward,
    store: torch.device | str | None,
    prune_block: Callable[[nn.Module, Callable[[int], Any]], None],
) -> None:
    if not batches or len(stack) == 1 or not _is_chain(model, stack, batches[0], forward):
        for block in stack:
            prune_block(block, lambda i: forward(model, batches[i]))
        return
    inputs = [_inputs(model, stack[0], batch, forward) for batch in batches]
    device = inputs[0][0][0].device
    hidden = [args[0].to(store) for args, _ in inputs]
    rest = [(args[1:], kwargs) for args, kwargs in inputs]
    del inputs

    for block, is_last in zip(stack, [False] * (len(stack) - 1) + [True], strict=True):

        def run(i: int, block: nn.Module = block) -> Tensor:
            args, kwargs = rest[i]
            return _hidden(block(hidden[i].to(device), *args, **kwargs))

        prune_block(block, run)
        for i in range(0 if is_last else len(batches)):
            hidden[i] = run(i).to(store)


def _hidden(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _inputs(
    model: nn.Module, block: nn.Module, batch: Any, forward: Forward
) -> tuple[tuple, dict[str, Any]]:
    """What a block is called with."""
    found = []

    def take(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Reached

    hook = block.register_forward_pre_hook(take, with_kwargs=True)
    try:
        forward(model, batch)
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0]


def _is_chain(model: nn.Module, stack: list[nn.Module], batch: Any, forward: Forward) -> bool:
    """Whether each block is called once with the last one's output and with what the first one got besides."""
    calls: list[tuple[nn.Module, tuple, dict, Any, bool]] = []
    versions: dict[nn.Module, int] = {}

    def before(block: nn.Module, args: tuple) -> None:
        versions[block] = args[0]._version if args and isinstance(args[0], Tensor) else 0

    def after(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        pure = bool(args) and isinstance(args[0], Tensor) and args[0]._version == versions[block]
        calls.append((block, args, kwargs, output, pure))

    with ExitStack() as hooks:
        for block in stack:
            for hook in (
                block.register_forward_pre_hook(before),
                block.register_forward_hook(after, with_kwargs=True),
            ):
                hooks.callback(hook.remove)
        forward(model, batch)
    if [c[0] for c in calls] != stack or not all(c[4] for c in calls):
        return False
    besides = [pytree.tree_flatten((args[1:], kwargs)) for _, args, kwargs, _, _ in calls]
    same = all(
        spec == besides[0][1] and all(map(_same, leaves, besides[0][0])) for leaves, spec in besides
    )
    return same and all(b[1][0] is _hidden(a[3]) for a, b in itertools.pairwise(calls))


def _same(a: Any, b: Any) -> bool:
    plain = (bool, int, float, str)
    return a is b or (type(a) is type(b) and isinstance(a, plain) and a == b)


@contextmanager
def _summing(
    of: list[Layer], sums: dict[str, Tensor], add: Callable[[Tensor | None, Tensor], Tensor]
) -> Iterator[None]:
    """Sums over what the layers are fed."""
    with ExitStack() as hooks:
        for layer in of:

            def take(module: nn.Module, args: tuple, name: str = layer.name) -> None:
                sums[name] = add(sums.get(name), _rows(module, args[0]))

            hooks.callback(layer.module.register_forward_pre_hook(take).remove)
        yield


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """``[rows, features]``, at least float32; a convolution's features are its input channels."""
    if not isinstance(module, nn.Linear):
        x = x.movedim(1 - module.weight.dim(), -1)
    x = x.detach().reshape(-1, x.shape[-1])
    return x if x.dtype is torch.float64 else x.float()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without a cache of keys and values; modes are put back."""
    modes = {module: module.training for module in model.modules()}
    config = getattr(model, "config", None)
    caches = getattr(config, "use_cache", None)
    model.eval()
    if caches:
        config.use_cache = False
    try:
        yield
    finally:
        if caches:
            config.use_cache = caches
        for module, training in modes.items():
            module.training = training
            for child in module.children():
                if child not in modes:  # the masks
                    child.train(training)


# ---- what decides ----


def _squares(total: Tensor | None, x: Tensor) -> Tensor:
    """``[K]``: the sum of squares of each input."""
    squares = x.square().sum(0)
    return squares if total is None else total.add_(squares)


def _hessian(total: Tensor | None, x: Tensor) -> Tensor:
    """``2XᵀX`` ``[K, K]``."""
    if total is None:
        total = x.new_zeros(x.shape[1], x.shape[1])
    return total.addmm_(x.T, x, alpha=2)


def _times_norms(module: nn.Module, squares: Tensor) -> Tensor:
    """wanda's score: ``|W| * norm``, of the weight's shape."""
    weight, groups = module.weight.detach(), getattr(module, "groups", 1)
    norms = squares.sqrt().view(groups, 1, -1, *[1] * (weight.dim() - 2))
    return (weight.abs().unflatten(0, (groups, -1)) * norms).flatten(0, 1)


def _by_score(layer: Layer, scores: Tensor, pattern: Pattern, by_row: bool) -> Tensor:
    """The mask for these scores, of their shape; nothing that was dropped before comes back."""
    if by_row and isinstance(pattern, Density):
        rows = scores.flatten(1)
        keep = round(pattern.density * rows.shape[1])
        if 0 < keep < rows.shape[1]:
            mask = NM(keep, rows.shape[1]).mask(rows).view_as(scores)
        else:
            mask = torch.full_like(scores, keep > 0, dtype=torch.bool)
    else:
        mask = unmatrix(pattern.mask(matrix(scores)), scores.shape)
    held = mask_of(layer.module)
    return mask if held is None else mask & held.mask


def _other_parametrization(module: nn.Module) -> bool:
    chain = module.parametrizations.weight if parametrize.is_parametrized(module, "weight") else ()
    return len(chain) > (mask_of(module) is not None)


def _group(pattern: Pattern) -> int:
    """How many columns of a weight decide together, at least."""
    return pattern.m if isinstance(pattern, NM) else 4 if isinstance(pattern, Transposable) else 1


def _sparsegpt(
    layer: Layer, H: Tensor, pattern: Pattern, percdamp: float, blocksize: int
) -> tuple[Tensor, Tensor]:
    """The weight, its survivors moved, and the mask.

    Column after column, each with what those before it left to it. Masks are chosen when the first
    column of their group is reached, of a density when the first of a block is.
    """
    W, held = layer.weight.to(H.dtype, copy=True), mask_of(layer.module)
    K = W.shape[1]
    mask = torch.ones_like(W, dtype=torch.bool) if held is None else held.mask.clone()
    # Inputs that were zero throughout say nothing: their columns go first, and what stays of them is zero.
    dead = H.diagonal() == 0
    W[:, dead] = 0
    U = _factor(H, dead, percdamp, layer.name)
    group = blocksize if isinstance(pattern, Density) else _group(pattern)
    for start in range(0, K, blocksize):
        stop = min(start + blocksize, K)
        block, part = W[:, start:stop], U[start:stop, start:stop]
        errors = torch.empty_like(block)
        for j in range(stop - start):
            if j % group == 0:
                columns = slice(j, j + group)
                may = mask[:, start:stop][:, columns]
                scores = (block[:, columns] / part.diagonal()[columns]).square()
                may &= pattern.mask(torch.where(may, scores, 0))
            column = block[:, j]
            dropped = torch.where(mask[:, start + j], 0, column)
            errors[:, j] = dropped / part[j, j]
            block[:, j + 1 :].addr_(errors[:, j], part[j, j + 1 :], alpha=-1)
            column.sub_(dropped)
        W[:, stop:].addmm_(errors, U[start:stop, stop:], alpha=-1)
    return W, mask


def _factor(H: Tensor, dead: Tensor, percdamp: float, name: str) -> Tensor:
    """Upper U with ``UᵀU = (H + damping)⁻¹``."""
    mean = H.diagonal()[~dead].mean() if not dead.all() else H.new_ones(())
    for times in DAMPINGS:
        damped = H + torch.diag_embed((~dead) * (percdamp * times * mean) + dead * mean)
        # From the last row up, so that one factor does: H = R·Rᵀ with R upper, and U = R⁻¹.
        L, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            R, identity = L.flip(0, 1), torch.eye(len(H), dtype=H.dtype, device=H.device)
            return torch.linalg.solve_triangular(R, identity, upper=True)
    raise ValueError(
        f"prune_oneshot: the Hessian of {name} has no Cholesky factor at percdamp = "
        f"{percdamp:g} nor at {DAMPINGS[-1]:g} times it"
    )
