"""What an offload did: counted per module, per step and in total; bytes saved now and at the peak."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .lock import LOCK

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

STEPS = 1000  # of history


@dataclass
class ModuleStats:
    """Tensors saved in one module (or in all).

    Attributes:
        seen: tensors that autograd saved here.
        shared: of these, how many are a second look at memory that was packed already.
        packed: codec to tensors.
        kept: reason to tensors left alone.
        bytes_before, bytes_after: of what was packed; after, on the host and the device together.
        elements, nonzeros: of the tensors whose non-zero elements are known.
    """

    seen: int = 0
    shared: int = 0
    packed: Counter = field(default_factory=Counter)
    kept: Counter = field(default_factory=Counter)
    bytes_before: int = 0
    bytes_after: int = 0
    elements: int = 0
    nonzeros: int = 0

    @property
    def ratio(self) -> float:
        """Bytes before over bytes after, of what was packed; 1 where nothing was."""
        return self.bytes_before / self.bytes_after if self.bytes_after else 1.0

    @property
    def density(self) -> float | None:
        """Share of elements with a bit set, of the tensors where it is known."""
        return self.nonzeros / self.elements if self.elements else None

    def add(self, other: ModuleStats) -> None:
        for name in ("seen", "shared", "bytes_before", "bytes_after", "elements", "nonzeros"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.packed.update(other.packed)
        self.kept.update(other.kept)

    def as_dict(self) -> dict:
        return {
            **vars(self),
            "packed": dict(self.packed),
            "kept": dict(self.kept),
            "ratio": self.ratio,
            "density": self.density,
        }


class Ledger:
    """Bytes that backward still needs, now and at the peak, and the cap on the host's.

    Attributes (``.now`` and ``.peak`` each):
        plain: bytes autograd would hold of the same tensors, each memory counted once; no parameters.
        device: bytes held on the device: packed there, left alone, or not yet moved.
        host: bytes held on the host.
    """

    def __init__(self, max_host_bytes: int | None):
        self.max_host_bytes = max_host_bytes
        self.now = {"plain": 0, "device": 0, "host": 0}
        self.peak = dict(self.now)
        self.curve: list[tuple[int, int, int]] | None = (
            None  # (plain, device, host) at every change
        )

    def add(self, **changes: int) -> None:
        with LOCK:
            for name, change in changes.items():
                self.now[name] += change
                self.peak[name] = max(self.peak[name], self.now[name])
            if self.curve is not None:
                self.curve.append((self.now["plain"], self.now["device"], self.now["host"]))

    def reserve_host(self, nbytes: int) -> bool:
        """Count `nbytes` on the host, or say that they would be past the cap."""
        with LOCK:
            cap = self.max_host_bytes
            if cap is not None and self.now["host"] + nbytes > cap:
                return False
            self.add(host=nbytes)
            return True


class Stats:
    """What an offload has done since it was made. ``print(offload.stats)`` shows the table.

    Attributes:
        modules: qualified name to :class:`ModuleStats`; "" is code outside any module.
        steps: the same, step by step (a step is one ``with``), the last thousand.
        retreats: why something stayed on the device or was not pinned, to how often.
        pack_seconds, unpack_seconds: host time in the two hooks.
        wait_seconds: of these, host time waiting for the device.
    """

    def __init__(self, max_host_bytes: int | None = None):
        self.modules: dict[str, ModuleStats] = {}
        self.steps: deque[dict[str, ModuleStats]] = deque(maxlen=STEPS)
        self.retreats: Counter = Counter()
        self.pack_seconds = 0.0
        self.unpack_seconds = 0.0
        self.wait_seconds = 0.0
        self.ledger = Ledger(max_host_bytes)

    # ---- counting ----

    def start_step(self) -> None:
        self.steps.append({})

    def count(self, module: str, **changes) -> None:
        """Add to a module: plain numbers to its fields, `packed` and `kept` by name."""
        change = ModuleStats(
            **{k: Counter([v]) if k in ("packed", "kept") else v for k, v in changes.items()}
        )
        with LOCK:
            for where in (self.modules, self.steps[-1]) if self.steps else (self.modules,):
                where.setdefault(module, ModuleStats()).add(change)

    # ---- reading ----

    @property
    def total(self) -> ModuleStats:
        total = ModuleStats()
        for m in list(self.modules.values()):
            total.add(m)
        return total

    @property
    def peak_bytes(self) -> dict[str, int]:
        """Peaks of saved bytes: "plain" without the offload, "device" and "host" with it."""
        return dict(self.ledger.peak)

    def as_dict(self) -> dict:
        return {
            "modules": {name: m.as_dict() for name, m in self.modules.items()},
            "total": self.total.as_dict(),
            "steps": len(self.steps),
            "retreats": dict(self.retreats),
            "peak_bytes": self.peak_bytes,
            "pack_seconds": self.pack_seconds,
            "unpack_seconds": self.unpack_seconds,
            "wait_seconds": self.wait_seconds,
        }

    def table(self) -> Table:
        """A rich table: a row a module, the total last."""
        from rich import box
        from rich.table import Table

        peak = self.ledger.peak
        table = Table(
            box=box.SIMPLE_HEAD,
            caption=(
                f"saved at the peak: {_mb(peak['plain'])} without, {_mb(peak['device'])} on the device and "
                f"{_mb(peak['host'])} on the host with; in the hooks {self.pack_seconds:.2f} s forward, "
                f"{self.unpack_seconds:.2f} s backward"
                + "".join(f"; {why}: {n}" for why, n in self.retreats.items())
            ),
            caption_justify="left",
        )
        for name, justify in (
            ("module", "left"),
            ("saved", "right"),
            ("packed", "left"),
            ("left alone", "left"),
            ("MB before", "right"),
            ("MB after", "right"),
            ("ratio", "right"),
            ("non-zero", "right"),
        ):
            table.add_column(name, justify=justify)
        for name, m in self.modules.items():
            table.add_row(name or "(outside modules)", *_cells(m))
        table.add_section()
        table.add_row("total", *_cells(self.total), style="bold")
        return table

    def plot(self, path: str | Path | None = None) -> Figure:
        """Density and ratio of each module over the steps.

        Args:
            path: where to save the picture; its ending names the format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        names = [n for n, m in self.modules.items() if m.elements]
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        steps = list(self.steps)
        for name in names:
            at = [(i, s[name]) for i, s in enumerate(steps, 1) if name in s and s[name].elements]
            label = name or "(outside modules)"
            marker = "o" if len(at) == 1 else None
            i = [i for i, _ in at]
            left.plot(i, [m.density for _, m in at], marker=marker, label=label)
            right.plot(i, [m.ratio for _, m in at], marker=marker, label=label)
        left.set(xlabel="step", ylabel="non-zero elements", ylim=(0, 1), title="Density")
        right.set(
            xlabel="step",
            ylabel="bytes before / after",
            title="Compression ratio",
            ylim=(0, None) if names else (0, 1),
        )
        if names:
            figure.legend(
                *left.get_legend_handles_labels(),
                loc="outside right upper",
                fontsize="x-small",
                ncols=1 + len(names) // 24,
            )
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def _counts(counter: Counter) -> str:
    return ", ".join(f"{n} {name}" for name, n in counter.most_common())


def _cells(m: ModuleStats) -> list[str]:
    packed = _counts(m.packed) + (f", {m.shared} shared" if m.shared else "")
    return [
        str(m.seen),
        packed.removeprefix(", "),
        _counts(m.kept),
        f"{m.bytes_before / 1e6:,.1f}" if m.bytes_before else "",
        f"{m.bytes_after / 1e6:,.1f}" if m.bytes_before else "",
        f"{m.ratio:.2f}" if m.bytes_after else "",
        "" if m.density is None else f"{m.density:.1%}",
    ]
