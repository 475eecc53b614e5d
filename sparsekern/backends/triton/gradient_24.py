"""The gradients of linear_24 in Triton, from the packed weight: neither W nor its gradient is ever dense in memory.

``dx = dy · W``, M x K, sums over N; tiles of the weight are expanded as they are needed.

``dvalues = (dyᵀ · x)`` at the kept positions, N x K/2, sums over M. A dense tile of dyᵀ · x is the accumulator of the
tensor cores; what the weight does not keep of it is dropped before it is written.

Both multiply densely (Triton has no sparse product, triton#6891) and are limited by operations; what they save is
memory and the bytes of a dense weight, a half written and read again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference import rows_of
from . import autotune
from .autotune import Config, Family
from .format_24 import expand, kept, nibbles, quads, with_rows
from .product_24 import dot, load_weight, precision, rounded, tile_of

# ---- kernels ----


@triton.jit
def _linear_24_dx(
    dy, values, meta, dx, M, N, K, dy_stride_m, dy_stride_n, values_stride, meta_stride,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_k = tile_of(tl.program_id(0), M, K, BLOCK_M, BLOCK_K)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    k = tile_k * BLOCK_K
    rows, columns = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for n in range(0, N, BLOCK_N):
        first, second, nibble = load_weight(
            values, meta, (n + rows).to(tl.int64), k, N, K, values_stride, meta_stride,
            BLOCK_N, BLOCK_K, EVEN_K,
        )  # fmt: skip
        at = dy + m * dy_stride_m + (n + columns).to(tl.int64) * dy_stride_n
        tile = tl.load(at, mask=(m < M) & (columns < N - n), other=0)
        weight = expand(first, second, nibble, BLOCK_N, BLOCK_K // 4)
        acc = dot(tile, weight, acc, PRECISION)
    column = k + tl.arange(0, BLOCK_K)[None, :]
    tl.store(dx + m * K + column, rounded(acc, dx.dtype.element_ty), mask=(m < M) & (column < K))


@triton.jit
def _linear_24_dvalues(
    dy, x, meta, dvalues, M, N, K, dy_stride_m, dy_stride_n, x_stride_m, x_stride_k, meta_stride,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = BLOCK_K // 4
    tile_n, tile_k = tile_of(tl.program_id(0), N, K, BLOCK_N, BLOCK_K)
    n = tile_n.to(tl.int64) * BLOCK_N
    k = tile_k * BLOCK_K
    column_n, column_k = n + tl.arange(0, BLOCK_N)[None, :], k + tl.arange(0, BLOCK_K)[None, :]
    rows = tl.arange(0, BLOCK_M)[:, None]
    at_dy = dy + column_n * dy_stride_n
    at_x = x + column_k.to(tl.int64) * x_stride_k
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, M, BLOCK_M):
        m = (start + rows).to(tl.int64)
        tile_dy = tl.load(at_dy + m * dy_stride_m, mask=(m < M) & (column_n < N), other=0)
        tile_x = tl.load(at_x + m * x_stride_m, mask=(m < M) & (column_k < K), other=0)
        acc = dot(tile_dy.T, tile_x, acc, PRECISION)
    row = n + tl.arange(0, BLOCK_N)[:, None]
    byte = k // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
    packed = tl.load(
        meta + row * meta_stride + byte, mask=(row < N) & (byte < (K + 7) // 8), other=0
    )
    d0, d1, d2, d3 = quads(rounded(acc, dvalues.dtype.element_ty), BLOCK_N, G)
    first, second = kept(d0, d1, d2, d3, nibbles(packed, BLOCK_N, G))
    half = k // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
    tile = tl.reshape(tl.join(first, second), [BLOCK_N, 2 * G])
    tl.store(dvalues + row * (K // 2) + half, tile, mask=(row < N) & (half < K // 2))


# ---- which configuration ----

#         kernel, BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages
_CONFIGS = {
    "dx": [
        Config("dx", 16, 64, 128, 4, 3),
        Config("dx", 64, 64, 64, 4, 3),
        Config("dx", 128, 64, 128, 8, 3),
    ],
    "dx float32": [
        Config("dx", 16, 32, 64, 8, 2),
        Config("dx", 32, 32, 64, 8, 2),
    ],
    "dvalues": [
        Config("dvalues", 32, 64, 64, 4, 3),
        Config("dvalues", 64, 64, 128, 4, 3),
        Config("dvalues", 64, 128, 128, 8, 3),
    ],
    "dvalues float32": [
        Config("dvalues", 16, 64, 64, 8, 2),
        Config("dvalues", 32, 64, 64, 8, 2),
    ],
}


def dx_candidates(M: int, dtype: torch.dtype) -> list[Config]:
    """What `tune` tries."""
    return _CONFIGS["dx float32" if dtype is torch.float32 else "dx"]


def dvalues_candidates(M: int, dtype: torch.dtype) -> list[Config]:
    """What `tune` tries."""
    return _CONFIGS["dvalues float32" if dtype is torch.float32 else "dvalues"]


def dx_built_in(M: int, N: int, K: int, dtype: torch.dtype, sms: int) -> Config:
    """The first whose tile has room for the rows."""
    configs = dx_candidates(M, dtype)
    return next((c for c in configs if c.BLOCK_M >= M), configs[-1])


def dvalues_built_in(M: int, N: int, K: int, dtype: torch.dtype, sms: int) -> Config:
    """The largest tile that still leaves each multiprocessor one."""
    configs = dvalues_candidates(M, dtype)
    enough = [c for c in configs if sms * c.BLOCK_N * c.BLOCK_K <= N * K]
    return enough[-1] if enough else configs[0]


# ---- launchers ----


def linear_24_dx(dy: Tensor, values: Tensor, meta: Tensor) -> Tensor:
    rows, values, meta = rows_of(dy), with_rows(values), with_rows(meta)
    (M, N), K = rows.shape, 2 * values.shape[1]
    dx = dy.new_empty(*dy.shape[:-1], K)
    config = autotune.config("linear_24_dx", M, N, K, dy.dtype, dy.device)
    tiles = triton.cdiv(M, config.BLOCK_M) * triton.cdiv(K, config.BLOCK_K)
    if dx.numel():
        _linear_24_dx[(tiles,)](
            rows, values, meta, dx, M, N, K, *rows.stride(), values.stride(0), meta.stride(0),
            precision(dy.dtype), K % config.BLOCK_K == 0, **autotune.parameters(config),
        )  # fmt: skip
    return dx


def linear_24_dvalues(dy: Tensor, x: Tensor, meta: Tensor) -> Tensor:
    dy, x, meta = rows_of(dy), rows_of(x), with_rows(meta)
    (M, N), K = dy.shape, x.shape[1]
    dvalues = x.new_empty(N, K // 2)
    config = autotune.config("linear_24_dvalues", M, N, K, x.dtype, x.device)
    tiles = triton.cdiv(N, config.BLOCK_N) * triton.cdiv(K, config.BLOCK_K)
    if dvalues.numel():
        _linear_24_dvalues[(tiles,)](
            dy, x, meta, dvalues, M, N, K, *dy.stride(), *x.stride(), meta.stride(0),
            precision(x.dtype), **autotune.parameters(config),
        )  # fmt: skip
    return dvalues


autotune.FAMILIES["linear_24_dx"] = Family(linear_24_dx, dx_built_in, dx_candidates)
autotune.FAMILIES["linear_24_dvalues"] = Family(
    linear_24_dvalues, dvalues_built_in, dvalues_candidates
)
