"""linear_24 and linear_24_prepacked beside what else there is for such a product."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsekern as sk

from .clock import Budget, Sides, copies
from .results import Peer, Row
from .session import DTYPES, WORST_ERROR, Case, Session, error_ratio, some_rows
from .shapes import Shape

DENSE = "torch"  # F.linear: cuBLAS, MKL or oneDNN underneath


class Weights:
    """Dense weights, the same pruned and packed, and prepacked, as many as are larger than the cache together."""

    def __init__(self, session: Session, N: int, K: int, dtype: torch.dtype):
        packed_bytes = N * K // 2 * dtype.itemsize + N * -(-K // 8)
        self.count = copies(packed_bytes, session.cache_bytes) if session.on_cpu else 1
        generator = torch.Generator(session.device).manual_seed(session.options.seed)
        self.dense, self.packed = [], []
        for _ in range(self.count):
            dense = torch.randn(N, K, generator=generator, device=session.device).to(dtype)
            self.packed.append(sk.pack_24(dense, prune=True))
            # Pruned: a peer may need the pattern, and no dense product looks at the values.
            self.dense.append(sk.unpack_24(*self.packed[-1]))
        self.nbytes = sum(t.nbytes for t in self.packed[0])

    @functools.cached_property
    def prepacked(self) -> list[Tensor] | None:
        """None where prepacking is the identity."""
        values, meta = self.packed[0]
        plain = torch.cat([values.view(torch.uint8).flatten(), meta.flatten()])
        if torch.equal(sk.prepack_24(values, meta), plain):
            return None
        return [sk.prepack_24(*packed) for packed in self.packed]


def cases(session: Session) -> Iterator[Case]:
    order = sorted(
        session.options.shapes, key=lambda s: (s.N, s.K)
    )  # those that share a weight follow each other
    for dtype in session.options.dtypes:
        for shape in order:
            for threads in session.each_threads():
                label = f"linear_24 {dtype} {shape} {shape.label}, threads: {threads}"
                run = functools.partial(_measure, shape=shape, dtype=dtype, threads=threads)
                yield Case(label, 1.0, run)


def weights(session: Session, shape: Shape, dtype: str) -> Weights:
    key = shape.N, shape.K, dtype
    if session.spare.get("weights", (None,))[0] != key:
        session.spare.pop("weights", None)  # before the next are made
        session.spare["weights"] = key, Weights(session, shape.N, shape.K, DTYPES[dtype])
    return session.spare["weights"][1]


def ours(
    session: Session, x: Tensor, w: Weights, shape: Shape, dtype: torch.dtype
) -> dict[tuple[str, str], Callable]:
    """(op, back end) to the call. The best back end is called as a user calls it, through torch's dispatcher."""
    found, n = {}, w.count
    for i, (name, module) in enumerate(session.backends_for("linear_24", dtype).items()):
        prepacked = (
            dtype in module.SERVES.get("linear_24_prepacked", ()) if name != "reference" else False
        )
        if i == 0:
            found["linear_24", name] = lambda i: sk.linear_24(x, *w.packed[i % n])
            if prepacked and w.prepacked is not None:
                found["linear_24_prepacked", name] = lambda i: sk.linear_24_prepacked(
                    x, w.prepacked[i % n], shape.N
                )
            continue
        found["linear_24", name] = lambda i, m=module: m.linear_24(
            x, *w.packed[i % n], None, "none"
        )
        if prepacked:
            packed = [module.prepack_24(*p) for p in w.packed]
            found["linear_24_prepacked", name] = lambda i, m=module, p=packed: (
                m.linear_24_prepacked(x, p[i % n], shape.N, None, "none")
            )
    return found


