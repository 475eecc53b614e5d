"""The order of input columns in which N:M pruning keeps the most magnitude (Pool and Yu 2021).

Only which columns share a group of M counts. The search exchanges two columns of different groups, and
knows exactly what every exchange gains. With, row by row, the largest magnitudes of the columns beside
column i in its group, ``first .. (n-1)-th`` summed as `rest` and ``n-th`` on its own::

    kept of i's group with column j in i's place  =  Σ_rows rest_i + max(nth_i, |w_j|)
    gain[i, j]  =  that  -  kept of i's group as it is
    exchanging i and j gains  gain[i, j] + gain[j, i]

An exchange changes two groups, that is 2M rows of `gain`: 2M · K · rows operations. The best exchange of
all is made, again and again; where none gains, the one that loses least, and for some steps the two
columns may not go back: a tabu search (Glover 1989) with tenures drawn at random (Taillard 1991).
Wide matrices are searched in windows of whole groups, taken anew at random in each pass.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .patterns import NM, Pattern, matrix, parse

if TYPE_CHECKING:
    from rich.progress import Progress

# Columns searched at a time. Measured on 2 x86 cores: wider windows find more in each step and take
# longer for it; from 1024 columns on 64, 128 and 256 come to the same in the same time.
WINDOW = 128
TENURE = (2, 8)  # steps; longer ones find less on matrices of 64 columns
# Steps without a better order after which a window is left, per column: the last pass's.
PATIENCE = 32
_BLOCK = 1 << 18  # elements of a temporary: the cache of a core


def kept_magnitude(weight: Tensor, pattern: str | Pattern = "2:4") -> float:
    """The sum of the magnitudes that an N:M pattern keeps of a weight.

    Args:
        weight: ``[rows, K]``, or a convolution's ``[out, in, *kernel]``, whose K are its input channels.
    """
    n, m = n_of_m("kept_magnitude", pattern)
    return top_sum(_rows("kept_magnitude", weight, m).abs().T, n, m)


def top_sum(columns: Tensor, n: int, m: int) -> float:
    """Of ``[K, rows]``, nothing negative: the n largest of every m columns, summed in fp64."""
    groups = columns.unflatten(0, (-1, m)).unbind(1)
    return sum(x.sum(dtype=torch.float64).item() for x in _largest(groups, n))


def _largest(tensors: Sequence[Tensor], count: int) -> list[Tensor]:
    """Of tensors of one shape, element by element: the largest, the next, ..."""
    left = list(tensors)
    for i in range(count):
        for j in range(i + 1, len(left)):
            left[i], left[j] = torch.maximum(left[i], left[j]), torch.minimum(left[i], left[j])
    return left[:count]


def n_of_m(caller: str, pattern: str | Pattern) -> tuple[int, int]:
    pattern = parse(pattern)
    if not isinstance(pattern, NM):
        raise ValueError(f"{caller}: pattern is {str(pattern)!r}; it takes N:M, as in 2:4")
    return pattern.n, pattern.m


def _rows(caller: str, weight: Tensor, m: int) -> Tensor:
    """``[rows, K]``, checked."""
    if not weight.is_floating_point():
        raise TypeError(f"{caller}: weight has dtype {weight.dtype}; it takes floating point")
    if weight.dim() < 2 or weight.shape[1] % m:
        raise ValueError(
            f"{caller}: weight has shape {tuple(weight.shape)}; it takes [N, K, ...], K a multiple of {m}"
        )
    return matrix(weight.detach())


@torch.no_grad()
def search_permutation(
    weight: Tensor,
    pattern: str | Pattern = "2:4",
    *,
    budget_s: float = 10.0,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Search the order of columns in which an N:M pattern keeps the most magnitude.

    Whenever the search ends, what it has is an order that keeps at least what the weight keeps as it is. It
    ends when its budget is spent or when nothing better came up for long. The same seed gives the same
    order if `steps` ends the search or nothing better comes up; where the clock ends it, the order
    depends on the machine's speed.

    Args:
        weight: ``[rows, K]``, or a convolution's ``[out, in, *kernel]``, whose K are its input channels;
            any floating point dtype and device. Searched in fp64 if it is, otherwise in fp32.
        pattern: N:M; K must be a multiple of M.
        budget_s: seconds after which the search ends; 0 gives the order as it is.
        steps: exchanges after which the search ends.
        progress: show a bar with what is kept so far.

    Returns:
        int64 ``[K]``, on the weight's device: ``weight[:, permutation]`` is what to prune. Columns are
        in order within a group, and groups by their first column.

    Raises:
        TypeError: the weight is not floating point.
        ValueError: K is no multiple of M, the weight has NaNs or infinities, or a budget is negative.

    Source: Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021, for the problem.

    >>> weight = torch.tensor([[9.0, 8, 7, 6, 1, 1, 1, 1]])
    >>> permutation = search_permutation(weight, steps=100)
    >>> kept_magnitude(weight), kept_magnitude(weight[:, permutation])
    (19.0, 30.0)
    """
    n, m = n_of_m("search_permutation", pattern)
    rows = _rows("search_permutation", weight, m)
    if not budget_s >= 0:
        raise ValueError(f"search_permutation: budget_s is {budget_s}; it takes seconds from 0 on")
    if steps is not None and steps < 0:
        raise ValueError(f"search_permutation: steps is {steps}; it takes numbers from 0 on")
    if not rows.isfinite().all():
        raise ValueError("search_permutation: weight has NaNs or infinities; it takes finite ones")
    start = time.monotonic()
    identity = torch.arange(rows.shape[1], device=rows.device)
    largest = rows.abs().max().item() if rows.numel() else 0.0
    if not largest or rows.shape[1] <= m:
        return identity
    # So that no sum overflows, whatever the dtype.
    scaled = (rows if rows.dtype is torch.float64 else rows.float()).abs() / largest
    columns = scaled.T.contiguous()
    before = top_sum(columns, n, m)
    with _bar(progress) as bar, _one_thread():
        order = _passes(columns, n, m, _Budget(start, budget_s, steps, bar), random.Random(seed))
    groups = order.view(-1, m).sort(dim=1).values
    permutation = groups[groups[:, 0].argsort()].flatten().to(rows.device)
    return permutation if top_sum(columns, n, m) > before else identity


