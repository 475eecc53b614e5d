"""The 2:4 format in Triton: between four elements and the two that are kept, with two bits for each one's place.

One group, and what the three device functions below do with it::

    dense    a  b  c  d      |b| and |d| are the two largest
    keep     .  b  .  d      positions i0 = 1, i1 = 3
    values   b  d            nibble  i0 | i1 << 2  =  0b1101  =  13

    quads    [R, 4G] -> a, b, c, d, each [R, G]                 a thread holds whole groups, so that
    kept     a, b, c, d and the nibble -> the kept two          all three only rename registers and
    expand   the kept two and the nibble -> [R, 4G] dense       select between them: no memory

``meta`` holds two nibbles a byte, the even group's in the low half. Letters: N rows (out features), K columns, G =
K/4 groups; a program takes a tile of BLOCK_N rows and BLOCK_K columns.

Elements move as integers of their size: floats would be free to alter the payload of a NaN. All of it is limited by
the bytes moved: each element is read once and each output written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference import bits, rows_of, transposable_masks

# ---- device functions that the products share ----


@triton.jit
def nibbles(meta, R: tl.constexpr, G: tl.constexpr):
    """meta bytes [R, G/2] to the nibble of each group, int32 [R, G]."""
    meta = meta.to(tl.int32)
    return tl.reshape(tl.join(meta & 15, meta >> 4), [R, G])


@triton.jit
def pairs(values, R: tl.constexpr, G: tl.constexpr):
    """values [R, 2G] to the first and the second kept element of each group, each [R, G]."""
    return tl.split(tl.reshape(values, [R, G, 2]))


@triton.jit
def quads(dense, R: tl.constexpr, G: tl.constexpr):
    """dense [R, 4G] to the four elements of each group, each [R, G]."""
    even, odd = tl.split(tl.reshape(dense, [R, G, 2, 2]))
    d0, d2 = tl.split(even)
    d1, d3 = tl.split(odd)
    return d0, d1, d2, d3


@triton.jit
def from_quads(d0, d1, d2, d3, R: tl.constexpr, G: tl.constexpr):
    """The inverse of quads."""
    return tl.reshape(tl.join(tl.join(d0, d2), tl.join(d1, d3)), [R, 4 * G])


@triton.jit
def kept(d0, d1, d2, d3, nibble):
    """The two of four that the nibble names. The first is one of d0, d1, d2, the second one of d1, d2, d3, so one bit
    of each position decides alone and the other only in its absence."""
    first = tl.where((nibble & 2) != 0, d2, tl.where((nibble & 1) != 0, d1, d0))
    second = tl.where((nibble & 8) == 0, d1, tl.where((nibble & 4) == 0, d2, d3))
    return first, second


@triton.jit
def expand(first, second, nibble, R: tl.constexpr, G: tl.constexpr):
    """The dense tile [R, 4G] of kept pairs [R, G]."""
    i0, i1 = nibble & 3, nibble >> 2
    zero = tl.zeros_like(first)
    d0 = tl.where(i0 == 0, first, zero)
    d1 = tl.where(i0 == 1, first, tl.where(i1 == 1, second, zero))
    d2 = tl.where(i0 == 2, first, tl.where(i1 == 2, second, zero))
    d3 = tl.where(i1 == 3, second, zero)
    return from_quads(d0, d1, d2, d3, R, G)


@triton.jit
def _magnitude(x, SIGN_CLEARED: tl.constexpr):
    """What prune compares: the bits without the sign for floats, so that a NaN exceeds infinity; |x| for integers."""
    return x & SIGN_CLEARED if SIGN_CLEARED else tl.abs(x.to(tl.int32))


@triton.jit
def _largest_two(d0, d1, d2, d3, SIGN_CLEARED: tl.constexpr):
    """The nibble of the two largest magnitudes; of equals the lower index stays."""
    m0, m1 = _magnitude(d0, SIGN_CLEARED), _magnitude(d1, SIGN_CLEARED)
    m2, m3 = _magnitude(d2, SIGN_CLEARED), _magnitude(d3, SIGN_CLEARED)
    # wins_ij: i beats j. Six comparisons order any four; who loses twice is out.
    wins01, wins02, wins03 = (
        (m0 >= m1).to(tl.int32),
        (m0 >= m2).to(tl.int32),
        (m0 >= m3).to(tl.int32),
    )
    wins12, wins13, wins23 = (
        (m1 >= m2).to(tl.int32),
        (m1 >= m3).to(tl.int32),
        (m2 >= m3).to(tl.int32),
    )
    keep0 = wins01 + wins02 + wins03 >= 2
    keep1 = wins12 + wins13 >= 1 + wins01
    keep2 = wins02 + wins12 <= wins23
    keep3 = wins03 + wins13 + wins23 <= 1
    i0 = tl.where(keep0, 0, tl.where(keep1, 1, 2))
    i1 = tl.where(keep3, 3, tl.where(keep2, 2, 1))
    return i0 | i1 << 2


@triton.jit
def _canonical(x, SIGN_CLEARED: tl.constexpr):
    """Every zero as +0.0: which zero a group names must not show in the bytes."""
    return tl.where(_magnitude(x, SIGN_CLEARED) != 0, x, tl.zeros_like(x))


@triton.jit
def _tile(N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Row indices [BLOCK_N, 1] and first column of this program's tile, in 64 bits: weights may pass 2^31
    elements."""
    tiles = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    n = (pid // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    return n, (pid % tiles).to(tl.int64) * BLOCK_K


# ---- kernels ----


@triton.jit
def _prune_24(
    weight, out, N, K, stride_n, stride_k,
    SIGN_CLEARED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = BLOCK_K // 4
    n, k0 = _tile(N, K, BLOCK_N, BLOCK_K)
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    mask = (n < N) & (k < K)
    d0, d1, d2, d3 = quads(
        tl.load(weight + n * stride_n + k * stride_k, mask=mask, other=0), BLOCK_N, G
    )
    nibble = _largest_two(d0, d1, d2, d3, SIGN_CLEARED)
    first, second = kept(d0, d1, d2, d3, nibble)
    first, second = _canonical(first, SIGN_CLEARED), _canonical(second, SIGN_CLEARED)
    tl.store(out + n * K + k, expand(first, second, nibble, BLOCK_N, G), mask=mask)


@triton.jit
def _pack_24(
    weight, values, meta, N, K, stride_n, stride_k,
    SIGN_CLEARED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = BLOCK_K // 4
    n, k0 = _tile(N, K, BLOCK_N, BLOCK_K)
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    d0, d1, d2, d3 = quads(
        tl.load(weight + n * stride_n + k * stride_k, mask=(n < N) & (k < K), other=0), BLOCK_N, G
    )
    nibble = _largest_two(d0, d1, d2, d3, SIGN_CLEARED)
    first, second = kept(d0, d1, d2, d3, nibble)
    first, second = _canonical(first, SIGN_CLEARED), _canonical(second, SIGN_CLEARED)
    half = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
    packed = tl.reshape(tl.join(first, second), [BLOCK_N, 2 * G])
    tl.store(values + n * (K // 2) + half, packed, mask=(n < N) & (half < K // 2))
    # A group past the end reads zeros, which tie: it packs to 4, as the format asks of an odd last group.
    low, high = tl.split(tl.reshape(nibble, [BLOCK_N, G // 2, 2]))
    byte = k0 // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
    width = (K + 7) // 8
    tl.store(meta + n * width + byte, (low | high << 4).to(tl.uint8), mask=(n < N) & (byte < width))


@triton.jit
def _unpack_24(
    values, meta, dense, N, K, values_stride, meta_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = BLOCK_K // 4
    n, k0 = _tile(N, K, BLOCK_N, BLOCK_K)
    half = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
    byte = k0 // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
    first, second = pairs(
        tl.load(values + n * values_stride + half, mask=(n < N) & (half < K // 2), other=0),
        BLOCK_N,
        G,
    )
    packed = tl.load(meta + n * meta_stride + byte, mask=(n < N) & (byte < (K + 7) // 8), other=0)
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    tile = expand(first, second, nibbles(packed, BLOCK_N, G), BLOCK_N, G)
    tl.store(dense + n * K + k, tile, mask=(n < N) & (k < K))


@triton.jit
def _gather_24(
    dense, meta, values, N, K, stride_n, stride_k, meta_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = BLOCK_K // 4
    n, k0 = _tile(N, K, BLOCK_N, BLOCK_K)
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    byte = k0 // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
    d0, d1, d2, d3 = quads(
        tl.load(dense + n * stride_n + k * stride_k, mask=(n < N) & (k < K), other=0), BLOCK_N, G
    )
    packed = tl.load(meta + n * meta_stride + byte, mask=(n < N) & (byte < (K + 7) // 8), other=0)
    first, second = kept(d0, d1, d2, d3, nibbles(packed, BLOCK_N, G))
    half = k0 // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
    tile = tl.reshape(tl.join(first, second), [BLOCK_N, 2 * G])
    tl.store(values + n * (K // 2) + half, tile, mask=(n < N) & (half < K // 2))


# ---- 2:4 along rows and along columns ----
# A 4x4 tile has 90 masks with two kept in every row and column. A row keeps one of six pairs of columns, so a mask is
# four pairs, and its score a sum of four of the 24 pair sums; all 90 are tried, and the first of the best stays.

_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
_MASKS = tl.constexpr(  # per mask the index of its pair in each row
    tuple(
        tuple(_PAIRS.index(tuple(row.nonzero().flatten().tolist())) for row in mask)
        for mask in transposable_masks()
    )
)
_BITS = tl.constexpr(  # per mask its sixteen bits, bit 4 r + c for row r and column c
    tuple(sum(1 << 4 * r + c for r, c in mask.nonzero().tolist()) for mask in transposable_masks())
)


@triton.jit
def _pair_sums(d0, d1, d2, d3, FLOAT: tl.constexpr, SUM: tl.constexpr):
    """The six sums of two magnitudes of a row, in the order of _PAIRS. NaN counts as infinite."""
    a, b = _size(d0, FLOAT, SUM), _size(d1, FLOAT, SUM)
    c, d = _size(d2, FLOAT, SUM), _size(d3, FLOAT, SUM)
    return a + b, a + c, a + d, b + c, b + d, c + d


@triton.jit
def _size(x, FLOAT: tl.constexpr, SUM: tl.constexpr):
    value = tl.abs(x.to(FLOAT, bitcast=True).to(SUM))
    return tl.where(value == value, value, float("inf"))


@triton.jit
def _prune_24_transposable(
    weight, out, N, K, stride_n, stride_k,
    FLOAT: tl.constexpr, SUM: tl.constexpr, SIGN_CLEARED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = BLOCK_K // 4
    n, k0 = _tile(N // 4, K, BLOCK_N, BLOCK_K)  # n counts rows of tiles
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    mask = (n < N // 4) & (k < K)
    at = weight + 4 * n * stride_n + k * stride_k
    # Rows of a tile are four loads, so that a thread holds all sixteen elements.
    r0 = quads(tl.load(at, mask=mask, other=0), BLOCK_N, G)
    r1 = quads(tl.load(at + stride_n, mask=mask, other=0), BLOCK_N, G)
    r2 = quads(tl.load(at + 2 * stride_n, mask=mask, other=0), BLOCK_N, G)
    r3 = quads(tl.load(at + 3 * stride_n, mask=mask, other=0), BLOCK_N, G)
    s0 = _pair_sums(r0[0], r0[1], r0[2], r0[3], FLOAT, SUM)
    s1 = _pair_sums(r1[0], r1[1], r1[2], r1[3], FLOAT, SUM)
    s2 = _pair_sums(r2[0], r2[1], r2[2], r2[3], FLOAT, SUM)
    s3 = _pair_sums(r3[0], r3[1], r3[2], r3[3], FLOAT, SUM)
    best = tl.full([BLOCK_N, G], -1, SUM)
    keep = tl.zeros([BLOCK_N, G], tl.int32)
    for i in tl.static_range(90):
        # Rounded pair by pair, as the reference does.
        score = (s0[_MASKS[i][0]] + s1[_MASKS[i][1]]) + (s2[_MASKS[i][2]] + s3[_MASKS[i][3]])
        keep = tl.where(score > best, _BITS[i], keep)
        best = tl.maximum(score, best)
    rows = (r0, r1, r2, r3)
    for r in tl.static_range(4):
        e0 = _where_bit(keep, 4 * r, rows[r][0], SIGN_CLEARED)
        e1 = _where_bit(keep, 4 * r + 1, rows[r][1], SIGN_CLEARED)
        e2 = _where_bit(keep, 4 * r + 2, rows[r][2], SIGN_CLEARED)
        e3 = _where_bit(keep, 4 * r + 3, rows[r][3], SIGN_CLEARED)
        tile = from_quads(e0, e1, e2, e3, BLOCK_N, G)
        tl.store(out + (4 * n + r) * K + k, tile, mask=mask)


@triton.jit
def _where_bit(keep, bit: tl.constexpr, x, SIGN_CLEARED: tl.constexpr):
    """x, canonical, where the bit of keep is set, else zero."""
    x = _canonical(x, SIGN_CLEARED)
    return tl.where((keep >> bit & 1) != 0, x, tl.zeros_like(x))


# ---- launchers ----

# One tile for all: 16 bytes a thread and load in every dtype. 16 rows of 8 bytes an element spill nowhere.
_CONFIGS = [{"BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 8, "enable_fp_fusion": True}]
# Sixteen elements and 24 sums a group: registers for two groups a thread, of 8 bytes an element for one.
_TRANSPOSABLE_CONFIGS = [
    {"BLOCK_N": 8, "BLOCK_K": 256, "num_warps": 8, "enable_fp_fusion": True},
    {"BLOCK_N": 4, "BLOCK_K": 128, "num_warps": 4, "enable_fp_fusion": True},
]

_FLOATS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


def words(t: Tensor) -> Tensor:
    """What the kernels load: integers of the same size; 8-bit integers as they are, for their sign counts."""
    return bits(t) if t.dtype.is_floating_point else t


def sign_cleared(dtype: torch.dtype) -> int:
    """The mask that clears the sign of a float's bits; 0 for integers."""
    return (1 << 8 * dtype.itemsize - 1) - 1 if dtype.is_floating_point else 0


def with_rows(t: Tensor) -> Tensor:
    """t [N, C], copied only if its rows do not lie in one piece."""
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def _grid(N: int, K: int, config: dict) -> tuple[int]:
    return (triton.cdiv(N, config["BLOCK_N"]) * triton.cdiv(K, config["BLOCK_K"]),)


def prune_24(weight: Tensor) -> Tensor:
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    rows, (config,) = rows_of(weight), _CONFIGS
    N, K = rows.shape
    if out.numel():
        _prune_24[_grid(N, K, config)](
            words(rows), words(out), N, K, *rows.stride(), sign_cleared(weight.dtype), **config
        )
    return out


def pack_24(weight: Tensor) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    values = weight.new_empty(N, K // 2)
    meta = weight.new_empty((N, (K + 7) // 8), dtype=torch.uint8)
    (config,) = _CONFIGS
    if values.numel():
        _pack_24[_grid(N, K, config)](
            words(weight),
            words(values),
            meta,
            N,
            K,
            *weight.stride(),
            sign_cleared(weight.dtype),
            **config,
        )
    return values, meta


def unpack_24(values: Tensor, meta: Tensor) -> Tensor:
    N, K = values.shape[0], 2 * values.shape[1]
    dense = values.new_empty(N, K)
    values, meta, (config,) = with_rows(values), with_rows(meta), _CONFIGS
    if dense.numel():
        _unpack_24[_grid(N, K, config)](
            words(values), meta, words(dense), N, K, values.stride(0), meta.stride(0), **config
        )
    return dense


def gather_24(dense: Tensor, meta: Tensor) -> Tensor:
    N, K = dense.shape
    values = dense.new_empty(N, K // 2)
    meta, (config,) = with_rows(meta), _CONFIGS
    if values.numel():
        _gather_24[_grid(N, K, config)](
            words(dense), meta, words(values), N, K, *dense.stride(), meta.stride(0), **config
        )
    return values


def prune_24_transposable(weight: Tensor) -> Tensor:
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    N, K = weight.shape
    config = _TRANSPOSABLE_CONFIGS[weight.element_size() == 8]
    if out.numel():
        _prune_24_transposable[_grid(N // 4, K, config)](
            words(weight),
            words(out),
            N,
            K,
            *weight.stride(),
            _FLOATS[weight.dtype],
            tl.float64 if weight.dtype is torch.float64 else tl.float32,
            sign_cleared(weight.dtype),
            **config,
        )
    return out