def _measure(session: Session, budget: Budget, shape: Shape, dtype: str, threads: int) -> list[Row]:
    kind = DTYPES[dtype]
    w = weights(session, shape, dtype)
    x = torch.randn(shape.M, shape.K, device=session.device).to(kind)
    mine = ours(session, x, w, shape, kind)
    rows: list[Row] = []
    with session.threads(threads):
        peers, missing = _peers(session, x, w, threads)
        sides: Sides = {f"{op} {name}": call for (op, name), call in mine.items()} | peers
        checks = _checks(session, x, w, mine) if session.options.check else {}
        for graph, taken in session.variants(sides):
            samples = session.clock.interleave(taken, budget)
            for op, name in mine:
                if f"{op} {name}" not in samples:
                    continue
                row = session.row(
                    op,
                    "linear_24",
                    {"M": shape.M, "N": shape.N, "K": shape.K},
                    f"{shape} {shape.label}".strip(),
                    dtype,
                    threads,
                    (name, session.kernel(name, op, kind, shape)),
                )
                row.graph = graph
                row.nbytes = w.nbytes + (shape.M * shape.K + shape.M * shape.N) * kind.itemsize
                row.flop = 2 * shape.M * shape.N * shape.K
                row.timed(samples, f"{op} {name}", [p for p in peers if p in samples])
                row.peers |= {name: Peer(missing=why) for name, why in missing.items()}
                row.bound_ms = session.bound_ms(row.nbytes, row.flop, dtype, threads)
                if (op, name) in checks:
                    row.error = checks[op, name]
                    if not row.error <= WORST_ERROR:
                        row.wrong = (
                            f"error is {row.error:.3g} times that of torch's product; "
                            f"at most {WORST_ERROR:g} is right"
                        )
                rows.append(row)
    return rows


def _checks(session: Session, x: Tensor, w: Weights, mine: dict) -> dict:
    rows = some_rows(len(x), x.device)
    dense = F.linear(x, w.dense[0])[rows]
    exact = x[rows].double() @ w.dense[0].double().T
    return {key: error_ratio(call(0)[rows], dense, exact) for key, call in mine.items()}


# ---- peers ----


def compiled(x: Tensor, w: Weights) -> Callable[[int], object]:
    torch._dynamo.reset()  # or the recompilations of earlier cases count towards its limit
    product = torch.compile(F.linear, dynamic=False)
    return lambda i: product(x, w.dense[i % w.count])


def reordered(x: Tensor, w: Weights) -> Callable[[int], object]:
    """The kernel torch.compile with freezing calls for bfloat16: a weight that oneDNN has laid out for itself."""
    with torch.inference_mode(False), torch.no_grad():
        own = [torch.ops.mkldnn._reorder_linear_weight(d, len(x)) for d in w.dense]
    product = torch.ops.mkldnn._linear_pointwise
    return lambda i: product(x, own[i % w.count], None, "none", [], "")


def csr(x: Tensor, w: Weights) -> Callable[[int], object]:
    def convert(values: Tensor, meta: Tensor) -> Tensor:
        sparse = sk.unpack_24(values, meta).to_sparse_csr()
        indices = (
            sparse.crow_indices().int(),
            sparse.col_indices().int(),
        )  # else MKL's wrapper converts
        return torch.sparse_csr_tensor(*indices, sparse.values(), sparse.shape)

    with torch.inference_mode(False), torch.no_grad():
        own = [convert(*packed) for packed in w.packed]
    return lambda i: (own[i % w.count] @ x.T).T


def _cusparselt(x: Tensor, w: Weights) -> Callable[[int], object]:
    """PyTorch's semi-structured product with the algorithm that its search finds, searched once."""
    packed = [torch._cslt_compress(d) for d in w.dense]
    best = torch._cslt_sparse_mm_search(packed[0], x.t())
    return lambda i: torch._cslt_sparse_mm(packed[i % w.count], x.t(), alg_id=best).t()


def _cutlass(x: Tensor, w: Weights) -> Callable[[int], object]:
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    packed = [SparseSemiStructuredTensorCUTLASS.from_dense(d) for d in w.dense]
    return lambda i: F.linear(x, packed[i % w.count])


PEERS: dict[
    str, tuple[str, Callable]
] = {  # name to the device type it is for ("" for any) and how to make it
    "compile": ("", compiled),
    "onednn": ("cpu", reordered),
    "csr": ("", csr),
    "cusparselt": ("cuda", _cusparselt),
    "cutlass": ("cuda", _cutlass),
}


def _peers(session: Session, x: Tensor, w: Weights, threads: int) -> tuple[Sides, dict[str, str]]:
    """The dense product, and the others that are here; and why the rest is not."""
    sides: Sides = {DENSE: lambda i: F.linear(x, w.dense[i % w.count])}
    missing = {}
    for name, (where, make) in PEERS.items():
        if not session.wants(name):
            continue
        if where and where != session.device.type:
            missing[name] = f"is for {where}"
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # CSR is in beta, and unchecked
                call = make(x, w)
                call(0)
        except Exception as error:  # whatever a peer raises, it is named and the others go on
            missing[name] = str(error).partition("\n")[0][:80] or type(error).__name__
        else:
            sides[name] = call
    return sides, missing
