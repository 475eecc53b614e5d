"""convert(): a checkpoint from one format of 2:4 weights to another, a layer at a time.

A checkpoint is a safetensors file, or a directory with one, or with several and ``model.safetensors.index.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from .checkpoint import IN_FEATURES, INDEX, Checkpoint
from .container import Spec, Writer
from .formats import FORMATS, READABLE, WRITABLE, Layer, find_layers, guess_format, join, read_layer
from .packed import DTYPES, Packed, first_dense_group, pack, unpack

# Weights of a directory that are in no safetensors file are not converted, so they are not copied either.
_OTHER_WEIGHTS = tuple(
    [".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors"]
)


# ---- one layer ----


@dataclass(frozen=True)
class ConvertedLayer:
    """What :func:`convert` did with one layer.

    Attributes:
        name: of its weight, dotted.
        shape: of the dense weight.
        dtype: as safetensors names it.
        source, target: formats.
        bytes_before, bytes_after: of its weight, all tensors together.
        note: why it is not in the format asked for, or "".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: str
    target: str
    bytes_before: int
    bytes_after: int
    note: str = ""


def _convert_layer(
    checkpoint: Checkpoint, layer: Layer, to: str, prune: bool
) -> tuple[ConvertedLayer, dict[str, Tensor] | None]:
    """What to report, and the new tensors by name; None for a dense weight that is copied as it is."""
    before = sum(checkpoint.spec(t).nbytes for t in layer.tensors)
    spec = checkpoint.spec(layer.tensors[0])
    weight, reason = None, ""
    if layer.source != "dense":
        weight = read_layer(checkpoint, layer)
    elif to != "dense" or prune:
        reason = _why_dense(spec)
        weight = None if reason else checkpoint.read(layer.tensors[0])

    packed = weight if isinstance(weight, Packed) else None
    if isinstance(weight, Tensor) and (to != "dense" or prune):
        group = None if prune else first_dense_group(weight)
        if group is None:
            packed = pack(weight)
        else:
            reason = f"not 2:4: row {group[0]}, columns {4 * group[1]} to {4 * group[1] + 3}"
    tensors = None
    if packed is not None and to != "dense":
        N, K = packed.shape
        reason = FORMATS[to].why_not(N, K, packed.values.dtype) or ""
        if not reason:
            try:
                written = FORMATS[to].write(packed)
                tensors = dict(zip(FORMATS[to].parts, written, strict=True))
            except ValueError as error:  # fp32 with two in a pair, which only the data tell
                reason = str(error)
    target = "dense" if tensors is None else to
    if tensors is None and (layer.source != "dense" or prune) and weight is not None:
        tensors = {"weight": weight if packed is None else unpack(packed)}
    if tensors is None:
        return (
            ConvertedLayer(
                layer.weight, spec.shape, spec.dtype, "dense", "dense", before, before, reason
            ),
            None,
        )
    dense = tuple(weight.shape)
    dtype = packed.values.dtype if packed is not None else weight.dtype
    tensors = {join(layer.name, part): t for part, t in tensors.items()}
    after = sum(Spec.of(t).nbytes for t in tensors.values())
    entry = ConvertedLayer(
        layer.weight, dense, Spec.name(dtype), layer.source, target, before, after, reason
    )
    return entry, tensors


def _why_dense(spec: Spec) -> str:
    """Why a weight of these dimensions and dtype cannot be packed, or ""."""
    if len(spec.shape) != 2:
        return f"{len(spec.shape)} dimensions; a matrix has two"
    if 0 in spec.shape:
        return "empty"
    return "" if spec.torch_dtype in DTYPES else f"{spec.dtype} is not packed"


# ---- the whole ----


