"""linear_24 in Triton: ``y = activation(x · Wᵀ + bias)`` from the packed weight, never a dense copy of it.

Letters: M tokens, N out features, K in features; x[M, K], values[N, K/2], meta[N, K/8]. Two kernels and a sum:

``_linear_24_few``, up to four tokens, is limited by reading the weight. Each kept value picks its x and is
multiplied, no other product is made::

    values  v0 v1 | v0 v1 | ..     one load of 16 bytes: eight values of 16 bits, four groups
    meta    i0,i1 | i0,i1 | ..     the two bytes that go with them
    x       x0 x1 x2 x3 | ..       the same 16 columns for every row of the weight
    acc  += v0 * x[i0] + v1 * x[i1]    per group of columns, summed once at the end

A thread loads the values, the positions and the x of the same columns, so nothing passes through shared memory.

``_linear_24_many``, from five tokens on, expands tiles of the weight and multiplies them densely on the tensor cores:
Triton has no sparse product (triton#6891). It saves memory and the bytes of the weight, not operations.

Where tiles of N are too few to occupy the device, both also split K: each part writes fp32 sums to scratch and
``_sum_splits`` adds them in the order of K, then bias and activation. No atomics: the same bits on every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference import rows_of, split_packed
from .. import allows_tf32
from . import autotune
from .autotune import Config, Family
from .format_24 import expand, kept, nibbles, pairs, quads, with_rows

# ---- what the interpreter does otherwise: it multiplies the bits of bf16 and truncates to it ----

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · b with sums in fp32."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)  # the same products
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(z, DTYPE: tl.constexpr):
    """fp32 to the nearest of DTYPE, ties to even."""
    if _INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = z.to(tl.int32, bitcast=True)
        nearest = tl.where(z == z, bits + 0x7FFF + (bits >> 16 & 1), bits | 0x400000)
        result = (nearest >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = z.to(DTYPE)
    return result


# ---- device functions ----


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)  # a NaN stays one
    elif ACTIVATION == "relu2":
        z = tl.where(z < 0, 0.0, z)
        z = z * z
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def load_weight(
    values, meta, n, k, N, K, values_stride, meta_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """The kept pairs and nibbles [BLOCK_N, BLOCK_K/4] of rows n [BLOCK_N, 1], from column k on."""
    G: tl.constexpr = BLOCK_K // 4
    half = tl.arange(0, BLOCK_K // 2)[None, :]
    # Without the hint a thread would load more bytes of meta than go with the 16 bytes of values that it loads.
    byte = tl.max_contiguous(tl.arange(0, BLOCK_K // 8)[None, :], [1, 2])
    here_v, here_m = n < N, n < N
    if not EVEN_K:
        here_v &= half < (K - k) // 2
        here_m &= byte < (K - k + 7) // 8
    v = tl.load(values + n * values_stride + k // 2 + half, mask=here_v, other=0)
    m = tl.load(meta + n * meta_stride + k // 8 + byte, mask=here_m, other=0)
    first, second = pairs(v, BLOCK_N, G)
    return first, second, nibbles(m, BLOCK_N, G)


# ---- kernels ----


@triton.jit
def _linear_24_few(
    x, values, meta, bias, y, N, K, SPLIT_K,
    x_stride_m, x_stride_k, values_stride, meta_stride,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[M, N], all M = BLOCK_M rows at once; with LAST unset the sums of one part of K, float32 [part, M, N]."""
    G: tl.constexpr = BLOCK_K // 4
    part = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = row[:, None]
    columns = tl.arange(0, BLOCK_K)[None, :]
    start = part * SPLIT_K
    sums = ()
    for _ in tl.static_range(BLOCK_M):
        sums = sums + (tl.zeros([BLOCK_N, G], tl.float32),)
    for k in range(start, min(start + SPLIT_K, K), BLOCK_K):
        first, second, nibble = load_weight(
            values, meta, n, k, N, K, values_stride, meta_stride, BLOCK_N, BLOCK_K, EVEN_K
        )
        first, second = first.to(tl.float32), second.to(tl.float32)
        here = columns < (BLOCK_K if EVEN_K else K - k)
        at = x + (k + columns).to(tl.int64) * x_stride_k
        added = ()
        for m in tl.static_range(BLOCK_M):
            tile = tl.load(at, mask=here, other=0)
            at += x_stride_m  # in 64 bits, whatever the stride
            x0, x1, x2, x3 = quads(tile.to(tl.float32), 1, G)
            x_first, x_second = kept(x0, x1, x2, x3, nibble)
            added = added + (sums[m] + first * x_first + second * x_second,)
        sums = added
    for m in tl.static_range(BLOCK_M):
        z = tl.sum(sums[m], 1)
        if LAST:
            if bias is not None:
                z += tl.load(bias + row, mask=row < N, other=0).to(tl.float32)
            z = _activate(z, ACTIVATION)
        at = y + (part * BLOCK_M + m).to(tl.int64) * N + row
        tl.store(at, rounded(z, y.dtype.element_ty), mask=row < N)


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Coordinates of a tile. Eight programs in a row share a tile of the weight, so that the cache has it."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = pid // (8 * tiles_n)
    height = min(tiles_m - group * 8, 8)
    within = pid % (8 * tiles_n)
    return group * 8 + within % height, within // height


