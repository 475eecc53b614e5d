"""A checkpoint on disk: one safetensors file, or several and their index, as one set of tensors."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from .container import Reader, Spec

INDEX = "model.safetensors.index.json"
IN_FEATURES = "sparsekern.in_features"


class Checkpoint:
    """The safetensors files of a path.

    Attributes:
        readers: by the file's name.
        file_of: the file's name by the tensor's.
        index: what the index says besides the files, or None without one.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.index = path, None
        if not path.is_dir():
            names = {path.name: None}
            folder = path.parent
        elif (path / INDEX).exists():
            weight_map, self.index = _read_index(path / INDEX)
            names, folder = dict.fromkeys(weight_map.values()), path
        else:
            names, folder = {p.name: None for p in sorted(path.glob("*.safetensors"))}, path
            if len(names) != 1:
                raise ValueError(
                    f"{path} has {len(names)} safetensors files and no {INDEX}; it takes one file, or an index"
                )
        for name in names:
            if not (folder / name).is_file():
                raise ValueError(f"{path}: there is no file {name}")
        self.readers = {name: Reader(folder / name) for name in names}
        self.file_of = {}
        for file, reader in self.readers.items():
            for tensor in reader.specs:
                if tensor in self.file_of:
                    raise ValueError(f"{path}: {tensor} is in {self.file_of[tensor]} and in {file}")
                self.file_of[tensor] = file
        if self.index is not None and self.file_of != weight_map:
            wrong = sorted(
                name
                for name in self.file_of.keys() | weight_map.keys()
                if self.file_of.get(name) != weight_map.get(name)
            )
            name = wrong[0]
            raise ValueError(
                f"{path / INDEX} has {name} in {weight_map.get(name, 'no file')}; it is in "
                f"{self.file_of.get(name, 'none')}"
            )

    def reader(self, tensor: str) -> Reader:
        return self.readers[self.file_of[tensor]]

    def spec(self, tensor: str) -> Spec:
        return self.reader(tensor).specs[tensor]

    def read(self, tensor: str) -> Tensor:
        return self.reader(tensor).tensor(tensor)

    def in_features(self) -> dict[str, int]:
        """By layer, where the metadata say so."""
        found = {}
        for reader in self.readers.values():
            try:
                entries = json.loads(reader.metadata.get(IN_FEATURES, "{}"))
                if not all(type(K) is int for K in entries.values()):
                    raise ValueError("not all are integers")
            except (ValueError, AttributeError, RecursionError) as error:
                raise ValueError(
                    f"{reader.path}: metadata {IN_FEATURES} must be JSON, integers by layer: {error}"
                ) from None
            found |= entries
        return found


def _read_index(path: Path) -> tuple[dict[str, str], dict]:
    """The file of each tensor, and the rest."""
    try:
        index = json.loads(path.read_text("utf-8"))
        weight_map = index.pop("weight_map")
        # Files of the same folder only: an index is no way to any other.
        sound = bool(weight_map) and all(
            isinstance(f, str) and Path(f).name == f for f in weight_map.values()
        )
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no index of safetensors: {error!r}") from None
    if not sound:
        raise ValueError(f"{path}: weight_map must name files of its own folder")
    return weight_map, index
