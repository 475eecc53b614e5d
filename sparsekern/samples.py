"""Sample inputs of every op, for the self-test, the tests and the benchmarks. A new op adds its entry here.

Exact samples hold small integers, so that a correct kernel gives the same bits whatever the order
of its sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference

# (M, N, K): one row, a few, more than any panel; K of one group, an odd number of groups, tails of
# every vector width.
SHAPES = [
    (1, 1, 4),
    (1, 5, 12),
    (2, 3, 8),
    (3, 7, 20),
    (4, 9, 36),
    (5, 16, 64),
    (7, 50, 100),
    (12, 17, 44),
]
SHAPES += [(17, 49, 104), (33, 8, 192), (65, 96, 200), (130, 33, 52), (515, 10, 28)]
# The last three are aligned, for kernels that serve only such: few rows, as many as a decode kernel takes, more.
QUICK_SHAPES = [(1, 5, 12), (3, 33, 72), (40, 9, 52), (2, 32, 128), (64, 16, 256), (70, 48, 64)]
# Elements of a ZVC sample: around a byte, a vector, a tile.
LENGTHS = [0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 4095, 4096, 4097, 12295]


class Samples:
    """Draws arguments for an op on a device in a dtype, the same for the same seed."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, exact: bool = True, seed: int = 0
    ) -> None:
        self.dtype, self.device, self.exact = dtype, device, exact
        self.generator = torch.Generator().manual_seed(seed)

    def dense(self, *shape: int, low: int = -2, high: int = 2) -> Tensor:
        """Integers in [low, high] if exact, else normal deviates; any dtype."""
        if self.exact or not self.dtype.is_floating_point:
            low = max(low, 0) if self.dtype in (torch.uint8, torch.bool) else low
            return self._to(torch.randint(low, high + 1, shape, generator=self.generator))
        return self._to(torch.randn(shape, generator=self.generator, dtype=torch.float64))

    def sparse(self, *shape: int, density: float = 0.4) -> Tensor:
        """Any bits, about `density` of the elements not zero; for ZVC, which knows no numbers."""
        keep = torch.rand(shape, generator=self.generator) < density
        nonzero = torch.randint(1, 100, shape, generator=self.generator)
        bits = torch.where(keep, nonzero, 0)
        if self.dtype is torch.bool:
            return (bits != 0).to(self.device)
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
            self.dtype.itemsize
        ]
        return bits.to(integer).view(self.dtype).to(self.device)

    def packed(self, N: int, K: int) -> tuple[Tensor, Tensor]:
        return reference.pack_24(self.dense(N, K))

    def _to(self, t: Tensor) -> Tensor:
        return t.to(self.dtype).to(self.device)

    def of(self, op: str, quick: bool = False) -> Iterator[tuple]:
        """Argument tuples for the op called `op`."""
        shapes = QUICK_SHAPES if quick else SHAPES
        lengths = [4097] if quick else LENGTHS
        if op in ("prune_24", "pack_24"):
            for _, N, K in shapes:
                yield (self.dense(N, K),)
        elif op == "prune_24_transposable":
            for _, N, K in shapes:
                yield (self.dense(4 * N, K),)
        elif op in ("unpack_24", "prepack_24"):
            for _, N, K in shapes:
                yield self.packed(N, K)
        elif op == "gather_24":
            for _, N, K in shapes:
                yield self.dense(N, K), self.packed(N, K)[1]
        elif op in ("linear_24", "linear_24_prepacked"):
            for i, (M, N, K) in enumerate(shapes):
                x, (values, meta), bias = (
                    self.dense(M, K, low=-1, high=1),
                    self.packed(N, K),
                    self.dense(N),
                )
                activation = ("none", "relu", "relu2", "gelu", "silu")[i % 5]
                weight = (
                    (values, meta) if op == "linear_24" else (reference.prepack_24(values, meta), N)
                )
                yield (x, *weight, bias if i % 3 else None, activation)
        elif op == "linear_24_dx":
            for M, N, K in shapes:
                yield (self.dense(M, N, low=-1, high=1), *self.packed(N, K))
        elif op == "linear_24_dvalues":
            for M, N, K in shapes:
                yield (
                    self.dense(M, N, low=-1, high=1),
                    self.dense(M, K, low=-1, high=1),
                    self.packed(N, K)[1],
                )
        elif op == "unprepack_24":
            for _, N, K in shapes:
                yield reference.prepack_24(*self.packed(N, K)), N, K, self.dtype
        elif op == "pack_zvc":
            for n in lengths:
                yield (self.sparse(n),)
        elif op == "pack_zvc_out":
            for n in lengths:
                x = self.sparse(n)
                empty = {"device": self.device, "dtype": torch.int64}
                offsets, count = torch.empty(-(-n // 4096), **empty), torch.empty(1, **empty)
                yield (
                    x,
                    torch.empty(-(-n // 8), device=self.device, dtype=torch.uint8),
                    torch.empty_like(x),
                    offsets,
                    count,
                )
        elif op == "unpack_zvc":
            for n in lengths:
                yield (*reference.pack_zvc(self.sparse(n)), [n])
        else:
            raise KeyError(f"no samples for op {op!r}")