@dataclass
class ConvertReport:
    """What :func:`convert` did.

    Attributes:
        source_format, target_format: names.
        guessed: whether the source's was.
        layers: one entry per packed layer and per dense weight of two dimensions or more.
        other_tensors, other_bytes: copied as they were.
        quantization_config: what a config.json needs for this format; None if nothing.
        config_written: whether the target has a config.json that says so.
        left_out: files of the source's directory that were not copied.
    """

    source_format: str
    guessed: bool
    target_format: str
    layers: list[ConvertedLayer] = field(default_factory=list)
    other_tensors: int = 0
    other_bytes: int = 0
    quantization_config: dict | None = None
    config_written: bool = False
    left_out: list[str] = field(default_factory=list)

    def as_dict(self) -> dict:
        return asdict(self)


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    source_format: str | None = None,
    select: Callable[[str], bool] | None = None,
    prune: Callable[[str], bool] | None = None,
    force: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, layer: None,
) -> ConvertReport:
    """Write a checkpoint in another format, layer by layer, and say what became of each.

    Two passes, of which the second writes: what is wrong with the source shows before. Never more than one layer is in
    memory. The target appears when it is complete.

    Args:
        source: a safetensors file or a directory. In a directory, files that hold no weights are copied,
            config.json with its `quantization_config` brought up to date.
        target: a file or a directory, as `source` is.
        to: "dense", "sparsekern", "sparse-24-bitmask" or "cutlass". A layer that has no place in it stays, or
            becomes, dense.
        source_format: as `to`, or "marlin-24" or "gptq-marlin-24", which are dequantised to fp16. By default what the
            tensors' names say.
        select: called with the name of a weight (``x.weight``); layers it says no to are copied as they are.
        prune: called with the name of a dense weight; where it says yes, the two largest of each four are kept. Others
            are packed only if they are 2:4 already.
        force: replace `target`.
        progress: called with bytes done, bytes in all, and the layer that is next.

    Raises:
        ValueError: the source is not what it says it is, or `target` cannot be written; nothing is left behind then.

    Packed to packed is exact, byte for byte. Dense to packed makes zeros +0.0.
    """
    source, target = Path(source), Path(target)
    if to not in WRITABLE:
        raise ValueError(f"convert: to is {to!r}; it takes one of {', '.join(WRITABLE)}")
    if source_format not in (None, *READABLE):
        raise ValueError(
            f"convert: source_format is {source_format!r}; it takes one of {', '.join(READABLE)}"
        )
    _check_target(source, target, force)
    checkpoint = Checkpoint(source)
    report = ConvertReport(
        source_format or guess_format(checkpoint.file_of.keys()), source_format is None, to
    )
    run = _Run(checkpoint, report, select, prune, progress)
    run.plan()
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        if source.is_dir():
            partial.mkdir()
            run.write_directory(partial)
        else:
            run.write_file(source.name, partial)
        _replace(partial, target)
    finally:
        _remove(partial)
    return report


