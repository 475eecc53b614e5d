"""The safetensors container, read and written tensor by tensor.

::

    8 bytes    length of the header, little-endian
    header     JSON: {"__metadata__": {text: text}, name: {"dtype", "shape", "data_offsets": [begin, end]}, …}
    data       the tensors' bytes, little-endian, without gaps

Written here because a conversion needs what the library of that name does not do: to write a file whose tensors are
never in memory together. Files are trusted in nothing: every size is held against the file's before memory is taken.

Source: safetensors' README, "Format".
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_BITS = {  # by the format's name of a dtype; where torch has the type, and the size of others
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "C64": torch.complex64, "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _BITS.items() if isinstance(dtype, torch.dtype)}
_MAX_HEADER = 100_000_000  # the library's own limit
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Spec:
    """What a file says of a tensor: the format's name of the dtype, and the shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bits(self) -> int:
        """Of one element."""
        known = _BITS[self.dtype]
        return known if isinstance(known, int) else 8 * known.itemsize

    @property
    def nbytes(self) -> int:
        return self.bits * math.prod(self.shape) // 8

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None where torch has no such type."""
        known = _BITS[self.dtype]
        return known if isinstance(known, torch.dtype) else None

    @staticmethod
    def of(t: Tensor) -> Spec:
        return Spec(Spec.name(t.dtype), tuple(t.shape))

    @staticmethod
    def name(dtype: torch.dtype) -> str:
        """The format's name of a dtype of torch."""
        return _NAMES[dtype]


class Reader:
    """A safetensors file: its header, checked, and its tensors one at a time.

    Attributes:
        specs: by name, in the order of the data.
        metadata: texts by name.

    Raises:
        ValueError: the file is not what it says; names the file and what is wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._read_header()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no sound safetensors file: {error}") from None

    def _read_header(self) -> None:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ValueError(f"its header says {length} bytes, the file has {size}")
            text = file.read(length).decode("utf-8")
        if not text.startswith("{"):
            raise ValueError("its header does not begin with {")
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("__metadata__ must hold texts by name")
        self.metadata: dict[str, str] = metadata
        entries = sorted(
            ((*_entry(name, e), name) for name, e in header.items()), key=lambda e: e[:2]
        )
        begin, self.specs, self._begin = 0, {}, {}
        for first, last, spec, name in entries:
            if first != begin:
                what = (
                    "overlaps what comes before it" if first < begin else "leaves a gap before it"
                )
                raise ValueError(f"{name} {what}: it begins at byte {first}, not {begin}")
            self.specs[name], self._begin[name] = spec, 8 + length + first
            begin = last
        if begin != size - 8 - length:
            raise ValueError(f"its tensors take {begin} bytes, the file has {size - 8 - length}")

    def tensor(self, name: str) -> Tensor:
        """Read one, into memory of its own."""
        spec = self.specs[name]
        if spec.torch_dtype is None:
            raise ValueError(f"{self.path}: {name} has dtype {spec.dtype}, which torch has not")
        content = bytearray(spec.nbytes)
        with self.path.open("rb") as file:
            file.seek(self._begin[name])
            if file.readinto(content) != len(content):
                raise ValueError(f"{self.path}: {name} ends before its {len(content)} bytes")
        if not content:
            return torch.empty(spec.shape, dtype=spec.torch_dtype)
        return torch.frombuffer(content, dtype=spec.torch_dtype).view(spec.shape)

    def chunks(self, name: str) -> Iterable[bytes]:
        """The bytes of one, in parts of a few MB."""
        left = self.specs[name].nbytes
        with self.path.open("rb") as file:
            file.seek(self._begin[name])
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise ValueError(f"{self.path}: {name} ends before its bytes do")
                left -= len(chunk)
                yield chunk


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header has the same name twice")
    return found


def _entry(name: str, entry: object) -> tuple[int, int, Spec]:
    """First byte, byte after the last, and the rest of what the header says of one tensor."""
    name.encode("utf-8")  # half a surrogate pair cannot be written again
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name} has dtype {dtype!r}; known are {', '.join(_BITS)}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        # torch's own limit of dimensions, and a bound on what is multiplied below.
        sound = isinstance(numbers, list) and len(numbers) <= 64
        if not (sound and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)):
            raise ValueError(
                f"{name} has {what} {str(numbers)[:80]}; it takes up to 64 integers from 0 on"
            )
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name} has data_offsets {offsets[:3]}; it takes [begin, end]")
    spec = Spec(dtype, tuple(shape))
    bits, taken = spec.bits * math.prod(shape), offsets[1] - offsets[0]
    if bits != 8 * taken:
        raise ValueError(
            f"{name} of {dtype} {shape} takes {bits} bits; its data_offsets hold {taken} bytes"
        )
    return offsets[0], offsets[1], spec


class Writer:
    """Writes a safetensors file of known tensors, in any order, each at its place.

    Args:
        path: must not exist.
        specs: every tensor there will be.
    """

    def __init__(self, path: Path, specs: dict[str, Spec], metadata: dict[str, str]) -> None:
        # Large elements first, so that each tensor lies at a multiple of its element's size.
        names = sorted(specs, key=lambda name: (-specs[name].bits, name))
        header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
        end = 0
        self._begin, self._missing = {}, dict(specs)
        for name in names:
            self._begin[name] = end
            begin, end = end, end + specs[name].nbytes
            spec = specs[name]
            header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (begin, end)}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        if len(text) > _MAX_HEADER:
            raise ValueError(f"{path}: a header of {len(text)} bytes; readers take {_MAX_HEADER}")
        self._data = 8 + len(text)
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data + end)

    def write(self, name: str, t: Tensor) -> None:
        t = t.detach().cpu().contiguous()
        self._place(name, Spec.of(t))
        if t.numel():
            content = (ctypes.c_char * t.nbytes).from_address(t.data_ptr())
            self._file.write(memoryview(content))

    def copy(self, name: str, reader: Reader, source: str) -> None:
        """Write what `reader` has as `source`, in parts."""
        self._place(name, reader.specs[source])
        for chunk in reader.chunks(source):
            self._file.write(chunk)

    def _place(self, name: str, spec: Spec) -> None:
        if self._missing.pop(name, None) != spec:
            raise ValueError(f"{name} of {spec} was not announced so: the source changes")
        self._file.seek(self._data + self._begin[name])

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"{', '.join(self._missing)} were announced and not written")
