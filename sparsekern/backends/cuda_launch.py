"""What the CUDA back end launches: kernel, grid, block, shared memory and arguments, each described here, once.

Three carry it out, all from the same ``csrc/cuda/*.cu``: the module that nvcc built, NVRTC at first use
(both in ``cuda_machine.py``), and the execution on the CPU of ``tests/cuda_on_cpu``. The benchmark's model
(``benchmarks/cuda_model.py``) reads the same descriptions.

A kernel takes one struct. Its fields are packed here in the order in which the ``.cu`` file declares them;
who launches compares the sizes.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import torch

from ..reference import ZVC_TILE


@dataclass(frozen=True)
class Launch:
    """One launch. `kernel` is the template-id as ``SPARSEKERN_KERNEL`` spells it; `source` the file it is in."""

    source: str
    kernel: str
    grid: tuple[int, int, int]
    block: int  # threads, a multiple of 32
    shared: int  # bytes of dynamic shared memory; exactly what the kernel's struct takes
    arguments: bytes


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of the device."""

    multiprocessors: int
    shared_per_block: int  # bytes a block may have
    shared_per_multiprocessor: int


H100 = Device(132, 227 << 10, 228 << 10)  # what is said where there is no device


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def pack(form: str, *fields: int) -> bytes:
    """Fields as a C struct holds them, its padding included."""
    return struct.pack(f"@{form}0q", *fields)


WORD = {1: "uint8_t", 2: "uint16_t", 4: "uint32_t", 8: "uint64_t"}
_DTYPE = {
    torch.float32: "DType::f32",
    torch.float16: "DType::f16",
    torch.bfloat16: "DType::bf16",
    torch.float64: "DType::f64",
    torch.int8: "DType::i8",
    torch.uint8: "DType::u8",
}
_KIND = {torch.int8: "kSigned", torch.uint8: "kUnsigned"}  # of magnitude; floats: kFloat


# ---- 2:4 formats ----


def format_24(
    op: str,
    dtype: torch.dtype,
    rows: int,
    K: int,
    *,
    dense: int = 0,
    values: int = 0,
    meta: int = 0,
    out: int,
    out_meta: int = 0,
) -> Launch:
    """``prune_24``, ``pack_24``, ``unpack_24`` or ``gather_24`` of ``[rows, K]`` at these addresses."""
    word = WORD[dtype.itemsize]
    compares = op in ("prune_24", "pack_24")
    kernel = f"{op}<{word}, {_KIND.get(dtype, 'kFloat')}>" if compares else f"{op}<{word}>"
    # A thread's eight elements, or four kept ones, move as vectors of 16 bytes or of all they are.
    dense_side = [dense, out] if op == "prune_24" else [out] if op == "unpack_24" else [dense]
    packed_side = {"pack_24": [out], "unpack_24": [values], "gather_24": [out]}.get(op, [])
    vectors = (
        K % 8 == 0
        and all(p % min(16, 8 * dtype.itemsize) == 0 for p in dense_side)
        and all(p % min(16, 4 * dtype.itemsize) == 0 for p in packed_side)
    )
    chunks = rows * ceil_div(K, 8)
    return Launch(
        "format_24",
        kernel,
        (ceil_div(chunks, 256), 1, 1),
        256,
        0,
        pack("QQQQQqqq", dense, values, meta, out, out_meta, rows, K, vectors),
    )