def _bar(shown: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("permutation"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[gained]:.3%} of the magnitude gained"),
        console=Console(stderr=True),
        disable=not shown,
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Its tensors are small. Two threads on two busy cores took a hundred times as long for a step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Budget:
    """Seconds and exchanges left, and the bar that shows them."""

    def __init__(self, start: float, seconds: float, steps: int | None, bar: Progress) -> None:
        self.start, self.seconds = start, seconds
        self.steps_left = math.inf if steps is None else steps
        self.bar, self.task = bar, bar.add_task("", total=seconds, gained=0.0)

    def over(self) -> bool:
        return self.steps_left <= 0 or time.monotonic() - self.start >= self.seconds

    def show(self, gained: float) -> None:
        """`gained`: as a share of the magnitude."""
        self.bar.update(self.task, completed=time.monotonic() - self.start, gained=gained)


def _passes(columns: Tensor, n: int, m: int, budget: _Budget, rng: random.Random) -> Tensor:
    """All windows, again and again: the first pass only climbs, each later one has twice the patience.

    Args:
        columns: fp32 or fp64 ``[K, rows]``, magnitudes; put into the order found.

    Returns:
        int64 ``[K]``, on the CPU.
    """
    K = len(columns)
    order, groups = torch.arange(K), list(range(K // m))
    windows = math.ceil(K / WINDOW)
    last = PATIENCE * min(K, WINDOW)
    total = columns.sum(dtype=torch.float64).item()
    patience, all_gained = 0, 0.0
    while not budget.over():
        rng.shuffle(groups)
        gained = 0.0
        for w in range(windows):
            if budget.over():
                break
            chosen = torch.tensor(groups[w::windows])
            at = (chosen[:, None] * m + torch.arange(m)).flatten()
            window = _Window(columns[at.to(columns.device)], n, m)
            best, gain = window.search(patience, budget, rng)
            order[at] = order[at[best]]
            columns[at.to(columns.device)] = columns[at[best].to(columns.device)]
            gained += gain
            budget.show((all_gained + gained) / total)
        all_gained += gained
        if patience >= last and not gained:
            break
        patience = min(last, max(16, 2 * patience))
    return order


class _Window:
    """Whole groups, and what every exchange between them gains.

    Args:
        columns: fp32 or fp64 ``[k, rows]``, magnitudes; it keeps them in its order.
    """

    def __init__(self, columns: Tensor, n: int, m: int) -> None:
        self.columns, self.n, self.m = columns, n, m
        k, device = len(columns), columns.device
        group = torch.arange(k, device=device) // m
        self.same_group = group[:, None] == group
        self.gain = columns.new_empty(k, k)  # of i's group with j in i's place
        self.kept = columns.new_empty(k // m)
        for groups in torch.arange(k // m, device=device).split(2):
            self._update(groups)

    def _update(self, groups: Tensor) -> None:
        """`kept` and `gain` of two groups."""
        n, m = self.n, self.m
        at = (groups[:, None] * m + torch.arange(m, device=groups.device)).flatten()
        w = self.columns[at].view(len(groups), m, -1)
        top = torch.stack(_largest(w.unbind(1), n + 1), 1)
        last, next_ = top[:, n - 1 : n], top[:, n:]
        kept = top[:, :n].sum((1, 2))
        # Beside a column that is kept stand n-1 other kept ones, and the n-th largest is the next.
        rest = kept[:, None] - torch.maximum(w, last).sum(2)
        nth = torch.where(w >= last, next_, last)
        gain = (rest - kept[:, None]).view(-1, 1) + self._sums_of_maxima(nth.flatten(0, 1))
        self.gain[at] = gain.masked_fill_(self.same_group[at], -math.inf)
        self.kept[groups] = kept

    def _sums_of_maxima(self, nth: Tensor) -> Tensor:
        """``[a, rows]`` to ``[a, k]``: Σ max(nth_a, w_k), in blocks that stay in a core's cache."""
        sums = nth.new_zeros(len(nth), len(self.columns))
        rows = max(16, _BLOCK // sums.numel())
        for a, w in zip(nth.split(rows, dim=1), self.columns.split(rows, dim=1), strict=True):
            sums += torch.maximum(a[:, None], w).sum(2)
        return sums

    def _exchange(self, i: int, j: int) -> None:
        self.columns[[i, j]] = self.columns[[j, i]]
        self.gain[:, [i, j]] = self.gain[:, [j, i]]
        self._update(torch.tensor([i // self.m, j // self.m], device=self.kept.device))

    def search(self, patience: int, budget: _Budget, rng: random.Random) -> tuple[Tensor, float]:
        """The best order of columns that was met, and what it keeps more than the first.

        Ends after more than `patience` steps without a better one.
        """
        k, m = len(self.columns), self.m
        order = torch.arange(k)
        best_order = order.clone()
        kept = first = best = self.kept.sum(dtype=torch.float64).item()
        noise = 1e-6 * self.kept.max().item()  # of sums in fp32
        free_at = torch.zeros(k, k, dtype=torch.int64, device=self.gain.device)
        step = since = 0
        while since <= patience and k > m and not budget.over():
            gain = self.gain + self.gain.T
            i, j = divmod(gain.argmax().item(), k)
            if kept + gain[i, j].item() <= best + noise:  # what is held may go only to a new best
                gain.masked_fill_(free_at > step, -math.inf)
                i, j = divmod(gain.argmax().item(), k)
            self._exchange(i, j)  # of a column with itself, if all are held
            order[[i, j]] = order[[j, i]]
            # A column that came may not change with one of the group that it left.
            free_at[[i, j]] = free_at[[j, i]]
            free_at[:, [i, j]] = free_at[:, [j, i]]
            for came, left in ((i, j // m * m), (j, i // m * m)):
                free_at[came, left : left + m] = free_at[left : left + m, came] = (
                    step + 1 + rng.randint(*TENURE)
                )
            step, since = step + 1, since + 1
            budget.steps_left -= 1
            kept = self.kept.sum(dtype=torch.float64).item()
            if kept > best + noise:
                best, best_order, since = kept, order.clone(), 0
        return best_order, best - first