@triton.jit
def _linear_24_many(
    x, values, meta, bias, y, M, N, K, SPLIT_K,
    x_stride_m, x_stride_k, values_stride, meta_stride,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = BLOCK_K // 4
    part = tl.program_id(1)
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    row = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = row[:, None]
    columns = tl.arange(0, BLOCK_K)[None, :]
    start = part * SPLIT_K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(start, min(start + SPLIT_K, K), BLOCK_K):
        first, second, nibble = load_weight(
            values, meta, n, k, N, K, values_stride, meta_stride, BLOCK_N, BLOCK_K, EVEN_K
        )
        here = m < M
        if not EVEN_K:
            here &= columns < K - k
        at = x + m * x_stride_m + (k + columns).to(tl.int64) * x_stride_k
        tile = tl.load(at, mask=here, other=0)
        weight = expand(first, second, nibble, BLOCK_N, G)
        acc = dot(tile, weight.T, acc, PRECISION)
    if LAST:
        if bias is not None:
            acc += tl.load(bias + row, mask=row < N, other=0).to(tl.float32)[None, :]
        acc = _activate(acc, ACTIVATION)
    at = y + (part.to(tl.int64) * M + m) * N + row[None, :]
    tl.store(at, rounded(acc, y.dtype.element_ty), mask=(m < M) & (row[None, :] < N))


@triton.jit
def _sum_splits(sums, bias, y, MN, N, SPLITS, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """y = activation(the sum over parts of sums[SPLITS, M, N], in order, + bias)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < MN
    z = tl.zeros([BLOCK], tl.float32)
    part = sums + at
    for _ in range(SPLITS):
        z += tl.load(part, mask=here, other=0)
        part += MN
    if bias is not None:
        z += tl.load(bias + at % N, mask=here, other=0).to(tl.float32)
    z = _activate(z, ACTIVATION)
    tl.store(y + at, rounded(z, y.dtype.element_ty), mask=here)


# ---- which configuration ----

FEW = 4  # tokens up to which bytes, not arithmetic, should limit _linear_24_few
_SUM_BLOCK = 256
#         kernel, BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages
_CONFIGS = {
    # BLOCK_K < 32 * num_warps: Triton then loads x where it is used, else by way of shared memory.
    "few": [
        Config("few", 1, 64, 128, 8, 1),
        Config("few", 1, 32, 128, 8, 1),
        Config("few", 1, 32, 64, 4, 1),
    ],
    # One byte of meta goes with 16 bytes of values. They meet in one thread only if it has no more than these.
    "few float32": [
        Config("few", 1, 16, 128, 8, 1),
        Config("few", 1, 16, 64, 4, 1),
    ],
    "many": [
        Config("many", 16, 32, 128, 4, 4),
        Config("many", 16, 64, 128, 4, 3),
        Config("many", 32, 64, 64, 4, 3),
        Config("many", 64, 64, 64, 4, 3),
        Config("many", 64, 128, 64, 4, 3),
        Config("many", 128, 128, 64, 8, 3),
    ],
    # Products of float32 run on the ordinary cores unless tf32 is allowed, and its tiles are twice as large.
    "many float32": [
        Config("many", 16, 64, 32, 4, 2),
        Config("many", 32, 64, 32, 4, 2),
        Config("many", 64, 64, 32, 8, 2),
    ],
}


def _configs(kernel: str, dtype: torch.dtype) -> list[Config]:
    return _CONFIGS[f"{kernel} float32" if dtype is torch.float32 else kernel]


def built_in(M: int, N: int, K: int, dtype: torch.dtype, sms: int) -> Config:
    """Where none was tuned. Tiles as high as there are rows, so that the weight is expanded once; of these the
    largest that still leaves each multiprocessor two programs, of many rows one."""
    if M <= FEW:
        return _configs("few", dtype)[0]
    many = _configs("many", dtype)
    rows = min(max(16, triton.next_power_of_2(M)), many[-1].BLOCK_M)
    fitting = [c for c in many if c.BLOCK_M in (rows, max(rows // 2, 16) if M > 64 else rows)]
    if K % 32:  # rows are not aligned, and with so many short loads large tiles would spill
        fitting = [c for c in fitting if c.BLOCK_M * c.BLOCK_N <= 64 * 64]
    tiles = [triton.cdiv(M, c.BLOCK_M) * triton.cdiv(N, c.BLOCK_N) for c in fitting]
    enough = [c for c, t in zip(fitting, tiles, strict=True) if t >= (2 if M <= 64 else 1) * sms]
    return enough[-1] if enough else fitting[0]


def candidates(M: int, dtype: torch.dtype) -> list[Config]:
    """What `tune` tries."""
    if M <= FEW:
        return _configs("few", dtype) + [c for c in _configs("many", dtype) if c.BLOCK_M == 16]
    return _configs("many", dtype)


class Plan(NamedTuple):
    """A launch: its configuration, the tiles of y, into how many parts of SPLIT_K columns K goes."""

    config: Config
    tiles: int
    splits: int
    SPLIT_K: int


def plan(M: int, N: int, K: int, dtype: torch.dtype, sms: int, config: Config) -> Plan:
    """Up to 16 rows, parts of K until each multiprocessor has 32 warps, while the scratch that is written and read
    stays below a twelfth of the weight's bytes; beyond, where bytes are not the limit, until it has 8, below half of
    them."""
    tiles = triton.cdiv(N, config.BLOCK_N)
    if config.kernel == "many":
        tiles *= triton.cdiv(M, config.BLOCK_M)
    weight = N * (K // 2 * dtype.itemsize + (K + 7) // 8)
    warps, share = (32, 12) if M <= 16 else (8, 2)
    wanted = sms * warps // config.num_warps // tiles
    splits = max(1, min(wanted, weight // (share * 8 * M * N), K // (2 * config.BLOCK_K)))
    split = triton.cdiv(triton.cdiv(K, splits), config.BLOCK_K) * config.BLOCK_K
    return Plan(config, tiles, max(1, triton.cdiv(K, split)) if K else 1, split)


def precision(dtype: torch.dtype) -> str:
    """How products of float32 multiply."""
    return "tf32" if allows_tf32(dtype) else "ieee"


# ---- launchers ----


def linear_24(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    rows, values, meta = rows_of(x), with_rows(values), with_rows(meta)
    (M, K), N = rows.shape, values.shape[0]
    y = x.new_empty(*x.shape[:-1], N)
    if not y.numel():
        return y
    bias = None if bias is None else bias.contiguous()
    config = autotune.config("linear_24", M, N, K, x.dtype, x.device)
    config, tiles, splits, split = plan(M, N, K, x.dtype, autotune.sms(x.device), config)
    last = splits == 1
    out = y if last else x.new_empty(splits * M * N, dtype=torch.float32)
    strides = (*rows.stride(), values.stride(0), meta.stride(0))
    even = K % config.BLOCK_K == 0
    parameters = autotune.parameters(config)
    if config.kernel == "few":
        parameters["BLOCK_M"] = M
        _linear_24_few[(tiles, splits)](
            rows, values, meta, bias, out, N, K, split, *strides, activation, last, even,
            **parameters,
        )  # fmt: skip
    else:
        _linear_24_many[(tiles, splits)](
            rows, values, meta, bias, out, M, N, K, split, *strides, activation,
            precision(x.dtype), last, even, **parameters,
        )  # fmt: skip
    if not last:
        _sum_splits[(triton.cdiv(M * N, _SUM_BLOCK),)](
            out, bias, y, M * N, N, splits, activation, BLOCK=_SUM_BLOCK, enable_fp_fusion=True
        )
    return y


def linear_24_prepacked(
    x: Tensor, packed: Tensor, N: int, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """Prepacking is the identity here: values and meta are read where they lie."""
    return linear_24(x, *split_packed(packed, N, x.shape[-1], x.dtype), bias, activation)


autotune.FAMILIES["linear_24"] = Family(linear_24, built_in, candidates)