class _Run:
    """One conversion: what becomes of every tensor, and the writing of it."""

    def __init__(self, checkpoint: Checkpoint, report: ConvertReport, select, prune, progress):
        self.checkpoint, self.report = checkpoint, report
        self.prune, self.progress = prune, progress
        layers = find_layers(checkpoint, report.source_format)
        self.layers = [layer for layer in layers if select is None or select(layer.weight)]
        self.unselected = [layer for layer in layers if layer not in self.layers]
        # By file: what will be in it, which tensors are copied, which layers are written anew.
        self.specs: dict[str, dict[str, Spec]] = {file: {} for file in checkpoint.readers}
        self.in_features: dict[str, dict[str, int]] = {file: {} for file in checkpoint.readers}
        self.copied: dict[str, list[str]] = {file: [] for file in checkpoint.readers}
        self.rewritten: dict[str, list[Layer]] = {file: [] for file in checkpoint.readers}
        # Each of two passes goes over every byte once.
        self._done, self._total = 0, 2 * sum(checkpoint.spec(t).nbytes for t in checkpoint.file_of)

    def _step(self, names: Iterable[str], what: str) -> None:
        self._done += sum(self.checkpoint.spec(name).nbytes for name in names)
        self.progress(self._done, self._total, what)

    def plan(self) -> None:
        """The first pass: convert each layer and forget it, all but the sizes."""
        rest = dict(self.checkpoint.file_of)
        for layer in self.layers:
            entry, tensors = self._convert(layer)
            self.report.layers.append(entry)
            # A layer's tensors may be spread over files; the new ones go together.
            file = self.checkpoint.file_of[layer.tensors[0]]
            if tensors is None:
                self._copy(layer.tensors[0])
            else:
                for name, t in tensors.items():
                    self._announce(file, name, Spec.of(t))
                self.rewritten[file].append(layer)
            if entry.target == "sparsekern" and entry.shape[1] % 4:
                self.in_features[file][layer.name] = entry.shape[1]
            for name in layer.tensors:
                del rest[name]
            self._step(layer.tensors, layer.name)
        for layer in self.unselected:
            if layer.in_features is not None:
                file = self.checkpoint.file_of[layer.tensors[0]]
                self.in_features[file][layer.name] = layer.in_features
        for name in rest:
            self._copy(name)
            self.report.other_tensors += 1
            self.report.other_bytes += self.checkpoint.spec(name).nbytes
        self._step(rest, "")
        packed = [e.name for e in self.report.layers if e.target == "sparse-24-bitmask"]
        packed += [e.weight for e in self.unselected if e.source == "sparse-24-bitmask"]
        self.report.quantization_config = _bitmask_config(packed) if packed else None

    def _convert(self, layer: Layer) -> tuple[ConvertedLayer, dict[str, Tensor] | None]:
        prune = (
            layer.source == "dense" and self.prune is not None and bool(self.prune(layer.weight))
        )
        try:
            return _convert_layer(self.checkpoint, layer, self.report.target_format, prune)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.checkpoint.path}: {layer.weight}: {error}") from None

    def _copy(self, name: str) -> None:
        file = self.checkpoint.file_of[name]
        self._announce(file, name, self.checkpoint.spec(name))
        self.copied[file].append(name)

    def _announce(self, file: str, name: str, spec: Spec) -> None:
        if any(name in specs for specs in self.specs.values()):
            raise ValueError(f"{self.checkpoint.path}: there would be two tensors {name}")
        self.specs[file][name] = spec

    def write_file(self, file: str, path: Path) -> None:
        """The second pass, over one file."""
        metadata = dict(self.checkpoint.readers[file].metadata)
        metadata.pop(IN_FEATURES, None)
        if self.in_features[file]:
            metadata[IN_FEATURES] = json.dumps(self.in_features[file])
        with Writer(path, self.specs[file], metadata) as writer:
            for name in self.copied[file]:
                writer.copy(name, self.checkpoint.reader(name), name)
                self._step([name], name)
            for layer in self.rewritten[file]:
                _, tensors = self._convert(layer)
                if tensors is None:
                    raise ValueError(f"{layer.weight} is not 2:4 any more: the source changes")
                for name, t in tensors.items():
                    writer.write(name, t)
                self._step(layer.tensors, layer.name)

    def write_directory(self, path: Path) -> None:
        """The second pass: every file, the index, and what else the directory has."""
        for file in self.checkpoint.readers:
            self.write_file(file, path / file)
        if self.checkpoint.index is not None:
            weight_map = {name: file for file, specs in self.specs.items() for name in specs}
            size = sum(spec.nbytes for specs in self.specs.values() for spec in specs.values())
            metadata = self.checkpoint.index.get("metadata")
            metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
            index = {**self.checkpoint.index, "metadata": metadata, "weight_map": weight_map}
            (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        for other in sorted(self.checkpoint.path.iterdir()):
            if (path / other.name).exists():
                continue
            if other.name == "config.json":
                self._write_config(other, path / other.name)
            elif other.is_file() and not other.name.endswith(_OTHER_WEIGHTS):
                shutil.copyfile(other, path / other.name)
            else:
                self.report.left_out.append(other.name)

    def _write_config(self, source: Path, target: Path) -> None:
        try:
            config = json.loads(source.read_text("utf-8"))
            quantization = dict(config.pop("quantization_config", None) or {})
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f"{source} is no model's configuration: {error!r}") from None
        report = self.report
        if report.source_format == "sparse-24-bitmask" and not report.quantization_config:
            quantization.pop("sparsity_config", None)
            if not any(v for k, v in quantization.items() if k not in ("quant_method", "version")):
                quantization = {}
        left = any(layer.source != "dense" for layer in self.unselected)
        if report.source_format.endswith("marlin-24") and not left:
            quantization = {}  # nothing is quantised any more
        if report.quantization_config:
            method = quantization.get("quant_method", "compressed-tensors")
            if method != "compressed-tensors":
                raise ValueError(
                    f"{source} has a quantization_config of {method}, beside which sparse-24-bitmask has no place"
                )
            quantization |= {
                k: v
                for k, v in report.quantization_config.items()
                if k == "sparsity_config" or k not in quantization
            }
            report.quantization_config = quantization
        if quantization:
            config["quantization_config"] = quantization
        target.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        report.config_written = True


def _bitmask_config(weights: list[str]) -> dict:
    """What compressed-tensors and what loads its checkpoints look for in config.json."""
    return {
        "quant_method": "compressed-tensors",
        "version": "0.12.2",
        "sparsity_config": {
            "format": "sparse-24-bitmask",
            "global_sparsity": 0.5,
            "ignore": [],
            "sparsity_structure": "2:4",
            "targets": [name.removesuffix(".weight") for name in weights],
        },
    }


# ---- where it goes ----


def _check_target(source: Path, target: Path, force: bool) -> None:
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(
            f"convert: target is {target}; it takes a place apart from the source, {source}"
        )
    if not source.exists():
        raise ValueError(f"convert: there is no {source}")
    if not target.parent.is_dir():
        raise ValueError(f"convert: target is {target}; there is no folder {target.parent}")
    if not target.exists():
        return
    if not force:
        raise ValueError(f"convert: {target} exists (--force replaces it)")
    if target.is_dir() != source.is_dir():
        raise ValueError(f"convert: {target} and {source} are not both files or both directories")
    # A slip of the hand must not cost a home directory.
    if target.is_dir() and not any(target.glob("*.safetensors")):
        raise ValueError(f"convert: {target} holds no safetensors file; it is not replaced")


def _replace(partial: Path, target: Path) -> None:
    """Put what is complete in its place."""
    if not target.is_dir():
        os.replace(partial, target)
        return
    old = partial.with_suffix(".old")
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
