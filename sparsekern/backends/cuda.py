"""The CUDA back end: torch tensors to addresses for ``csrc/cuda``. No arithmetic here.

What is launched is described in ``cuda_launch.py``, who launches it is a machine of ``cuda_machine.py``. Work goes
to torch's current stream, nothing waits for the device (but for ``pack_zvc`` and ``unpack_zvc``, whose results depend
on what it found), and all memory comes from torch, so that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..ops import ACTIVATIONS, FORMAT_DTYPES, ZVC_DTYPES
from ..reference import rows_of
from . import allows_tf32
from . import cuda_launch as plan
from .cuda_machine import machine, unavailable

__all__ = ["SERVES", "unavailable"]

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


# ---- 2:4 formats ----


def prune_24(weight: Tensor) -> Tensor:
    weight = weight.contiguous()
    out = torch.empty_like(weight)
    if weight.numel():
        rows = rows_of(weight)
        machine(weight.device).run(
            plan.format_24(
                "prune_24", weight.dtype, *rows.shape, dense=rows.data_ptr(), out=out.data_ptr()
            )
        )
    return out


def prune_24_transposable(weight: Tensor) -> Tensor:
    weight = weight.contiguous()
    out = torch.empty_like(weight)
    if weight.numel():
        machine(weight.device).run(
            plan.prune_24_transposable(
                weight.dtype, *weight.shape, weight.data_ptr(), out.data_ptr()
            )
        )
    return out


def pack_24(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.contiguous()
    N, K = weight.shape
    values = weight.new_empty(N, K // 2)
    meta = weight.new_empty((N, (K + 7) // 8), dtype=torch.uint8)
    if weight.numel():
        machine(weight.device).run(
            plan.format_24(
                "pack_24",
                weight.dtype,
                N,
                K,
                dense=weight.data_ptr(),
                out=values.data_ptr(),
                out_meta=meta.data_ptr(),
            )
        )
    return values, meta


def unpack_24(values: Tensor, meta: Tensor) -> Tensor:
    values, meta = values.contiguous(), meta.contiguous()
    N, K = values.shape[0], 2 * values.shape[1]
    dense = values.new_empty(N, K)
    if dense.numel():
        machine(values.device).run(
            plan.format_24(
                "unpack_24",
                values.dtype,
                N,
                K,
                values=values.data_ptr(),
                meta=meta.data_ptr(),
                out=dense.data_ptr(),
            )
        )
    return dense


def gather_24(dense: Tensor, meta: Tensor) -> Tensor:
    dense, meta = dense.contiguous(), meta.contiguous()
    N, K = dense.shape
    values = dense.new_empty(N, K // 2)
    if values.numel():
        machine(dense.device).run(
            plan.format_24(
                "gather_24",
                dense.dtype,
                N,
                K,
                dense=dense.data_ptr(),
                meta=meta.data_ptr(),
                out=values.data_ptr(),
            )
        )
    return values


# ---- 2:4 products ----


def linear_24(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    values, meta = values.contiguous(), meta.contiguous()
    weight = {"values": values.data_ptr(), "meta": meta.data_ptr()}
    return _linear_24(x, values.shape[0], bias, activation, **weight)


def prepack_24(values: Tensor, meta: Tensor) -> Tensor:
    values, meta = values.contiguous(), meta.contiguous()
    N, K = values.shape[0], 2 * values.shape[1]
    if not plan.has_prepacked_layout(values.dtype, N, K):
        return reference.prepack_24(values, meta)
    packed = meta.new_empty(values.nbytes + meta.nbytes)
    pointers = values.data_ptr(), meta.data_ptr(), packed.data_ptr()
    machine(values.device).run(plan.prepack_24(False, N, K, *pointers))
    return packed


def unprepack_24(packed: Tensor, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if not plan.has_prepacked_layout(dtype, N, K):
        return reference.unprepack_24(packed, N, K, dtype)
    packed = packed.contiguous()
    values, meta = packed.new_empty((N, K // 2), dtype=dtype), packed.new_empty(N, K // 8)
    pointers = values.data_ptr(), meta.data_ptr(), packed.data_ptr()
    machine(packed.device).run(plan.prepack_24(True, N, K, *pointers))
    return values, meta


def linear_24_prepacked(
    x: Tensor, packed: Tensor, N: int, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    K = x.shape[-1]
    if not plan.has_prepacked_layout(x.dtype, N, K):
        return linear_24(x, *reference.split_packed(packed, N, K, x.dtype), bias, activation)
    packed = packed.contiguous()
    if packed.data_ptr() % 16:
        packed = packed.clone()
    if plan.takes_x_by(x.data_ptr(), 0, x.stride(-1)) < 16 or any(s % 8 for s in x.stride()[:-1]):
        x = x.clone(memory_format=torch.contiguous_format)
    return _linear_24(x, N, bias, activation, packed=packed.data_ptr())


def _linear_24(x: Tensor, N: int, bias: Tensor | None, activation: str, **weight: int) -> Tensor:
    rows, y = rows_of(x), x.new_empty((*x.shape[:-1], N))
    M, K = rows.shape
    if y.numel() == 0:
        return y
    if bias is not None:
        bias = bias.contiguous()
    operands = plan.Operands(
        M,
        N,
        K,
        x=rows.data_ptr(),
        x_stride=rows.stride(0),
        x_step=rows.stride(1),
        bias=0 if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        activation=_ACTIVATION[activation],
        **weight,
    )
    here = machine(x.device)
    if plan.takes_decode(x.dtype, operands):
        cut = plan.cut_decode(here.device, x.dtype, M, N, K)
        several = cut.splits > 1
        partial = x.new_empty((cut.splits, M, N), dtype=torch.float32) if several else None
        address = partial.data_ptr() if several else 0
        for launch in plan.linear_24_decode(x.dtype, operands, cut, address):
            here.run(launch)
    else:
        here.run(plan.linear_24_many_rows(here.device, x.dtype, operands, allows_tf32(x.dtype)))
    return y


def _strided(rows: Tensor) -> tuple[int, int, int]:
    return rows.data_ptr(), *rows.stride()


def linear_24_dx(dy: Tensor, values: Tensor, meta: Tensor) -> Tensor:
    values, meta = values.contiguous(), meta.contiguous()
    N, K = values.shape[0], 2 * values.shape[1]
    rows, dx = rows_of(dy), dy.new_empty(*dy.shape[:-1], K)
    if dx.numel():
        machine(dy.device).run(
            plan.linear_24_gradient(
                "linear_24_dx",
                dy.dtype,
                rows.shape[0],
                N,
                K,
                dy=_strided(rows),
                values=values.data_ptr(),
                meta=meta.data_ptr(),
                out=dx.data_ptr(),
            )
        )
    return dx


def linear_24_dvalues(dy: Tensor, x: Tensor, meta: Tensor) -> Tensor:
    dy, x, meta = rows_of(dy), rows_of(x), meta.contiguous()
    (M, N), K = dy.shape, x.shape[1]
    dvalues = x.new_empty(N, K // 2)
    if dvalues.numel():
        machine(dy.device).run(
            plan.linear_24_gradient(
                "linear_24_dvalues",
                x.dtype,
                M,
                N,
                K,
                dy=_strided(dy),
                x=_strided(x),
                meta=meta.data_ptr(),
                out=dvalues.data_ptr(),
            )
        )
    return dvalues


# ---- zero-value compression ----


def pack_zvc(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = x.numel()
    mask = x.new_empty((n + 7) // 8, dtype=torch.uint8)
    offsets = x.new_empty((n + plan.ZVC_TILE - 1) // plan.ZVC_TILE, dtype=torch.int64)
    room, count = x.new_empty(n), x.new_empty(1, dtype=torch.int64)
    pack_zvc_out(x, mask, room, offsets, count)
    length = int(count)  # the one wait for the device
    # A copy: values' storage must be no larger than they are.
    return mask, room if length == n else room[:length].clone(), offsets


def pack_zvc_out(x: Tensor, mask: Tensor, values: Tensor, offsets: Tensor, count: Tensor) -> None:
    x = x.contiguous()
    count.zero_()
    state = None
    if torch.are_deterministic_algorithms_enabled():
        state = torch.zeros(1 + offsets.numel(), dtype=torch.int64, device=x.device)
    if x.numel():
        machine(x.device).run(
            plan.pack_zvc(
                x.element_size(),
                x.numel(),
                values.numel(),
                x=x.data_ptr(),
                mask=mask.data_ptr(),
                values=values.data_ptr(),
                offsets=offsets.data_ptr(),
                count=count.data_ptr(),
                state=0 if state is None else state.data_ptr(),
            )
        )


def unpack_zvc(mask: Tensor, values: Tensor, offsets: Tensor, size: list[int]) -> Tensor:
    mask, values, offsets = mask.contiguous(), values.contiguous(), offsets.contiguous()
    x = values.new_empty(size)
    capturing = values.is_cuda and torch.cuda.is_current_stream_capturing()
    if x.numel() == 0:
        return x if capturing else reference.unpack_zvc(mask, values, offsets, size)
    check = torch.zeros(2, dtype=torch.int64, device=values.device)
    machine(values.device).run(
        plan.unpack_zvc(
            values.element_size(),
            x.numel(),
            values.numel(),
            mask=mask.data_ptr(),
            values=values.data_ptr(),
            offsets=offsets.data_ptr(),
            x=x.data_ptr(),
            check=check.data_ptr(),
        )
    )
    # Reads inside what there is, whatever the stream says. That it was honest is known when the device is done; in a
    # graph, which cannot wait, nobody asks.
    if not capturing and bool(check.any()):
        reference.unpack_zvc(mask, values, offsets, size)  # raises, with the reason
        raise ValueError("unpack_zvc: offsets overlap or leave a gap")
    return x
