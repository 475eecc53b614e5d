"""linear_24 on a GPU against cuBLAS, cuSPARSELt and CUTLASS: decode with a cold cache, and large M."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsekern as sk
from sparsekern import backends
from sparsekern.bench.session import error_ratio
from sparsekern.bench.shapes import MODELS

from .timing import Clock, captured, rows

DECODE = (1, 8, 16, 32, 64)
LARGE = ((4096, 4096, 4096), (8192, 8192, 8192), (4096, 28672, 4096))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def available(op: str, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """Our back ends that serve the op here, by name."""
    found = {}
    for name in backends.order(device.type):
        if name == "reference":
            continue
        module = backends.load(name)
        if module.unavailable(device) is None and dtype in module.SERVES.get(op, ()):
            found[name] = module
    return found


def semi_structured(weight: Tensor) -> Iterator[tuple[str, object]]:
    """PyTorch's own: cuSPARSELt with its best algorithm, and CUTLASS. (name, call(x)) or (name, why not)."""
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    try:
        compressed = torch._cslt_compress(weight)

        def cusparselt(x: Tensor, best: dict = {}) -> Tensor:  # noqa: B006 - the algorithm found, by shape
            if x.shape not in best:
                best[x.shape] = torch._cslt_sparse_mm_search(compressed, x.t())
            return torch._cslt_sparse_mm(compressed, x.t(), alg_id=best[x.shape]).t()

        yield "cuSPARSELt", cusparselt
    except (RuntimeError, AttributeError) as error:
        yield "cuSPARSELt", str(error).splitlines()[0]
    try:
        cutlass = SparseSemiStructuredTensorCUTLASS.from_dense(weight)
        yield "CUTLASS", lambda x: F.linear(x, cutlass)
    except (RuntimeError, NotImplementedError) as error:
        yield "CUTLASS", str(error).splitlines()[0]


def measure(device: torch.device, seconds: float, quick: bool) -> dict:
    """Rows of every case, and what was missing."""
    clock = Clock(device, 1 << 20 if quick else 256 << 20)
    cases = [("bf16", m, *nk, True) for nk in MODELS["llama3-8b"].values() for m in DECODE]
    cases += [("bf16", m, *nk, True) for nk in MODELS["qwen2.5-7b"].values() for m in (1, 16, 64)]
    cases += [("bf16", *shape, False) for shape in LARGE]
    cases += [("fp16", 16, 4096, 14336, True), ("fp32", 16, 4096, 14336, True)]
    if quick:
        cases = [
            ("bf16", 1, 256, 512, True),
            ("fp32", 16, 256, 512, True),
            ("bf16", 64, 256, 256, False),
        ]
    found, missing, each = [], {}, seconds / len(cases)
    for dtype, m, n, k, cold in cases:
        found += _case(clock, dtype, m, n, k, cold, each, missing)
    return {"rows": found, "missing": missing}


def _case(
    clock: Clock, dtype: str, m: int, n: int, k: int, cold: bool, seconds: float, missing: dict
):
    device, kind = clock.device, DTYPES[dtype]
    weight = sk.prune_24(torch.randn(n, k, device=device, dtype=kind))
    x = torch.randn(m, k, device=device, dtype=kind)
    values, meta = sk.pack_24(weight)
    sides = {"cuBLAS": lambda: F.linear(x, weight)}
    for name, module in available("linear_24", kind, device).items():
        sides[name] = lambda f=module.linear_24: f(x, values, meta, None, "none")
        if kind in module.SERVES.get("linear_24_prepacked", ()):
            packed = module.prepack_24(values, meta)
            sides[f"{name}, prepacked"] = lambda f=module.linear_24_prepacked, p=packed: f(
                x, p, n, None, "none"
            )
    if device.type == "cuda" and kind is not torch.float32:
        for name, call in semi_structured(weight):
            if callable(call):
                sides[name] = lambda f=call: f(x)
            else:
                missing[name] = call
    errors = {}
    exact, dense = F.linear(x[:64].double(), weight.double()), F.linear(x[:64], weight)
    for name in list(sides):
        try:
            errors[name] = error_ratio(sides[name]()[:64], dense, exact)
            if device.type == "cuda":
                sides[name] = captured(sides[name])
        except (
            RuntimeError
        ) as error:  # a peer that does not take this shape, or that cannot be captured
            missing[f"{name} at {m} x {n} x {k} {dtype}"] = str(error).splitlines()[0]
            if name not in errors:
                del sides[name]
    samples = clock.interleave(sides, rounds=50, seconds=seconds, cold=cold)
    item = kind.itemsize
    packed_bytes = values.nbytes + meta.nbytes + (m * k + m * n) * item
    nbytes = {name: packed_bytes for name in sides} | {"cuBLAS": (n * k + m * k + m * n) * item}
    case = {
        "op": "linear_24",
        "dtype": dtype,
        "M": m,
        "N": n,
        "K": k,
        "cache": "cold" if cold else "warm",
    }
    for row in rows(case, samples, "cuBLAS", nbytes, 2 * m * n * k):
        yield {**row, "error": errors.get(row["side"])}
