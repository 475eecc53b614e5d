"""Prune and retrain in rounds (Han et al. 2015, section 3), around anyone's training loop.

::

    for round in rounds(model, {"0": "density=0.08", "2": "density=0.09"}, n=3):
        print(round)
        train(model)            # survivors go on from the values they have

Each round prunes the survivors of the last one, so a threshold in standard deviations is one of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from .patterns import Density, Pattern, parse
from .prune import PruneReport, magnitude, prune

Target: TypeAlias = "str | Pattern | Sequence[str | Pattern]"
Patterns: TypeAlias = "Pattern | dict[str, Pattern]"


@dataclass(frozen=True)
class Round:
    """One round, pruned and ready to retrain: the `index`-th of `of`, counted from 0."""

    index: int
    of: int
    patterns: Patterns
    report: PruneReport

    def __str__(self) -> str:
        return f"round {self.index + 1} of {self.of}\n{self.report}"


def geometric(density: float, n: int) -> list[float]:
    """Densities of `n` rounds, each keeping the same share of the last, the n-th at `density`.

    ``density^(i / n)`` for i from 1 to n.

    >>> geometric(0.125, 3)
    [0.5, 0.25, 0.125]
    """
    if not 0 < density <= 1:
        raise ValueError(f"geometric: density takes more than 0 to 1, got {density}")
    if n < 1:
        raise ValueError(f"geometric: n takes 1 round or more, got {n}")
    return [density ** (i / n) for i in range(1, n + 1)]


def plan(target: Target | Mapping[str, Target], n: int) -> list[Patterns]:
    """What each of `n` rounds prunes by: arguments for :func:`prune`.

    Args:
        target: a density is approached geometrically; any other pattern stands in every round, such as
            ``"quality=0.8"``, whose deviation is each time that of what is left; a sequence gives every
            round its own. Or a mapping of layer names to these.

    Raises:
        ValueError: a sequence has not `n` entries, a density rises from one round to the next.

    >>> [str(p) for p in plan("density=0.25", 2)]
    ['density=0.5', 'density=0.25']
    """
    if n < 1:
        raise ValueError(f"plan: n takes 1 round or more, got {n}")
    if isinstance(target, Mapping):
        layers = {name: _plan(own, n, f"{name}: ") for name, own in target.items()}
        return [{name: own[i] for name, own in layers.items()} for i in range(n)]
    return list(_plan(target, n, ""))


def _plan(target: Target, n: int, where: str) -> list[Pattern]:
    if isinstance(target, (str, Pattern)):
        pattern = parse(target)
        if isinstance(pattern, Density) and n > 1:
            return [Density(d) for d in geometric(pattern.density, n)]
        return [pattern] * n
    patterns = [parse(p) for p in target]
    if len(patterns) != n:
        raise ValueError(f"plan: {where}{len(patterns)} patterns for {n} rounds; it takes as many")
    densities = [p.density for p in patterns if isinstance(p, Density)]
    if densities != sorted(densities, reverse=True):
        raise ValueError(
            f"plan: {where}densities rise, and nothing pruned comes back: "
            f"{', '.join(map(str, patterns))}"
        )
    return patterns


def rounds(
    model: nn.Module,
    target: Target | Mapping[str, Target],
    n: int = 3,
    start: int = 0,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    score: Callable[[Tensor, str], Tensor] = magnitude,
) -> Iterator[Round]:
    """Prune a model at the start of every round and hand over to retrain it.

    Args:
        target: see :func:`plan`.
        start: rounds that are done already, when training goes on from a checkpoint.
        filter_fn, score: see :func:`prune`.

    Raises:
        ValueError: by :func:`plan` or :func:`prune`, or `start` is not 0 to `n`.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> [r.report[0].density for r in rounds(model, "density=0.25", n=2)]
    [0.5, 0.25]
    """
    patterns = plan(target, n)
    if not 0 <= start <= n:
        raise ValueError(f"rounds: start takes 0 to n, which is {n}, got {start}")

    def prune_each() -> Iterator[Round]:
        for i in range(start, n):
            report = prune(model, patterns[i], filter_fn, score)
            yield Round(i, n, patterns[i], report)

    return prune_each()
