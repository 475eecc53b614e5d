"""The CUDA back end: torch tensors to addresses for ``csrc/cuda``. No arithmetic here.

What is launched is described in ``cuda_launch.py``, who launches it is a machine of ``cuda_machine.py``. Work goes
to torch's current stream, nothing waits for the device (but for ``pack_zvc`` and ``unpack_zvc``, whose results depend
on what it found), and all memory comes from torch, so that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..ops import FORMAT_DTYPES, ZVC_DTYPES
from ..reference import rows_of
from . import cuda_launch as plan
from .cuda_machine import machine, unavailable

__all__ = ["SERVES", "unavailable"]

SERVES = {
    "prune_24": FORMAT_DTYPES,
    "prune_24_transposable": FORMAT_DTYPES,
    "pack_24": FORMAT_DTYPES,
    "unpack_24": FORMAT_DTYPES,
    "gather_24": FORMAT_DTYPES,
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
    if x.numel() == 0:
        return reference.unpack_zvc(mask, values, offsets, size)
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
    capturing = values.is_cuda and torch.cuda.is_current_stream_capturing()
    if not capturing and bool(check.any()):
        reference.unpack_zvc(mask, values, offsets, size)  # raises, with the reason
        raise ValueError("unpack_zvc: offsets overlap or leave a gap")
    return x
