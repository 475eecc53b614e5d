"""What is bounded by memory on a GPU: the formats and zero-value compression, against copying the tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import available
from .timing import Clock, rows

SHAPE = (8192, 8192)
ZVC_BYTES = 256 << 20


def zeros(n: int, density: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.randn(n, device=device).to(dtype)
    return x.masked_fill_(torch.rand(n, device=device) >= density, 0)


def measure(device: torch.device, seconds: float, quick: bool) -> dict:
    """Rows of every case. A side's GB/s count what it reads and writes; the copy's, both ways."""
    clock = Clock(device, 1 << 20 if quick else 256 << 20)
    shape, zvc_bytes = ((64, 128), 1 << 16) if quick else (SHAPE, ZVC_BYTES)
    found, each = [], seconds / 16
    for dtype in ("bf16", "fp32"):
        kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        weight = torch.randn(shape, device=device).to(kind)
        for name, module in available("pack_24", kind, device).items():
            values, meta = module.pack_24(weight)
            packed = values.nbytes + meta.nbytes
            ops = {
                "prune_24": (lambda m=module, w=weight: m.prune_24(w), 2 * weight.nbytes),
                "pack_24": (lambda m=module, w=weight: m.pack_24(w), weight.nbytes + packed),
                "unpack_24": (
                    lambda m=module, v=values, t=meta: m.unpack_24(v, t),
                    weight.nbytes + packed,
                ),
                "prune_24_transposable": (
                    lambda m=module, w=weight: m.prune_24_transposable(w),
                    2 * weight.nbytes,
                ),
            }
            for op, (call, nbytes) in ops.items():
                found += _against_copy(clock, op, dtype, name, call, weight, nbytes, each)
        for density in (0.5, 0.1):
            x = zeros(zvc_bytes // kind.itemsize, density, kind, device)
            for name, module in available("pack_zvc_out", kind, device).items():
                mask, values, offsets = module.pack_zvc(x)
                out = [mask.clone(), torch.empty_like(x), offsets.clone()]
                out.append(torch.zeros(1, dtype=torch.int64, device=device))
                packed = mask.nbytes + values.nbytes + offsets.nbytes
                size = list(x.shape)
                calls = {
                    "pack_zvc_out": lambda m=module, x=x, a=out: m.pack_zvc_out(x, *a),
                    "unpack_zvc": lambda m=module, a=(mask, values, offsets), s=size: m.unpack_zvc(
                        *a, s
                    ),
                }
                for op, call in calls.items():
                    rows_of = _against_copy(
                        clock, op, dtype, name, call, x, x.nbytes + packed, each
                    )
                    found += [
                        {**row, "density": density, "input GB/s": x.nbytes / row["ms"] / 1e6}
                        for row in rows_of
                    ]
    return {"rows": found, "missing": {}}


def _against_copy(
    clock, op, dtype, name, call, x: Tensor, nbytes: int, seconds: float
) -> list[dict]:
    target = torch.empty_like(x)
    samples = clock.interleave(
        {"copy": lambda: target.copy_(x), name: call}, rounds=30, seconds=seconds, cold=True
    )
    case = {"op": op, "dtype": dtype, "MB": x.nbytes / 1e6}
    return rows(case, samples, "copy", {"copy": 2 * x.nbytes, name: nbytes})
