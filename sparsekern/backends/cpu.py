"""The compiled CPU back end: torch tensors to addresses for ``csrc/cpu``. No arithmetic here.

The instruction set is chosen by CPU feature; ``SPARSEKERN_CPU_ISA`` overrides (portable, avx2,
avx512, avx512_bf16, amx).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys

import torch
from torch import Tensor

from ..ops import ACTIVATIONS, FORMAT_DTYPES, ZVC_DTYPES
from ..reference import rows_of

try:
    from .. import _cpu

    _missing = None
except ImportError as error:
    _cpu = None
    _missing = (
        f"sparsekern was installed without its compiled core ({error}); "
        "install a C++17 compiler and reinstall"
    )

# Codes of csrc/layout.h's DType and Activation.
_DTYPE = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float64: 3,
    torch.int8: 4,
    torch.uint8: 5,
}
_ACTIVATION = {name: code for code, name in enumerate(ACTIVATIONS)}

_PRODUCTS = frozenset({torch.float32, torch.float16, torch.bfloat16})
SERVES = {
    "prune_24": FORMAT_DTYPES,
    "prune_24_transposable": FORMAT_DTYPES,
    "pack_24": FORMAT_DTYPES,
    "unpack_24": FORMAT_DTYPES,
    "gather_24": FORMAT_DTYPES,
    "linear_24": _PRODUCTS,
    "linear_24_dx": _PRODUCTS,
    "linear_24_dvalues": _PRODUCTS,
    "prepack_24": _PRODUCTS,
    "unprepack_24": _PRODUCTS,
    "linear_24_prepacked": _PRODUCTS,
    "pack_zvc": ZVC_DTYPES,
    "pack_zvc_out": ZVC_DTYPES,
    "unpack_zvc": ZVC_DTYPES,
}


def unavailable(device: torch.device) -> str | None:
    return _missing


def isa() -> str:
    """The instruction-set tier in use."""
    return _cpu.isa()


def isas() -> list[str]:
    """The tiers this build and CPU can run, best first."""
    return _cpu.isas()


def sanitized() -> bool:
    """Whether the core was built with the address sanitizer."""
    return _cpu.sanitized()


def set_isa(name: str) -> None:
    """Switch the tier for the whole process. For tests and measurements."""
    if not _cpu.set_isa(name):
        here = ", ".join(_cpu.isas())
        raise ValueError(f"SPARSEKERN_CPU_ISA is {name!r}; this machine takes one of {here}")


if _cpu is not None and os.environ.get("SPARSEKERN_CPU_ISA"):
    set_isa(os.environ["SPARSEKERN_CPU_ISA"])

_threads = torch.get_num_threads


# ---- 2:4 formats ----


def _map_24(kernel, weight: Tensor) -> Tensor:
    weight = weight.contiguous()
    out = torch.empty_like(weight)
    K = weight.shape[-1]
    rows = weight.numel() // K if K else 0
    kernel(weight.data_ptr(), out.data_ptr(), rows, K, _DTYPE[weight.dtype], _threads())
    return out


def prune_24(weight: Tensor) -> Tensor:
    return _map_24(_cpu.prune_24, weight)


def prune_24_transposable(weight: Tensor) -> Tensor:
    return _map_24(_cpu.prune_24_transposable, weight)


def pack_24(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.contiguous()
    N, K = weight.shape
    values, meta = (
        weight.new_empty(N, K // 2),
        weight.new_empty((N, (K + 7) // 8), dtype=torch.uint8),
    )
    _cpu.pack_24(
        weight.data_ptr(),
        values.data_ptr(),
        meta.data_ptr(),
        N,
        K,
        _DTYPE[weight.dtype],
        _threads(),
    )
    return values, meta


def unpack_24(values: Tensor, meta: Tensor) -> Tensor:
    values, meta = values.contiguous(), meta.contiguous()
    N, K = values.shape[0], 2 * values.shape[1]
    dense = values.new_empty(N, K)
    _cpu.unpack_24(
        values.data_ptr(), meta.data_ptr(), dense.data_ptr(), N, K, _DTYPE[values.dtype], _threads()
    )
    return dense


def gather_24(dense: Tensor, meta: Tensor) -> Tensor:
    dense, meta = dense.contiguous(), meta.contiguous()
    N, K = dense.shape
    values = dense.new_empty(N, K // 2)
    _cpu.gather_24(
        dense.data_ptr(), meta.data_ptr(), values.data_ptr(), N, K, _DTYPE[dense.dtype], _threads()
    )
    return values


# ---- 2:4 products ----


def linear_24(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    # Names hold what may be a copy until the kernel returns.
    values, meta = values.contiguous(), meta.contiguous()
    return _linear_24(x, values.data_ptr(), meta.data_ptr(), 0, values.shape[0], bias, activation)


def prepack_24(values: Tensor, meta: Tensor) -> Tensor:
    values, meta = values.contiguous(), meta.contiguous()
    N, K = values.shape[0], 2 * values.shape[1]
    packed = meta.new_empty(values.nbytes + meta.nbytes)
    _cpu.prepack_24(
        values.data_ptr(),
        meta.data_ptr(),
        packed.data_ptr(),
        N,
        K,
        _DTYPE[values.dtype],
        _threads(),
    )
    return packed


def unprepack_24(packed: Tensor, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    packed = packed.contiguous()
    values, meta = packed.new_empty((N, K // 2), dtype=dtype), packed.new_empty(N, (K + 7) // 8)
    _cpu.unprepack_24(
        packed.data_ptr(), values.data_ptr(), meta.data_ptr(), N, K, _DTYPE[dtype], _threads()
    )
    return values, meta


def linear_24_prepacked(
    x: Tensor, packed: Tensor, N: int, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    packed = packed.contiguous()
    return _linear_24(x, 0, 0, packed.data_ptr(), N, bias, activation)


def _linear_24(
    x: Tensor, values: int, meta: int, packed: int, N: int, bias: Tensor | None, activation: str
) -> Tensor:
    if x.dim() == 2:
        rows, y = x, x.new_empty(x.shape[0], N)
    else:
        rows, y = rows_of(x), x.new_empty((*x.shape[:-1], N))
    M, K = rows.shape
    if bias is not None:
        bias = bias.contiguous()
    _cpu.linear_24(
        rows.data_ptr(),
        *rows.stride(),
        values,
        meta,
        packed,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        M,
        N,
        K,
        _DTYPE[x.dtype],
        _ACTIVATION[activation],
        _threads(),
    )
    return y


def linear_24_dx(dy: Tensor, values: Tensor, meta: Tensor) -> Tensor:
    values, meta = values.contiguous(), meta.contiguous()
    N, K = values.shape[0], 2 * values.shape[1]
    rows, dx = rows_of(dy), dy.new_empty(*dy.shape[:-1], K)
    _cpu.linear_24_dx(
        rows.data_ptr(),
        *rows.stride(),
        values.data_ptr(),
        meta.data_ptr(),
        dx.data_ptr(),
        rows.shape[0],
        N,
        K,
        _DTYPE[dy.dtype],
        _threads(),
    )
    return dx


def linear_24_dvalues(dy: Tensor, x: Tensor, meta: Tensor) -> Tensor:
    dy, x, meta = rows_of(dy), rows_of(x), meta.contiguous()
    (M, N), K = dy.shape, x.shape[1]
    dvalues = x.new_empty(N, K // 2)
    _cpu.linear_24_dvalues(
        dy.data_ptr(),
        *dy.stride(),
        x.data_ptr(),
        *x.stride(),
        meta.data_ptr(),
        dvalues.data_ptr(),
        M,
        N,
        K,
        _DTYPE[x.dtype],
        _threads(),
    )
    return dvalues


# ---- zero-value compression ----


# Blocks that the C library gets fresh from the system each time: 64 MB are 16384 page faults of
# 1.5 us, ten times what it takes to fill them. In pages of 2 MB they are cheap.
_ALWAYS_NEW_BYTES = 32 << 20


def _compress(x: Tensor, mask: Tensor, values: int, room: int, offsets: Tensor) -> int:
    """Fills mask, offsets and the memory at address `values`, up to `room` elements; returns the count."""
    return _cpu.zvc_compress(
        x.data_ptr(),
        x.numel(),
        x.element_size(),
        mask.data_ptr(),
        values,
        room,
        offsets.data_ptr(),
        _threads(),
    )


def pack_zvc(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    n = x.numel()
    mask = x.new_empty((n + 7) // 8, dtype=torch.uint8)
    offsets = x.new_empty((n + 4095) // 4096, dtype=torch.int64)
    # Only one pass over x says how many values there are, and their storage must be no larger:
    # torch.save writes all of it.
    if x.nbytes > _ALWAYS_NEW_BYTES and sys.platform == "linux":
        return mask, _pack_mapped(x, mask, offsets), offsets
    room = x.new_empty(n)
    count = _compress(x, mask, room.data_ptr(), n, offsets)
    if count == n:
        return mask, room, offsets
    values = x.new_empty(count)
    _cpu.copy(values.data_ptr(), room.data_ptr(), values.nbytes)
    return mask, values, offsets


def _pack_mapped(x: Tensor, mask: Tensor, offsets: Tensor) -> Tensor:
    """Room for the worst case in pages of 2 MB, of which what is not used goes back in place.

    The exception to the rule that torch allocates outputs: its memory cannot shrink. 64 MB of fp32 at 50 % zeros, one
    thread (Zen 5), in milliseconds: x.clone() 24, a copy out of room that torch allocated 19, counting first 3.8, this
    3.3; at 90 % 22, 5.3, 3.3, 2.0. Like any memory that torch did not allocate, it cannot grow either.
    """
    pages = mmap.mmap(-1, x.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    # The tensor of the whole must be gone before resize: pages that are in use cannot change.
    address = torch.frombuffer(pages, dtype=torch.uint8).data_ptr()
    count = _compress(x, mask, address, x.numel(), offsets)
    if count == 0:
        return x.new_empty(0)
    pages.resize(count * x.element_size())
    return torch.frombuffer(pages, dtype=torch.uint8).view(x.dtype)


def pack_zvc_out(x: Tensor, mask: Tensor, values: Tensor, offsets: Tensor, count: Tensor) -> None:
    x = x.contiguous()
    count.fill_(_compress(x, mask, values.data_ptr(), values.numel(), offsets))


def unpack_zvc(mask: Tensor, values: Tensor, offsets: Tensor, size: list[int]) -> Tensor:
    mask, values, offsets = mask.contiguous(), values.contiguous(), offsets.contiguous()
    out = values.new_empty(size)
    if out.nbytes > _ALWAYS_NEW_BYTES:
        _cpu.huge_pages(out.data_ptr(), out.nbytes)
    if error := _cpu.zvc_expand(
        mask.data_ptr(),
        values.data_ptr(),
        values.numel(),
        offsets.data_ptr(),
        out.numel(),
        values.element_size(),
        out.data_ptr(),
        _threads(),
    ):
        raise ValueError(f"unpack_zvc: {error}")
    return out
