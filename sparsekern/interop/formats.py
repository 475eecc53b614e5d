"""The formats that a checkpoint may hold 2:4 weights in, by the names of tensors.

Of a layer ``x`` the formats have the tensors

==================  ==============================================================  ====================
dense               ``x.weight``
sparsekern          ``x.values``, ``x.meta``                                        what SparseLinear saves
sparse-24-bitmask   ``x.shape``, ``x.compressed``, ``x.bitmask``                    :mod:`.bitmask`
cutlass             ``x.weight.packed``, ``x.weight.meta``                          :mod:`.cutlass`
marlin-24           ``x.weight_packed``, ``x.scale_packed``, ``x.meta``             :mod:`.marlin`, read only
gptq-marlin-24      ``x.B_24``, ``x.B_meta``, ``x.s``                               :mod:`.marlin`, read only
==================  ==============================================================  ====================

In a sparsekern file K is a multiple of 4; where a layer has fewer input features, the file's metadata say so under
``sparsekern.in_features``, as JSON by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import bitmask, cutlass, marlin
from .checkpoint import Checkpoint
from .packed import Packed, check


@dataclass(frozen=True)
class Format:
    """How a file holds a packed layer.

    Attributes:
        parts: names of its tensors, after the layer's.
        marker: the part by which the format is known.
        read: tensors in the order of `parts` to a packed weight, or to a dense one that is not 2:4 by rows.
        write: the inverse, or None.
        why_not: why a weight (N, K, dtype) has no place in it, or None.
    """

    parts: tuple[str, ...]
    marker: str
    read: Callable[..., Packed | Tensor]
    write: Callable[[Packed], tuple[Tensor, ...]] | None
    why_not: Callable[[int, int, torch.dtype], str | None]


def _read_sparsekern(values: Tensor, meta: Tensor) -> Packed:
    check(values, meta)
    return Packed(values, meta, 2 * values.shape[1])


def _read_cutlass(packed: Tensor, meta: Tensor) -> Packed:
    return Packed(*cutlass.from_cutlass(packed, meta), 2 * packed.shape[1])


def _read_marlin(weight_packed: Tensor, scale_packed: Tensor, meta: Tensor) -> Packed:
    values, meta, scale = marlin.from_marlin(weight_packed, scale_packed, meta)
    return Packed(marlin.dequantize(values, scale), meta, 2 * values.shape[1])


def _bitmask_why_not(N: int, K: int, dtype: torch.dtype) -> str | None:
    return f"{K} columns are no multiple of 4" if K % 4 else None


FORMATS = {
    "sparsekern": Format(
        ("values", "meta"),
        "values",
        _read_sparsekern,
        lambda packed: (packed.values, packed.meta),
        lambda N, K, dtype: None,
    ),
    "sparse-24-bitmask": Format(
        ("shape", "compressed", "bitmask"),
        "bitmask",
        bitmask.read,
        lambda packed: bitmask.to_bitmask(packed.values, packed.meta),
        _bitmask_why_not,
    ),
    "cutlass": Format(
        ("weight.packed", "weight.meta"),
        "weight.packed",
        _read_cutlass,
        lambda packed: cutlass.to_cutlass(packed.values, packed.meta),
        cutlass.why_not,
    ),
    "marlin-24": Format(
        ("weight_packed", "scale_packed", "meta"),
        "scale_packed",
        _read_marlin,
        None,
        lambda N, K, dtype: None,
    ),
    "gptq-marlin-24": Format(
        ("B_24", "s", "B_meta"), "B_24", _read_marlin, None, lambda N, K, dtype: None
    ),
}
READABLE = ("dense", *FORMATS)
WRITABLE = ("dense", *(name for name, form in FORMATS.items() if form.write))


def guess_format(names: Iterable[str]) -> str:
    """The packed format that a checkpoint's tensors have the names of, "dense" if of none.

    Raises:
        ValueError: they have those of several.
    """
    found = [form for form in FORMATS if any(True for _ in _layers(names, FORMATS[form].marker))]
    if len(found) > 1:
        raise ValueError(
            f"tensors have the names of {' and of '.join(found)}; say which with --from"
        )
    return found[0] if found else "dense"


def _layers(names: Iterable[str], part: str) -> Iterator[str]:
    """Names of the layers, "" for the root, that have a tensor of that name."""
    for name in names:
        if name == part:
            yield ""
        elif name.endswith("." + part):
            yield name[: -len(part) - 1]


def join(layer: str, part: str) -> str:
    return f"{layer}.{part}" if layer else part


@dataclass(frozen=True)
class Layer:
    """A packed layer, or a dense weight.

    Attributes:
        name: of the layer, dotted; "" is the root.
        source: its format.
        tensors: their names, in the order of the format's parts.
        in_features: where the file's metadata say so.
    """

    name: str
    source: str
    tensors: tuple[str, ...]
    in_features: int | None = None

    @property
    def weight(self) -> str:
        return join(self.name, "weight")


def find_layers(checkpoint: Checkpoint, source: str) -> list[Layer]:
    """The packed layers of the source's format and the dense weights, in the order of the files."""
    names = checkpoint.file_of.keys()
    found = []
    if source != "dense":
        form, in_features = FORMATS[source], {}
        if source == "sparsekern":
            in_features = checkpoint.in_features()
        for layer in {layer for part in form.parts for layer in _layers(names, part)}:
            tensors = tuple(join(layer, part) for part in form.parts)
            missing = [t for t in tensors if t not in names]
            if missing:
                has = ", ".join(t for t in tensors if t in names)
                raise ValueError(
                    f"{checkpoint.path}: {source} takes {', '.join(missing)} beside {has} (or give another --from)"
                )
            if source == "sparse-24-bitmask" and join(layer, "row_offsets") in names:
                raise ValueError(
                    f"{checkpoint.path}: layer {layer} is of sparse-bitmask, which is not 2:4 and not read here"
                )
            found.append(Layer(layer, source, tensors, in_features.get(layer)))
    for layer in _layers(names, "weight"):
        spec = checkpoint.spec(join(layer, "weight"))
        if len(spec.shape) > 1:
            found.append(Layer(layer, "dense", (join(layer, "weight"),)))
    order = {name: i for i, name in enumerate(names)}
    return sorted(found, key=lambda layer: order[layer.tensors[0]])


def read_layer(checkpoint: Checkpoint, layer: Layer) -> Packed | Tensor:
    """A packed layer as the library packs it, or dense where it is not two of every four in each row."""
    weight = FORMATS[layer.source].read(*(checkpoint.read(t) for t in layer.tensors))
    if layer.in_features is None:
        return weight
    if not weight.in_features - 4 < layer.in_features < weight.in_features:
        raise ValueError(
            f"metadata give it {layer.in_features} input features; values are for {weight.in_features}"
        )
    return Packed(weight.values, weight.meta, layer.in_features)
