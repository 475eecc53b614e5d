"""Does this back end answer rightly on this machine? The short form runs by itself, the long form on request.

* :func:`known_answers` runs one op of one back end for one dtype on exact integers and takes
  milliseconds. The dispatcher calls it before it hands out a kernel for the first time.
* :func:`run` is `sparsekern selftest`: every back end, instruction set, op and dtype, on exact and
  on random inputs.

Answers are judged against ``reference.py`` in float64. Formats must agree bit for bit; products on
exact integers must be equal; random products may err at most twice as much as torch's own dense
product in that dtype.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from . import backends, ops, reference
from .samples import Samples

_SMOOTH = ("gelu", "silu")  # not exact on integers


def _widen(t):
    return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t


def _rms(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt()) if t.numel() else 0.0


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and bits (so that NaNs compare, and -0.0 differs from 0.0)."""
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


def check_product(op: str, args: tuple, got: Tensor, exact: bool) -> str | None:
    """What is wrong with the product `got` of `args`, or None."""
    if op == "linear_24_prepacked":
        x, packed, N, bias, activation = args
        args = x, *reference.split_packed(packed, N, x.shape[-1], x.dtype), bias, activation
        op = "linear_24"
    want = getattr(reference, op)(*map(_widen, args))
    if got.shape != want.shape or got.dtype is not args[0].dtype:
        return f"gave {got.dtype} {tuple(got.shape)}, expected {args[0].dtype} {tuple(want.shape)}"
    if exact and args[-1] not in _SMOOTH:
        if torch.equal(got, want.to(got.dtype)):
            return None
        wrong = (got != want.to(got.dtype)).nonzero()[0].tolist()
        return (
            f"element {wrong} is {got[tuple(wrong)].item()}, expected {want[tuple(wrong)].item()}"
        )
    torch_error = _rms(getattr(reference, op)(*args).double() - want)
    floor = (
        torch.finfo(got.dtype).eps / 2 * _rms(want)
    )  # where few or tiny sums make torch exact by luck
    error = _rms(got.double() - want)
    if error <= 2 * max(torch_error, floor):
        return None
    return f"error {error:.3g} (rms), torch's own is {torch_error:.3g}"


def check_zvc(x: Tensor, mask: Tensor, values: Tensor, offsets: Tensor) -> str | None:
    """What is wrong with the stream of x, or None. Tiles may lie in any order."""
    if not torch.equal(mask, reference.pack_zvc(x)[0]):
        return "wrong mask"
    try:
        back = reference.unpack_zvc(mask, values, offsets, list(x.shape))
    except ValueError as error:
        return str(error)
    return None if _same_bits(back, x) else "wrong values or offsets"


# Ops that share a layout of the back end's own: they serve together or not at all.
_PREPACKED = ("prepack_24", "unprepack_24", "linear_24_prepacked")


def _in_layout_of(backend: ModuleType, op: str, args: tuple) -> tuple:
    """`args` with a weight that the reference has prepacked in the layout of `backend`."""
    if op == "unprepack_24":
        packed, N, K, dtype = args
        return backend.prepack_24(*reference.unprepack_24(packed, N, K, dtype)), N, K, dtype
    x, packed, N, *rest = args
    weight = reference.unprepack_24(packed, N, x.shape[-1], x.dtype)
    return x, backend.prepack_24(*weight), N, *rest


