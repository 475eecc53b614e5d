"""When a SparseLinear expands its weight once per call and multiplies densely: where that was measured faster.

Nothing is measured here and nothing is chosen that was not measured: `sparsekern tune` fills the table, and without an
entry the packed product serves. Choices hold for inference (no gradients), outside ``torch.compile``. They are kept in
``$XDG_CACHE_HOME/sparsekern/choices.json`` (``~/.cache`` where that is not set), over those that ship with the
package, ``sparsekern/choices.json``, for devices that were measured::

    {"version": 1, "choices": {"AMD EPYC, avx2, threads: 2": {"linear_24 fp32 4096 x 4096": {"16": 0.4, "1024": 1.2}}}}

A number is the packed product's time over that of expanding and multiplying, for a bucket of M; expanding serves from
`WORTH` on. A number that is none is left out; how the files are read and written is told in tuned.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from . import tuned

VERSION = 1
WORTH = 1.05  # expanding has to be so many times faster
LARGEST = 8192  # from here on all M share a bucket
SHIPPED = Path(__file__).with_name("choices.json")

Table = dict[str, dict[str, dict[str, float]]]  # device, product, bucket

_table: Table | None = None  # once read
_found: dict[tuple, dict[int, float]] = {}  # what this process has looked up
_known: dict[tuple[torch.device, int], bool] = {}  # likewise, of devices


def path() -> Path:
    """The file that keeps what `sparsekern tune` measured."""
    return tuned.path("choices.json")


def bucket(M: int) -> int:
    """Numbers of tokens that share a choice: the next power of two."""
    return min(1 << max(M - 1, 0).bit_length(), LARGEST)


def expands(op: str, M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether expanding the weight was measured faster than `op`, linear_24 or linear_24_prepacked."""
    return measured(op, N, K, dtype, device).get(bucket(M), 0.0) >= WORTH


def anything(device: torch.device) -> bool:
    """Whether anything was measured for a device at all; where nothing was, no layer on it need look further."""
    key = device, torch.get_num_threads()
    known = _known.get(key)
    if known is None:
        here = device.type in ("cpu", "cuda")
        known = _known[key] = here and bool(_read_table().get(device_name(device)))
    return known


def measured(op: str, N: int, K: int, dtype: torch.dtype, device: torch.device) -> dict[int, float]:
    """Bucket of M to the packed product's time over that of expanding; empty where nothing was measured."""
    if device.type not in ("cpu", "cuda"):
        return {}
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    key = op, N, K, dtype, device, threads
    found = _found.get(key)
    if found is None:
        entries = _read_table().get(device_name(device), {}).get(product(op, N, K, dtype), {})
        found = _found[key] = {int(M): ratio for M, ratio in entries.items()}
    return found


def _read_table() -> Table:
    global _table
    if _table is None:
        _table = _merged(read(SHIPPED), read(path()))
    return _table


def product(op: str, N: int, K: int, dtype: torch.dtype) -> str:
    return f"{op} {str(dtype).removeprefix('torch.')} {N} x {K}"


def device_name(device: torch.device) -> str:
    """The device in words that mean the same to another process."""
    from . import backends
    from .info import cpu_name, cuda_name  # here: it draws tables too, which takes time to load

    if device.type != "cpu":
        return cuda_name(device)
    cpu = backends.load("cpu")
    tier = "reference" if cpu.unavailable(device) else cpu.isa()
    return f"{cpu_name()}, {tier}, threads: {torch.get_num_threads()}"


def forget() -> None:
    """Read the files anew at the next call."""
    global _table
    _table = None
    _found.clear()
    _known.clear()


def read(file: Path) -> Table:
    """The choices of a file; what is not as it should be is left out."""
    return _checked(tuned.read(file, VERSION))


def _checked(choices: dict) -> Table:
    try:
        return {
            device: {
                name: {M: float(ratio) for M, ratio in entries.items() if _valid(M, ratio)}
                for name, entries in products.items()
            }
            for device, products in choices.items()
        }
    except AttributeError:
        return {}


def _valid(M: str, ratio: object) -> bool:
    number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
    return M.isdecimal() and number and math.isfinite(ratio) and ratio > 0


def _merged(under: Table, over: Table) -> Table:
    merged: Table = {}
    for table in (under, over):
        for device, products in table.items():
            for name, entries in products.items():
                merged.setdefault(device, {}).setdefault(name, {}).update(entries)
    return merged


def write(table: Table, file: Path | None = None) -> Path:
    """Add choices to a file, `path()` by default; what was there for other cases stays.

    Raises:
        OSError: it cannot be written.
    """
    file = path() if file is None else file
    tuned.update(file, VERSION, lambda choices: _merged(_checked(choices), table))
    forget()
    return file
