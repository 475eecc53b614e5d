"""What the CUDA back end launches: kernel, grid, block, shared memory and arguments, each described here, once.

Three carry it out, all from the same ``csrc/cuda/*.cu``: the module that nvcc built, NVRTC at first use
(both in ``cuda_machine.py``), and the execution on the CPU of ``tests/cuda_on_cpu``. The benchmark's model
(``benchmarks/cuda_model.py``) reads the same descriptions.

A kernel takes one struct. Its fields are packed here in the order in which the ``.cu`` file declares them;
who launches compares the sizes.
"""

from __future__ import annotations

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