def check(backend: ModuleType, op: str, args: tuple, exact: bool = True) -> str | None:
    """Run `op` of `backend` on `args`; what is wrong with its answer, or None."""
    function = getattr(backend, op)
    if op == "prepack_24":  # opaque bytes: as many as before, and they come back
        values, meta = args
        packed = function(values, meta)
        if packed.numel() != values.nbytes + meta.nbytes:
            return f"{packed.numel()} bytes, expected {values.nbytes + meta.nbytes}"
        back = backend.unprepack_24(packed, values.shape[0], 2 * values.shape[1], values.dtype)
        same = all(_same_bits(b, a) for b, a in zip(back, args, strict=True))
        return None if same else "unprepack_24 does not give back what was prepacked"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ComplexHalf support is experimental")
        got = function(*(_in_layout_of(backend, op, args) if op in _PREPACKED else args))
    if op == "pack_zvc":
        return check_zvc(args[0], *got)
    if op == "pack_zvc_out":
        x, mask, values, offsets, count = args
        return check_zvc(x, mask, values[: int(count)], offsets)
    if op.startswith("linear_24"):
        return check_product(op, args, got, exact)
    want = getattr(reference, op)(*args)
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    for part, (g, w) in enumerate(pairs):
        if not _same_bits(g, w):
            return f"output {part} differs from the reference"
    return None


@torch.no_grad()
def known_answers(
    backend: ModuleType, op: str, dtype: torch.dtype, device: torch.device
) -> str | None:
    """The short form: None if `op` of `backend` is right for `dtype` on `device`, else what is wrong."""
    try:
        for member in _PREPACKED if op in _PREPACKED else (op,):
            for args in Samples(dtype, device).of(member, quick=True):
                if reason := check(backend, member, args):
                    return reason
    except Exception as error:  # a kernel that cannot even launch must not take the process along
        return f"{type(error).__name__}: {error}"
    return None


@dataclass(frozen=True)
class Result:
    """One line of the long form. `reason` is empty where all `cases` passed."""

    backend: str
    variant: str
    device: str
    op: str
    cases: int
    dtypes: int
    reason: str


def variants(name: str) -> Iterator[str]:
    """Switches a back end through the kernels it could choose here; the CPU's instruction sets."""
    backend = backends.load(name)
    if name != "cpu":
        yield "-"
        return
    chosen = backend.isa()
    try:
        for isa in backend.isas():
            backend.set_isa(isa)
            yield isa
    finally:
        backend.set_isa(chosen)


def plan() -> list[tuple[str, str]]:
    """(device, back end) pairs that are present, the reference included."""
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    pairs = []
    for device in devices:
        for name in backends.row(device.partition(":")[0]):
            if name == "reference" or backends.load(name).unavailable(torch.device(device)) is None:
                pairs.append((device, name))
    return pairs


def dtypes_served(name: str, op: str) -> frozenset[torch.dtype]:
    """What a back end serves of an op; the reference serves all that the op takes."""
    return (
        ops.OPS[op].dtypes
        if name == "reference"
        else frozenset(backends.load(name).SERVES.get(op, ()))
    )


@torch.no_grad()
def run(seed: int = 0) -> Iterator[Result]:
    """The long form, one :class:`Result` per back end, variant and op, as they come."""
    for device, name in plan():
        backend = backends.load(name)
        for variant in variants(name):
            for op in ops.OPS:
                dtypes = sorted(dtypes_served(name, op), key=str)
                if not dtypes:
                    continue
                cases, reason = 0, ""
                for dtype in dtypes:
                    for exact in (True, False):
                        for args in Samples(dtype, torch.device(device), exact, seed).of(op):
                            cases += 1
                            try:
                                wrong = check(backend, op, args, exact)
                            except (
                                Exception
                            ) as error:  # reported as a failure of this op, the others still run
                                wrong = f"{type(error).__name__}: {error}"
                            if wrong and not reason:
                                shapes = [tuple(a.shape) for a in args if isinstance(a, Tensor)]
                                reason = f"{dtype}, shapes {shapes}: {wrong}"
                yield Result(name, variant, device, op, cases, len(dtypes), reason)


def environment() -> dict[str, str]:
    """The variables that steer the library, as they are set."""
    names = ("SPARSEKERN_BACKEND", "SPARSEKERN_CPU_ISA", "SPARSEKERN_STRICT", "SPARSEKERN_CUDA")
    return {name: os.environ.get(name, "") for name in names}
