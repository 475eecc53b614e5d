"""Which back end serves which op: one table, one question.

The reference serves everything. Any other back end is a module with a function per op it serves
(same name, same arguments, outputs returned) and

* ``SERVES``: op name to the dtypes it takes;
* ``unavailable(device)``: None, or why it cannot serve that device here.

To add one: its module or package, and its name in ``TABLE``.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import warnings
from collections.abc import Callable
from types import ModuleType

import torch

log = logging.getLogger("sparsekern")

# Device type to back ends, the best first. Device types not named here are served by the reference.
TABLE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "reference"),
}
# Served only where SPARSEKERN_BACKEND asks for it: on CPU tensors, Triton's interpreter; on CUDA tensors, kernels
# that no device has run yet.
ON_REQUEST: dict[str, tuple[str, ...]] = {"cpu": ("triton",), "cuda": ("cuda",)}


class Fallback(RuntimeError):
    """Raised under SPARSEKERN_STRICT=1 where a slower back end would have served without a word."""


@functools.cache
def load(name: str) -> ModuleType:
    return importlib.import_module(
        "sparsekern.reference" if name == "reference" else f"sparsekern.backends.{name}"
    )


def row(device_type: str) -> tuple[str, ...]:
    """The row of the table for a device type, with what SPARSEKERN_BACKEND requests in front."""
    names = TABLE.get(device_type, ("reference",))
    wanted = os.environ.get("SPARSEKERN_BACKEND")
    return (wanted, *names) if wanted in ON_REQUEST.get(device_type, ()) else names


def order(device_type: str) -> tuple[str, ...]:
    """Back ends for a device type, best first; SPARSEKERN_BACKEND puts one in front."""
    names = row(device_type)
    wanted = os.environ.get("SPARSEKERN_BACKEND")
    if not wanted:
        return names
    known = {name for rows in (TABLE, ON_REQUEST) for row in rows.values() for name in row}
    if wanted not in known:
        raise ValueError(
            f"SPARSEKERN_BACKEND is {wanted!r}; it takes one of {', '.join(sorted(known))}"
        )
    if wanted not in names:
        return ("reference",)
    return names[names.index(wanted) :]


def strict() -> bool:
    return os.environ.get("SPARSEKERN_STRICT", "0") not in ("", "0")


@functools.cache
def _log_once(op: str, reason: str) -> None:
    log.warning("%s: %s; a slower back end serves. `sparsekern info` says more", op, reason)


def allows_tf32(dtype: torch.dtype) -> bool:
    """Whether products may multiply in tf32: those of fp32, where the user's settings let torch's own do so,
    ``fp32_precision``, or what sets it too, ``allow_tf32`` and ``torch.set_float32_matmul_precision``."""
    return dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def fallback(op: str, reason: str) -> None:
    """Called where a back end leaves a case to the next one: logs once, raises under SPARSEKERN_STRICT=1."""
    if strict():
        raise Fallback(f"{op}: {reason} (SPARSEKERN_STRICT is set)")
    _log_once(op, reason)


@functools.cache
def _self_test(name: str, op: str, dtype: torch.dtype, device: str) -> str | None:
    from .. import selftest

    return selftest.known_answers(load(name), op, dtype, torch.device(device))


def resolve(op: str, dtype: torch.dtype, device: torch.device) -> Callable:
    """The function that serves `op` for `dtype` on `device`, tested there with known answers on first use.

    A back end that does not list the dtype is passed over by contract, without a word (float64
    products are the reference's); one that is missing or answers wrongly is passed over through
    :func:`fallback`.
    """
    for name in order(device.type):
        backend = load(name)
        if name == "reference":
            return getattr(backend, op)
        if reason := backend.unavailable(device):
            fallback(op, f"back end {name} is unavailable: {reason}")
        elif dtype not in backend.SERVES.get(op, ()):
            continue
        elif reason := _self_test(name, op, dtype, str(device)):
            warnings.warn(
                f"sparsekern: {op} of back end {name} gave a wrong answer for {dtype} on {device} and is switched "
                f"off: {reason}",
                RuntimeWarning,
                stacklevel=3,
            )
            fallback(op, f"back end {name} failed its self-test")
        else:
            return getattr(backend, op)
    raise RuntimeError(f"{op}: no back end serves {dtype} on {device}")
