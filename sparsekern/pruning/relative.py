"""Pruned weights on disk as Han et al. 2015 count them: what is not zero, and how far it is from the last.

::

    position of entry i  =  (gap 0 + 1) + ... + (gap i + 1) - 1        over the weight in row-major order

A gap counts the zeros that are skipped, in 5 bits for a linear layer and 8 for a convolution
(section 5). A longer one is bridged by fillers: entries of value 0 and the largest gap. With 3 bits
and 20 zeros before ``x``::

    gaps    7  7  4
    values  0  0  x

In the file, which is safetensors, ``NAME.values`` has the values in the weight's dtype and
``NAME.gaps`` the gaps, packed, lowest bit first, the last byte padded with zeros. Bits and shape
are in the metadata. Zero means all bits zero: -0.0 is kept.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .masks import finalize
from .patterns import layers

FORMAT = "sparsekern-relative-1"
BITS = {"linear": 5, "conv": 8}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Relative:
    """An encoded weight.

    Attributes:
        values: ``[entries]``, fillers included.
        gaps: uint8 ``[ceil(entries * bits / 8)]``.
        bits: 1 to 8, of a gap.
        shape: of the weight.
    """

    values: Tensor
    gaps: Tensor
    bits: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.gaps.nbytes


def encode_relative(weight: Tensor, bits: int) -> Relative:
    """Encode a weight of fp32, fp16, bf16 or fp64 and any shape.

    Raises:
        TypeError: another dtype.
        ValueError: `bits` is not 1 to 8.

    >>> encoded = encode_relative(torch.tensor([0.0, 0, 0, 0, 0, 5, 6]), bits=2)
    >>> encoded.values.tolist()  # four zeros are one too many for two bits
    [0.0, 5.0, 6.0]
    >>> encoded.gaps.tolist()  # 3, 1, 0
    [7]
    """
    if weight.dtype not in _DTYPES:
        raise TypeError(
            f"encode_relative: weight is {weight.dtype}; it takes {', '.join(map(str, _DTYPES))}"
        )
    if not 1 <= bits <= 8:
        raise ValueError(f"encode_relative: bits takes 1 to 8, got {bits}")
    flat = weight.detach().contiguous().flatten()
    positions = flat.view(_INTEGERS[flat.itemsize]).nonzero().squeeze(1)
    skipped = positions.diff(prepend=positions.new_tensor([-1])) - 1
    reach = 1 << bits  # elements that a filler passes, itself included
    fillers = skipped // reach
    places = (fillers + 1).cumsum(0) - 1
    entries = int(places[-1]) + 1 if len(places) else 0
    gaps = positions.new_full((entries,), reach - 1)
    gaps[places] = skipped % reach
    values = flat.new_zeros(entries)
    values[places] = flat[positions]
    return Relative(values, _pack(gaps, bits), bits, tuple(weight.shape))


def decode_relative(encoded: Relative) -> Tensor:
    """The weight, bit for bit.

    Raises:
        TypeError, ValueError: dtypes, lengths or positions do not fit together; nothing is read past an end.
    """
    values, gaps, bits = encoded.values, encoded.gaps, encoded.bits
    if values.dtype not in _DTYPES or gaps.dtype is not torch.uint8:
        raise TypeError(
            f"decode_relative: values are {values.dtype} and gaps {gaps.dtype}; "
            f"it takes {', '.join(map(str, _DTYPES))} and torch.uint8"
        )
    if not 1 <= bits <= 8:
        raise ValueError(f"decode_relative: bits takes 1 to 8, got {bits}")
    entries = values.numel()
    if values.dim() != 1 or gaps.shape != (-(-entries * bits // 8),):
        raise ValueError(
            f"decode_relative: values {tuple(values.shape)} of {bits} bits take gaps "
            f"({-(-entries * bits // 8)},), got {tuple(gaps.shape)}"
        )
    numel = math.prod(encoded.shape)
    unpacked = _unpack(gaps, entries, bits)
    positions = (unpacked + 1).cumsum(0) - 1
    if entries and (last := int(positions[-1])) >= numel:
        raise ValueError(
            f"decode_relative: the last entry is at {last}, the weight has {numel} elements"
        )
    fillers = values.view(_INTEGERS[values.itemsize]) == 0
    if (unpacked[fillers] != (1 << bits) - 1).any():
        raise ValueError("decode_relative: a zero is stored where no gap is too large")
    try:
        flat = values.new_zeros(numel)
    except RuntimeError as error:
        raise ValueError(
            f"decode_relative: no room for the shape {encoded.shape}: {error}"
        ) from None
    flat[positions] = values
    return flat.view(encoded.shape)


def _pack(numbers: Tensor, bits: int) -> Tensor:
    single = (numbers.unsqueeze(1) >> torch.arange(bits, device=numbers.device)) & 1
    padded = nn.functional.pad(single.flatten(), (0, -single.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, device=numbers.device)).sum(1).to(torch.uint8)


def _unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    single = ((packed.long().unsqueeze(1) >> torch.arange(8, device=packed.device)) & 1).flatten()
    if single[count * bits :].any():
        raise ValueError("decode_relative: bits after the last gap are not zero")
    numbers = single[: count * bits].view(count, bits)
    return (numbers << torch.arange(bits, device=packed.device)).sum(1)


# ---- files ----


@dataclass(frozen=True)
class Stored:
    """One tensor in a file. ``index_bytes`` is 0 and ``entries`` is ``elements`` where it is not encoded.

    Attributes:
        kept: elements that are not zero.
        entries: values stored, fillers included.
    """

    name: str
    elements: int
    kept: int
    entries: int
    dense_bytes: int
    value_bytes: int
    index_bytes: int

    @property
    def bytes(self) -> int:
        return self.value_bytes + self.index_bytes

    @property
    def rate(self) -> float:
        return self.dense_bytes / self.bytes if self.bytes else math.inf

    def __str__(self) -> str:
        return (
            f"{self.name:28s} {self.dense_bytes:>12,} to {self.bytes:>11,} bytes, {self.rate:.1f}x: "
            f"{self.kept:,} of {self.elements:,} and {self.entries - self.kept:,} fillers"
            if self.index_bytes
            else f"{self.name:28s} {self.dense_bytes:>12,} bytes as they are"
        )


@dataclass
class StorageReport:
    """All tensors of a file; ``file_bytes`` has names and shapes as well."""

    tensors: list[Stored] = field(default_factory=list)
    file_bytes: int = 0

    @property
    def dense_bytes(self) -> int:
        return sum(t.dense_bytes for t in self.tensors)

    @property
    def rate(self) -> float:
        """Bytes of the dense tensors over those of the whole file."""
        return self.dense_bytes / self.file_bytes

    def __str__(self) -> str:
        total = f"{'file':28s} {self.dense_bytes:>12,} to {self.file_bytes:>11,} bytes, {self.rate:.1f}x"
        return "\n".join([*map(str, self.tensors), total])


def save_relative(
    model: nn.Module, path: str | os.PathLike, bits: Mapping[str, int] | None = None
) -> StorageReport:
    """Write a pruned model's ``state_dict`` with its masks applied, under the names of before any mask.

    Weights of linear and convolution layers are encoded where that is smaller; all else is stored
    as it is. Needs safetensors.

    Args:
        model: pruned, with masks held or finalized.
        bits: of a gap, 1 to 8, for ``"linear"`` and for ``"conv"``; by default 5 and 8.

    Raises:
        ValueError: the ``state_dict`` has something that is no tensor; see also :func:`finalize`.
    """
    save_file = _safetensors("save_relative").torch.save_file
    bits = BITS | dict(bits or {})
    if unknown := sorted(bits.keys() - BITS.keys()):
        raise ValueError(f"save_relative: bits names {', '.join(unknown)}; it takes linear, conv")
    model = finalize(copy.deepcopy(model))
    weights = {
        f"{layer.name}.weight".lstrip("."): bits[
            "linear" if isinstance(layer.module, nn.Linear) else "conv"
        ]
        for layer in layers(model, "density=1")
        if layer.weight.dtype in _DTYPES
    }
    report, tensors, encodings = StorageReport(), {}, {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"save_relative: {name} of the state_dict is a {type(tensor).__name__}; a file has tensors"
            )
        # A file has each tensor for itself, also where a model ties two.
        tensor = tensor.detach().cpu().contiguous().clone()
        numel, kept = tensor.numel(), int(tensor.count_nonzero())
        encoded = encode_relative(tensor, weights[name]) if name in weights else None
        if encoded is not None and encoded.nbytes < tensor.nbytes:
            tensors[f"{name}.values"], tensors[f"{name}.gaps"] = encoded.values, encoded.gaps
            encodings[name] = {"bits": encoded.bits, "shape": list(encoded.shape)}
            parts = (
                encoded.values.numel(),
                tensor.nbytes,
                encoded.values.nbytes,
                encoded.gaps.nbytes,
            )
        else:
            tensors[name] = tensor
            parts = (numel, tensor.nbytes, tensor.nbytes, 0)
        report.tensors.append(Stored(name, numel, kept, *parts))
    save_file(tensors, path, {"format": FORMAT, "relative": json.dumps(encodings)})
    report.file_bytes = os.path.getsize(path)
    return report


def load_relative(path: str | os.PathLike) -> dict[str, Tensor]:
    """The ``state_dict`` that :func:`save_relative` wrote, every tensor dense and bit for bit.

    To retrain: load it into the model and ``hold(layer, layer.weight != 0)``.

    Raises:
        ValueError: no such file's content: cut off, changed, or of another format; says what is wrong.
        OSError: it cannot be opened.
    """
    safetensors = _safetensors("load_relative")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"load_relative: {path} is no safetensors file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"load_relative: the format of {path} is {metadata.get('format')!r}; it takes {FORMAT!r}"
        )
    state = {}
    for name, bits, shape in _encodings(metadata.get("relative"), path):
        try:
            values, gaps = tensors.pop(f"{name}.values"), tensors.pop(f"{name}.gaps")
        except KeyError as error:
            raise ValueError(f"load_relative: {path} has no {error}") from None
        try:
            state[name] = decode_relative(Relative(values, gaps, bits, shape))
        except (TypeError, ValueError) as error:
            raise ValueError(f"load_relative: {name} in {path}: {error}") from None
    if twice := sorted(state.keys() & tensors.keys()):
        raise ValueError(f"load_relative: {path} has {', '.join(twice)} twice")
    return state | tensors


def _encodings(text: str | None, path: Any) -> list[tuple[str, int, tuple[int, ...]]]:
    """Name, bits and shape of every encoded weight, from the metadata, of which nothing is trusted."""
    wrong = ValueError(
        f"load_relative: the metadata of {path} do not say bits and shape of weights"
    )
    try:
        found = json.loads(text or "")
        items = [(name, entry["bits"], entry["shape"]) for name, entry in found.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise wrong from None
    for _, bits, shape in items:
        if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
            raise wrong
        if type(bits) is not int or math.prod(shape) >= 1 << 63:
            raise wrong
    return [(name, bits, tuple(shape)) for name, bits, shape in items]


def _safetensors(function: str) -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise ImportError(f"{function} needs safetensors: pip install safetensors") from None
    return safetensors
