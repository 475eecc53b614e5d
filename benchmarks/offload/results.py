"""What was measured, as dataclasses that go to JSON and back, and the sums that tables and pictures share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class MapBytes:
    """One map: share of elements that are not zero, its bytes in float32, and those in each of ``codecs.measured``."""

    layer: str
    kind: str
    shape: list[int]
    density: float
    nbytes: int
    formats: dict[str, float]

    def ratio(self, form: str) -> float:
        return ratio([self], form)


@dataclass
class SavedBytes:
    """What the storages that a layer saved last come to.

    Floats as they are, zero-value compressed one by one where that makes them smaller, and the same after
    rounding to bfloat16; integers as they are and in the narrowest type that holds them.
    """

    layer: str
    floats: int = 0
    floats_zvc: int = 0
    floats_zvc_bf16: int = 0
    shrunk: int = 0  # of `floats`, those that compression made smaller
    integers: int = 0
    integers_narrow: int = 0

    def ratio(self, itemsize: int) -> float:
        """Of the floats, for elements of 4 bytes or of 2."""
        packed = self.floats_zvc if itemsize == 4 else self.floats_zvc_bf16
        return self.floats * itemsize / 4 / packed if packed else 1.0


@dataclass
class Record:
    """One training step, after `step` updates of the weights."""

    step: int
    loss: float
    maps: list[MapBytes]
    saved: list[SavedBytes]
    parameter_bytes: int
    packed_bytes: int


@dataclass
class Trained:
    """A net, how it was trained, and what was seen meanwhile. `photograph` is its maps at the end for parts of one."""

    net: str
    description: str
    data: str
    size: int
    batch: int
    steps: int
    rate: float
    seed: int
    parameters: int
    losses: list[float] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    photograph: list[MapBytes] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        return len(self.losses) == self.steps

    @property
    def is_convolutional(self) -> bool:
        return any(m.kind == "conv" for m in self.records[0].maps)

    def papers(self, maps: Iterable[MapBytes]) -> list[MapBytes]:
        """Those whose zeros the paper counts: what convolutions and pools read, outputs of ReLUs and pools.

        Not the image, which the first convolution reads. In a transformer, what dense layers read.
        """
        if not self.is_convolutional:
            return [m for m in maps if m.kind == "dense"]
        return [m for m in list(maps)[1:] if m.kind in ("conv", "pool")]


@dataclass
class Prediction:
    """A net at the size of its publication on a machine: seconds of a step per image or sequence, and bytes.

    Each three values: without offload, moved raw, moved compressed.
    """

    net: str
    machine: str
    seconds: list[float]
    device_bytes: list[float]
    host_bytes: list[float]
    ratio: float

    @property
    def loss_raw(self) -> float:
        """Share of the speed without offload that moving raw costs."""
        return 1 - self.seconds[0] / self.seconds[1]

    @property
    def loss_compressed(self) -> float:
        return 1 - self.seconds[0] / self.seconds[2]

    @property
    def speedup(self) -> float:
        """Of compressed over raw."""
        return self.seconds[1] / self.seconds[2]


@dataclass
class Results:
    """Everything; the JSON file is this."""

    facts: dict[str, str | int]
    trained: dict[str, Trained] = field(default_factory=dict)
    predictions: list[Prediction] = field(default_factory=list)
    interrupted: str = ""

    @classmethod
    def from_json(cls, found: dict) -> Results:
        def record(r: dict) -> Record:
            maps = [MapBytes(**m) for m in r["maps"]]
            saved = [SavedBytes(**s) for s in r["saved"]]
            return Record(**(r | {"maps": maps, "saved": saved}))

        trained = {}
        for name, t in found["trained"].items():
            records = [record(r) for r in t["records"]]
            photograph = [MapBytes(**m) for m in t["photograph"]]
            trained[name] = Trained(**(t | {"records": records, "photograph": photograph}))
        predictions = [Prediction(**p) for p in found["predictions"]]
        return cls(found["facts"], trained, predictions, found["interrupted"])


# ---- sums ----


def ratio(maps: Iterable[MapBytes], form: str) -> float:
    """Bytes before over bytes after, of all together; bfloat16 formats against bfloat16."""
    maps = list(maps)
    before = sum(m.nbytes for m in maps) / (2 if "bf16" in form else 1)
    return before / sum(m.formats[form] for m in maps)


def density(maps: Iterable[MapBytes]) -> float:
    """Share of elements that are not zero, of all together."""
    maps = list(maps)
    return sum(m.density * m.nbytes for m in maps) / sum(m.nbytes for m in maps)


def total(saved: Iterable[SavedBytes], what: str) -> int:
    return sum(getattr(s, what) for s in saved)