def prune_24_transposable(dtype: torch.dtype, N: int, K: int, weight: int, out: int) -> Launch:
    tiles = (N // 4) * (K // 4)
    vectors = (weight | out) % min(16, 4 * dtype.itemsize) == 0
    return Launch(
        "tiles_24",
        f"prune_24_transposable<{_DTYPE[dtype]}>",
        (ceil_div(tiles, 128), 1, 1),
        128,
        0,
        pack("QQqqqq", weight, out, K // 4, tiles, K, vectors),
    )


# ---- zero-value compression ----


def _zvc_shared(itemsize: int) -> int:
    stage = (ZVC_TILE + 16 // itemsize) * itemsize
    return ceil_div(stage + 8 * 4 + 8 + 4, 16) * 16


def pack_zvc(
    itemsize: int,
    n: int,
    room: int,
    *,
    x: int,
    mask: int,
    values: int,
    offsets: int,
    count: int,
    state: int,
) -> Launch:
    """`state` is the address of ``1 + tiles`` zeros, for tiles in order, or 0."""
    return Launch(
        "zvc",
        f"pack_zvc<{WORD[itemsize]}, {'true' if state else 'false'}>",
        (ceil_div(n, ZVC_TILE), 1, 1),
        256,
        _zvc_shared(itemsize),
        pack("QQQQQQqqq", x, mask, values, offsets, count, state, n, room, x % 16 == 0),
    )


def unpack_zvc(
    itemsize: int,
    n: int,
    length: int,
    *,
    mask: int,
    values: int,
    offsets: int,
    x: int,
    check: int,
) -> Launch:
    return Launch(
        "zvc",
        f"unpack_zvc<{WORD[itemsize]}>",
        (ceil_div(n, ZVC_TILE), 1, 1),
        256,
        _zvc_shared(itemsize),
        pack("QQQQQqqq", mask, values, offsets, x, check, n, length, x % 16 == 0),
    )


# ---- 2:4 products ----


@dataclass(frozen=True)
class Operands:
    """Addresses and strides of ``y = activation(x · Wᵀ + bias)``; W is `values` and `meta`, or `packed`."""

    M: int
    N: int
    K: int
    x: int
    x_stride: int  # elements from row to row
    x_step: int  # from k to k
    values: int = 0
    meta: int = 0
    packed: int = 0
    bias: int = 0
    y: int = 0
    activation: int = 0


def has_prepacked_layout(dtype: torch.dtype, N: int, K: int) -> bool:
    """Whether prepacking is more than the identity."""
    return dtype.itemsize == 2 and N % 16 == 0 and K % 64 == 0 and N > 0 and K > 0


def takes_x_by(x: int, x_stride: int, x_step: int, itemsize: int = 2) -> int:
    """The largest of 16, 8, 4 and 2 bytes in which rows of x may be copied; one element where k is strided."""
    if x_step != 1:
        return itemsize
    return next(n for n in (16, 8, 4, 2) if x % n == 0 and itemsize * x_stride % n == 0)


def prepack_24(back: bool, N: int, K: int, values: int, meta: int, packed: int) -> Launch:
    """To the layout of ``linear_24.cuh``, or `back` from it."""
    packed_meta = packed + N * K
    fields = (packed, packed_meta, values, meta) if back else (values, meta, packed, packed_meta)
    return Launch(
        "prepack_24",
        "unprepack_24" if back else "prepack_24",
        (ceil_div(N // 16 * (K // 64) * 32, 256), 1, 1),
        256,
        0,
        pack("QQQQqqq", *fields, N, K, (values | packed) % 16 == 0),
    )


def _linear_arguments(
    o: Operands, vectors: int = 0, units: int = 0, splits: int = 1, partial: int = 0
) -> bytes:
    addresses = (o.x, o.values, o.meta, o.packed, o.bias, o.y, partial)
    sizes = (o.x_stride, o.x_step, o.M, o.N, o.K)
    return pack("QQQQQQQqqqqqiiii", *addresses, *sizes, o.activation, vectors, units, splits)


# Bytes of an element and rows of x to the blocks of the decode kernels: tokens, then features, the widest first.
_DECODE = {
    2: {8: (32,), 16: (32,), 32: (64, 32), 64: (128, 64, 32)},
    4: {4: (32,), 8: (32,), 16: (32,), 32: (32,), 64: (32,)},
}
DECODE_ROWS = 64
_UNIT = 256  # k
_OCCUPIED = 0.96  # 128 of 132: 4096 features by 32


@dataclass(frozen=True)
class Decode:
    """How a decode kernel is cut for a shape."""

    tokens: int  # of a block
    features: int
    units: int  # of 256 k, per split
    splits: int


@functools.cache
def cut_decode(device: Device, dtype: torch.dtype, M: int, N: int, K: int) -> Decode:
    """First a block for every multiprocessor, then the fewest bytes of sums, which each split but a single one writes
    and reads back in fp32; of equals the widest blocks, which pass x through the L2 less often."""
    tokens, widths = next((t, w) for t, w in _DECODE[dtype.itemsize].items() if t >= M)
    all_units = ceil_div(K, _UNIT)

    def cost(cut: Decode) -> tuple[float, int, int]:
        blocks = ceil_div(N, cut.features) * cut.splits
        return -min(blocks / device.multiprocessors, _OCCUPIED), cut.splits, -cut.features

    cuts = (
        Decode(tokens, features, units, ceil_div(all_units, units))
        for features in widths
        for units in range(1, all_units + 1)
    )
    return min(cuts, key=cost)


def takes_decode(dtype: torch.dtype, o: Operands) -> bool:
    """Whether a decode kernel takes these rows of x and this weight."""
    by = 8 if dtype.itemsize == 2 else 16
    if o.M > DECODE_ROWS or o.K == 0 or takes_x_by(o.x, o.x_stride, o.x_step, dtype.itemsize) < by:
        return False
    return bool(o.packed) or (o.K % 128 == 0 and (o.values | o.meta) % 16 == 0)


def linear_24_decode(dtype: torch.dtype, o: Operands, cut: Decode, partial: int) -> list[Launch]:
    """`partial` is the address of fp32 ``[splits, M, N]``, where there are several."""
    arguments = _linear_arguments(o, 0, cut.units, cut.splits, partial)
    if dtype.itemsize == 2:
        groups = 128 // cut.features
        part = min(4, 256 // (cut.tokens * groups))  # tiles of 64 k that a stage of x has
        stages = (3 if part == 1 else 2) * groups * cut.tokens * part * 128
        sums = 8 * cut.tokens * 20 * 4
        file, form = "linear_24_decode_sm80", f"{_DTYPE[dtype]}, {cut.tokens}, {groups}, "
        form += "true" if o.packed else "false"
    else:
        chunk = 128 if cut.tokens == 64 else 256
        stage = 32 * chunk * 2 + cut.tokens * chunk * 4 + 32 * chunk // 8
        stages = (3 if cut.tokens <= 16 else 2) * stage
        sums = 8 * min(cut.tokens, 32) * 33 * 4
        file, form = "linear_24_decode_fma", str(cut.tokens)
    launches = [
        Launch(
            file,
            f"{file}<{form}>",
            (ceil_div(o.N, cut.features), cut.splits, 1),
            256,
            ceil_div(max(stages, sums), 128) * 128,
            arguments,
        )
    ]
    if cut.splits > 1:
        launches.append(
            Launch(
                "linear_24_decode_sm80",
                f"linear_24_reduce<{_DTYPE[dtype]}>",
                (ceil_div(o.M * o.N, 256), 1, 1),
                256,
                0,
                arguments,
            )
        )
    return launches


def linear_24_many_rows(
    device: Device, dtype: torch.dtype, o: Operands, tf32: bool = False
) -> Launch:
    """A tensor-core kernel for any M where x, by rows, may be copied by 4 bytes at least; else, and for fp32 where tf32
    is not allowed, plain multiply-add."""
    if dtype.itemsize == 4 and tf32 and o.x_step == 1 and o.K > 0:
        return _linear_24_tf32(device, o)
    by = takes_x_by(o.x, o.x_stride, o.x_step) if dtype.itemsize == 2 else 2
    if by < 4 or o.K == 0 or (o.packed and by < 16) or (o.values % 4):
        grid = ceil_div(o.M, 64) * ceil_div(o.N, 64)
        return Launch(
            "linear_24_fma",
            f"linear_24_fma<{_DTYPE[dtype]}>",
            (grid, 1, 1),
            256,
            _FMA_SHARED,
            _linear_arguments(o),
        )
    by16 = by == 16 and o.K % 16 == 0 and o.values % 16 == 0
    access = "kPrepacked" if o.packed else "kBy16" if by16 else "kBy4"
    rows = rows_of_tile(device, o)
    vectors = (o.K % 64 == 0 and o.meta % 8 == 0) | (o.N % 8 == 0 and o.y % 16 == 0) << 1
    stage = rows * 128 + 128 * 64 + 128 * 8
    return Launch(
        "linear_24_sm80",
        f"linear_24_sm80<{_DTYPE[dtype]}, {rows}, {access}>",
        (ceil_div(o.M, rows) * ceil_div(o.N, 128), 1, 1),
        128,
        3 * stage,
        _linear_arguments(o, vectors),
    )


def rows_of_tile(device: Device, o: Operands) -> int:
    """Of x, in the tiles of the tensor-core kernels; they have 128 features."""
    blocks = ceil_div(o.M, 128) * ceil_div(o.N, 128)
    return 128 if o.M > 64 and blocks >= device.multiprocessors else 64


def _linear_24_tf32(device: Device, o: Operands) -> Launch:
    by16 = takes_x_by(o.x, o.x_stride, 1, 4) == 16 and o.K % 8 == 0 and o.values % 16 == 0
    rows = rows_of_tile(device, o)
    stages_and_w = 2 * (rows * 128 + 128 * 64 + 128 * 4) + 128 * 128
    return Launch(
        "linear_24_tf32_sm80",
        f"linear_24_tf32_sm80<{rows}, {'kBy16' if by16 else 'kBy4'}>",
        (ceil_div(o.M, rows) * ceil_div(o.N, 128), 1, 1),
        256,
        max(stages_and_w, rows * 132 * 4),
        _linear_arguments(o, o.K % 32 == 0 and o.meta % 4 == 0),
    )


def explain_linear_24(
    device: Device, dtype: torch.dtype, o: Operands, tf32: bool
) -> tuple[Launch, str]:
    """The launch that multiplies, without the sum over splits, and why it is that one."""
    if takes_decode(dtype, o):
        cut = cut_decode(device, dtype, o.M, o.N, o.K)
        launch = linear_24_decode(dtype, o, cut, 0)[0]
        blocks = launch.grid[0] * launch.grid[1]
        parts = f", K in {cut.splits} parts" if cut.splits > 1 else ""
        return launch, (
            f"at most {DECODE_ROWS} tokens, aligned: each byte of the weight is read once; {blocks} blocks of "
            f"{cut.features} features{parts} for {device.multiprocessors} multiprocessors"
        )
    launch = linear_24_many_rows(device, dtype, o, tf32)
    if o.M > DECODE_ROWS:
        why = f"more than {DECODE_ROWS} tokens"
    else:
        why = "the decode kernel wants K % 128 == 0, K > 0, aligned rows of x and an aligned weight"
    if launch.source == "linear_24_sm80":
        return launch, f"{why}: sparse tensor cores"
    if launch.source == "linear_24_tf32_sm80":
        return launch, f"{why}; torch may use tf32: dense tensor cores"
    if dtype.itemsize == 4 and not tf32:
        return launch, f"{why}; torch may not use tf32: plain multiply-add"
    return launch, f"{why}; x is not rows that can be copied: plain multiply-add"


_FMA_SHARED = 64 * 65 * 4


def linear_24_gradient(
    op: str,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    *,
    dy: tuple[int, int, int],
    x: tuple[int, int, int] = (0, 0, 1),
    values: int = 0,
    meta: int,
    out: int,
) -> Launch:
    """``linear_24_dx`` or ``linear_24_dvalues``; `dy` and `x` are address, stride and step."""
    rows = M if op == "linear_24_dx" else N
    by = min(takes_x_by(*dy), takes_x_by(*x)) if dtype.itemsize == 2 else 2
    vectors = (K % 8 == 0 and values % 8 == 0) | (K % 8 == 0 and out % 16 == 0) << 1
    if by >= 4:
        file, kernel, tile, block = "linear_24_grad_sm80", f"{op}_sm80", 128, 128
        form = f"{_DTYPE[dtype]}, {'kBy16' if by == 16 else 'kBy4'}"
        stages = (3 * 8192 + 2 * 8192) if op == "linear_24_dx" else 2 * 3 * 8192
        shared = max(stages, 34816)
    else:
        file, kernel, tile, block = "linear_24_fma", f"{op}_fma", 64, 256
        form, shared = _DTYPE[dtype], _FMA_SHARED
    fields = (dy[0], x[0], values, meta, out, *dy[1:], *x[1:], M, N, K, vectors)
    return Launch(
        file,
        f"{kernel}<{form}>",
        (ceil_div(rows, tile) * ceil_div(K, tile), 1, 1),
        block,
        shared,
        pack("QQQQQqqqqqqqq", *fields),
    )


# ---- occupancy ----

# Registers a thread may take, by the start of a kernel's name, the first that fits: what the launch bounds and the
# heads of the files promise. tests/test_cuda_compile.py holds the compilers to it.
REGISTERS = {
    "prune_24_transposable<DType::f64": 128,
    "prune_24_transposable": 72,
    "prune_24": 48,
    "pack_24": 48,
    "unpack_24": 48,
    "gather_24": 48,
    "prepack_24": 40,
    "unprepack_24": 40,
    "pack_zvc": 64,
    "unpack_zvc": 64,
    "linear_24_fma": 128,
    "linear_24_dx_fma": 128,
    "linear_24_dvalues_fma": 128,
    "linear_24_dx_sm80": 255,
    "linear_24_dvalues_sm80": 255,
    "linear_24_reduce": 40,
    "linear_24_sm80": 255,
    "linear_24_tf32_sm80": 128,
    "linear_24_decode_sm80<DType::f16, 8,": 128,
    "linear_24_decode_sm80<DType::f16, 16,": 128,
    "linear_24_decode_sm80<DType::bf16, 8,": 128,
    "linear_24_decode_sm80<DType::bf16, 16,": 128,
    "linear_24_decode_sm80": 255,
    "linear_24_decode_fma<4>": 128,
    "linear_24_decode_fma<8>": 128,
    "linear_24_decode_fma": 255,
}


def registers(launch: Launch) -> int:
    """At most, of a thread."""
    return next(n for start, n in REGISTERS.items() if launch.kernel.startswith(start))
