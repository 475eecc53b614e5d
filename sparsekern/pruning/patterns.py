"""Which elements of a weight stay: N:M, a target density, or a threshold in standard deviations.

A pattern turns scores into a mask. Scores are those of a matrix ``[rows, K]`` whose K runs along the
input features (:func:`matrix` makes one of a convolution's weight)::

    2:4            of each four consecutive elements of a row the two that score best
    density=0.08   of the whole matrix the 8 % that score best
    quality=1.2    what scores more than 1.2 standard deviations of the weight (Han et al. 2015, section 3)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import ops


class Pattern:
    """What a mask has to look like. Subclasses are frozen dataclasses; ``str(p)`` parses back to `p`."""

    def why_not(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix ``[rows, K]`` cannot have this pattern, or None."""
        return None

    def mask(self, scores: Tensor) -> Tensor:
        """bool ``[rows, K]``: what stays. Higher scores stay first, NaN before all, ties to the lower index.

        Args:
            scores: ``[rows, K]``, floating point, non-negative: magnitudes of the weight, or whatever
                stands for them.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class NM(Pattern):
    """`n` of every `m` consecutive elements along the input features, at most (Mishra et al. 2021)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(f"pattern N:M takes 1 <= N < M, got {self.n}:{self.m}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def why_not(self, shape: tuple[int, int]) -> str | None:
        if shape[1] % self.m:
            return f"{shape[1]} input features are no multiple of {self.m}"
        return None

    def mask(self, scores: Tensor) -> Tensor:
        rows, K = scores.shape
        if self == NM(2, 4):
            # The op compares magnitudes on bits: the same mask on every back end, with the library's ties.
            # A score of 0 stays 0 there, so a mark stands in: kept positions are those of the format.
            meta = torch.ops.sparsekern.pack_24(scores.contiguous())[1]
            ones = torch.ones(rows, K // 2, dtype=torch.int8, device=scores.device)
            return torch.ops.sparsekern.unpack_24(ones, meta).bool()
        groups = scores.reshape(rows, K // self.m, self.m)
        groups = torch.where(groups.isnan(), math.inf, groups)
        best = groups.argsort(dim=-1, descending=True, stable=True)[..., : self.n]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).view(rows, K)


@dataclass(frozen=True)
class Transposable(Pattern):
    """2:4 along the rows and along the columns, in tiles of 4x4, so that the transpose is 2:4 as well."""

    def __str__(self) -> str:
        return "2:4-transposable"

    def why_not(self, shape: tuple[int, int]) -> str | None:
        for size, what in ((shape[0], "output"), (shape[1], "input")):
            if size % 4:
                return f"{size} {what} features are no multiple of 4"
        return None

    def mask(self, scores: Tensor) -> Tensor:
        # A kept zero would look like a dropped one: lifted by less than any difference that decides.
        scores = scores if scores.dtype is torch.float64 else scores.float()
        lifted = scores + torch.finfo(scores.dtype).tiny
        return torch.ops.sparsekern.prune_24_transposable(lifted) != 0


@dataclass(frozen=True)
class Density(Pattern):
    """The share of the whole matrix that stays, rounded to the nearest element."""

    density: float

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise ValueError(f"pattern density takes 0 to 1, got {self.density}")

    def __str__(self) -> str:
        return f"density={self.density:g}"

    def mask(self, scores: Tensor) -> Tensor:
        flat = torch.where(scores.isnan(), math.inf, scores).flatten()
        keep = round(self.density * flat.numel())
        best = flat.argsort(descending=True, stable=True)[:keep]
        mask = torch.zeros(flat.numel(), dtype=torch.bool, device=scores.device)
        return mask.index_fill_(0, best, True).view_as(scores)


@dataclass(frozen=True)
class Quality(Pattern):
    """What exceeds `quality` standard deviations of the weights that are not zero yet (Han et al. 2015)."""

    quality: float

    def __post_init__(self) -> None:
        if not (self.quality >= 0 and math.isfinite(self.quality)):
            raise ValueError(f"pattern quality takes a finite number from 0 on, got {self.quality}")

    def __str__(self) -> str:
        return f"quality={self.quality:g}"

    def threshold(self, scores: Tensor) -> float:
        """`quality` times the standard deviation of a weight with these magnitudes, taken as centred."""
        alive = scores[scores != 0]
        return self.quality * alive.double().square().mean().sqrt().item() if alive.numel() else 0.0

    def mask(self, scores: Tensor) -> Tensor:
        return (scores > self.threshold(scores)) | scores.isnan()


def parse(pattern: str | Pattern) -> Pattern:
    """A pattern of what a user wrote: ``"2:4"``, ``"2:4-transposable"``, ``"density=0.1"``, ``"quality=1"``.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(pattern, Pattern):
        return pattern
    if found := re.fullmatch(r"(\d+):(\d+)", pattern):
        return NM(int(found[1]), int(found[2]))
    if pattern == "2:4-transposable":
        return Transposable()
    name, _, number = pattern.partition("=")
    if kind := {"density": Density, "quality": Quality}.get(name):
        try:
            return kind(float(number))
        except ValueError as error:
            raise ValueError(f"pattern is {pattern!r}: {error}") from None
    raise ValueError(
        f"pattern is {pattern!r}; it takes N:M as in 2:4, 2:4-transposable, density=SHARE, quality=DEVIATIONS"
    )


def matrix(weight: Tensor) -> Tensor:
    """A weight as ``[rows, K]`` with K along the input features.

    A linear layer's ``[out, in]`` is one already. A convolution's ``[out, in/groups, *kernel]`` becomes
    ``[out * kernel, in/groups]``: groups of 2:4 run along input channels, as in the GEMM of an NHWC
    convolution. :func:`unmatrix` is the inverse.
    """
    return weight if weight.dim() == 2 else weight.movedim(1, -1).reshape(-1, weight.shape[1])


def unmatrix(of: Tensor, shape: torch.Size) -> Tensor:
    """`of`, made by :func:`matrix`, in the weight's shape again."""
    if len(shape) == 2:
        return of
    return of.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


@dataclass(frozen=True)
class Layer:
    """One weight of a model that a pattern may go on.

    Attributes:
        name: of the module, dotted.
        skipped: why it stays dense, "" if it need not.
    """

    name: str
    module: nn.Module
    skipped: str = ""

    @property
    def weight(self) -> Tensor:
        """Detached. Where a mask is held, the masked one."""
        return self.module.weight.detach()


PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layers(
    model: nn.Module,
    pattern: str | Pattern,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> list[Layer]:
    """Every linear and convolution layer of a model in order, with the reason where the pattern does not fit.

    Args:
        filter_fn: called with (layer, its name); False leaves the layer dense.
    """
    pattern = parse(pattern)
    found, owner = [], {}
    for name, module in model.named_modules():  # such as an embedding tied to the output layer
        if not isinstance(module, (*PRUNABLE, parametrize.ParametrizationList)):
            for parameter in module.parameters(recurse=False):
                owner.setdefault(id(parameter), name)
    for name, module in model.named_modules():
        if not isinstance(module, PRUNABLE):
            continue
        weight = module.weight
        skipped = ""
        if isinstance(weight, nn.parameter.UninitializedParameter):
            skipped = "not initialised yet: run a batch through the model first"
        elif filter_fn is not None and not filter_fn(module, name):
            skipped = "filter_fn said no"
        elif weight.dtype not in ops.PRODUCT_DTYPES:
            skipped = f"weights of {weight.dtype} are not pruned"
        elif (first := owner.setdefault(weight_identity(module), name)) != name:
            skipped = f"shares its weight with {first}"
        else:
            skipped = pattern.why_not(tuple(matrix(weight.detach()).shape)) or ""
        found.append(Layer(name, module, skipped))
    return found


def weight_identity(module: nn.Module) -> int:
    """The same for two modules whose weight is one Parameter, with or without a mask on it."""
    lists = getattr(module, "parametrizations", {})
    if "weight" not in lists:
        return id(module.weight)
    return id(next(lists["weight"].parameters(recurse=False), lists["weight"]))
