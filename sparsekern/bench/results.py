"""What was measured: rows, and the files they are written to and read from."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from .clock import Spread, ratio_of

VERSION = 1


@dataclass
class Peer:
    """Another way to the same result in the same rounds. `ratio` is its time over ours: above 1 ours is faster.

    `missing` says why it was not measured, where it was not.
    """

    ms: Spread | None = None
    ratio: Spread | None = None
    missing: str = ""
    compression: float | None = None  # of a codec: bytes before over after


@dataclass
class Row:
    """One op in one case on one device.

    Attributes:
        op: of the library.
        suite: the word of the command line it belongs to.
        case: what is measured, by name: M, N, K; or bytes and zeros.
        label: the case in words.
        backend, kernel: what served it, and its variant (the CPU's tier, a GPU's kernel).
        graph: whether it ran as a replayed CUDA graph.
        nbytes: read and written at the least.
        flop: of the dense product, 0 where there is none.
        bound_ms: what the measured ceilings allow for `nbytes` and for half of `flop`.
        error: RMS error against float64 over that of torch's own product; None where not checked.
        exact: whether the bits are right, for what has one answer; None where not checked.
    """

    op: str
    suite: str
    case: dict[str, float | str]
    label: str
    dtype: str
    device: str
    threads: int
    backend: str
    kernel: str = ""
    graph: bool = False
    ms: Spread | None = None
    nbytes: int = 0
    flop: int = 0
    bound_ms: float | None = None
    compression: float | None = None
    error: float | None = None
    exact: bool | None = None
    wrong: str = ""  # what --check found
    peers: dict[str, Peer] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The same for the same measurement in another run."""
        case = " ".join(f"{k}={v}" for k, v in self.case.items())
        graph = " graph" if self.graph else ""
        return f"{self.op} {case} {self.dtype} {self.device} {self.threads} {self.backend}{graph}"

    @property
    def gbs(self) -> float | None:
        """GB/s of the bytes that have to move."""
        return self.nbytes / self.ms.median / 1e6 if self.ms and self.nbytes else None

    @property
    def tflops(self) -> float | None:
        """Dense-equivalent TFLOP/s: 2MNK over our time."""
        return self.flop / self.ms.median / 1e9 if self.ms and self.flop else None

    @property
    def share(self) -> float | None:
        """Of what the ceilings measured in the same run allow; 1 is the limit."""
        return self.bound_ms / self.ms.median if self.ms and self.bound_ms else None

    def timed(self, samples: dict[str, list[float]], ours: str, peers: list[str]) -> Row:
        """Fills in the times out of what `interleave` gave."""
        mine = samples[ours]
        self.ms = Spread.of(mine)
        for name in peers:
            self.peers[name] = Peer(Spread.of(samples[name]), ratio_of(samples[name], mine))
        return self


@dataclass
class Ceiling:
    """What this device reached in this run: `rate` in GB/s for a copy, GFLOP/s for a dense product."""

    kind: str
    dtype: str
    threads: int
    rate: float


@dataclass
class Results:
    """Everything of one run; the JSON file is this."""

    machine: dict
    command: str
    rows: list[Row] = field(default_factory=list)
    ceilings: list[Ceiling] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # cases that raised, with the error
    interrupted: str = ""
    seconds: float = 0.0

    @property
    def wrong(self) -> list[Row]:
        return [row for row in self.rows if row.wrong]

    def ceiling(self, kind: str, dtype: str, threads: int) -> float | None:
        found = (
            c.rate for c in self.ceilings if (c.kind, c.dtype, c.threads) == (kind, dtype, threads)
        )
        return next(found, None)

    # ---- files ----

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = "the file") -> Results:
        """What :meth:`to_json` wrote.

        Raises:
            ValueError: it is something else; names the field.
        """
        try:
            found = json.loads(text)
            if found["version"] != VERSION:
                raise ValueError(f"has version {found['version']}, this is {VERSION}")
            rows = [_row(row) for row in found["rows"]]
            ceilings = [Ceiling(**c) for c in found["ceilings"]]
            return cls(
                machine=dict(found["machine"]),
                command=str(found["command"]),
                rows=rows,
                ceilings=ceilings,
                failed=list(found["failed"]),
                interrupted=str(found["interrupted"]),
                seconds=float(found["seconds"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{name} is no result of sparsekern bench: {error}") from None

    @classmethod
    def read(cls, path: Path) -> Results:
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        return cls.from_json(text, str(path))

    def to_csv(self) -> str:
        """A line per row and peer."""
        names = ["op", "label", "dtype", "device", "threads", "backend", "kernel", "graph"]
        head = [*names, "ms", "p10", "p90", "rounds", "GB/s", "TFLOP/s", "share", "compression"]
        head += ["error", "exact", "peer", "peer_ms", "ratio", "ratio_p10", "ratio_p90", "missing"]
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        table.writerow(head)
        for row in self.rows:
            own = [getattr(row, name) for name in names]
            own += [row.ms.median, row.ms.p10, row.ms.p90, row.ms.count] if row.ms else [""] * 4
            own += [row.gbs, row.tflops, row.share, row.compression, row.error, row.exact]
            for name, peer in (row.peers or {"": Peer()}).items():
                r = peer.ratio
                theirs = [name, peer.ms.median if peer.ms else ""]
                theirs += [r.median, r.p10, r.p90] if r else [""] * 3
                table.writerow(["" if v is None else v for v in [*own, *theirs, peer.missing]])
        return out.getvalue()


def _spread(found: dict | None) -> Spread | None:
    if found is None:
        return None
    made = Spread(**found)
    if not all(isinstance(v, (int, float)) for v in found.values()) or made.median <= 0:
        raise ValueError(f"a spread is {found}")
    return made


def _row(found: dict) -> Row:
    row = Row(**{f.name: found[f.name] for f in fields(Row)})
    row.ms = _spread(row.ms)
    row.peers = {
        name: Peer(_spread(p["ms"]), _spread(p["ratio"]), p["missing"], p["compression"])
        for name, p in row.peers.items()
    }
    return row
