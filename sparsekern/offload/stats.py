"""What an offload did: counted per module, per step and in total; bytes saved now and at the peak."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .lock import LOCK

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase
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
        copied: bytes moved "out" to the host and "in" again so far.
        copy_seconds: host time that took; on a device with streams, to start the copies.
    """

    def __init__(self, max_host_bytes: int | None):
        self.max_host_bytes = max_host_bytes
        self.now = {"plain": 0, "device": 0, "host": 0}
        self.peak = dict(self.now)
        self.copied = {"out": 0, "in": 0}
        self.copy_seconds = 0.0
        self.curve: list[tuple[float, int, int, int]] | None = None  # what `record` asked for

    def add(self, **changes: int) -> None:
        with LOCK:
            for name, change in changes.items():
                self.now[name] += change
                self.peak[name] = max(self.peak[name], self.now[name])
            if self.curve is not None:
                self.curve.append((time.perf_counter(), *self.now.values()))

    def copy(self, direction: str, nbytes: int, seconds: float) -> None:
        with LOCK:
            self.copied[direction] += nbytes
            self.copy_seconds += seconds

    def record(self) -> list[tuple[float, int, int, int]]:
        """From now on keep (seconds of perf_counter, plain, device, host) at every change, in the list returned."""
        self.curve = [(time.perf_counter(), *self.now.values())]
        return self.curve

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
        entered: steps so far; a step is one ``with``.
        steps: the same as `modules`, step by step, the last thousand.
        retreats: why something stayed on the device or was not pinned, to how often.
        pack_seconds, unpack_seconds: host time in the two hooks.
        wait_seconds: of these, host time waiting for the device.
    """

    def __init__(self, max_host_bytes: int | None = None):
        self.modules: dict[str, ModuleStats] = {}
        self.entered = 0
        self.steps: deque[dict[str, ModuleStats]] = deque(maxlen=STEPS)
        self.retreats: Counter = Counter()
        self.pack_seconds = 0.0
        self.unpack_seconds = 0.0
        self.wait_seconds = 0.0
        self.ledger = Ledger(max_host_bytes)

    # ---- counting ----

    def start_step(self) -> None:
        self.entered += 1
        self.steps.append({})

    def count(
        self,
        module: str,
        *,
        seen: int = 0,
        shared: int = 0,
        packed: str = "",
        kept: str = "",
        bytes_before: int = 0,
        bytes_after: int = 0,
        elements: int = 0,
        nonzeros: int = 0,
    ) -> None:
        """Add to a module, in the running step and in total. Every saved tensor pays for this."""
        with LOCK:
            for where in (self.modules, self.steps[-1]):
                m = where.get(module)
                if m is None:
                    m = where[module] = ModuleStats()
                m.seen += seen
                m.shared += shared
                m.bytes_before += bytes_before
                m.bytes_after += bytes_after
                m.elements += elements
                m.nonzeros += nonzeros
                if packed:
                    m.packed[packed] += 1
                if kept:
                    m.kept[kept] += 1

    # ---- reading ----

    @property
    def total(self) -> ModuleStats:
        """All modules together."""
        total = ModuleStats()
        for m in list(self.modules.values()):
            total.add(m)
        return total

    @property
    def peak_bytes(self) -> dict[str, int]:
        """Peaks of saved bytes, "plain" without the offload, "device" and "host" with it."""
        return dict(self.ledger.peak)

    def as_dict(self) -> dict:
        return {
            "modules": {name: m.as_dict() for name, m in self.modules.items()},
            "total": self.total.as_dict(),
            "steps": self.entered,
            "retreats": dict(self.retreats),
            "peak_bytes": self.peak_bytes,
            "pack_seconds": self.pack_seconds,
            "unpack_seconds": self.unpack_seconds,
            "wait_seconds": self.wait_seconds,
            "copy_seconds": self.ledger.copy_seconds,
            "copied_bytes": dict(self.ledger.copied),
        }

    def table(self) -> Table:
        """A rich table: a row a module, the total last; numbers of tensors and bytes are means over the steps."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        peak, steps = self.ledger.peak, max(self.entered, 1)
        seconds = (
            self.pack_seconds,
            self.unpack_seconds,
            self.ledger.copy_seconds,
            self.wait_seconds,
        )
        forward, backward, copying, waiting = (s / steps * 1e3 for s in seconds)
        table = Table(
            box=box.SIMPLE_HEAD,
            caption=(
                f"per step, mean of {steps}. Saved at the peak: {_mb(peak['plain'])} without, "
                f"{_mb(peak['device'])} on the device and {_mb(peak['host'])} on the host with. In the hooks: "
                f"{forward:.1f} ms forward, {backward:.1f} ms backward, of these {copying:.1f} ms copying and "
                f"{waiting:.1f} ms waiting."
                + "".join(f" {why}: {n}." for why, n in self.retreats.items())
            ),
            caption_justify="left",
        )
        table.add_column("module", overflow="fold")
        table.add_column("saved", justify="right")
        table.add_column("became", overflow="fold")
        for name in ("MB", "packed MB", "ratio", "non-zero"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, m in self.modules.items():
            table.add_row(escape(name) or "(no module)", *_cells(m, steps))
        table.add_section()
        table.add_row("total", *_cells(self.total, steps), style="bold")
        return table

    def plot(self, path: str | Path | None = None) -> Figure:
        """Density and ratio of each module over the steps.

        Args:
            path: where to save the picture; its ending names the format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4.2), layout="constrained")
        self.draw(figure)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def draw(self, figure: FigureBase) -> None:
        """What :meth:`plot` shows, on a figure or subfigure of one's own."""
        from matplotlib import colormaps
        from matplotlib.ticker import MaxNLocator

        names = [n for n, m in self.modules.items() if m.elements]
        left, right = figure.subplots(1, 2)
        steps = list(enumerate(self.steps, self.entered - len(self.steps) + 1))
        for i, name in enumerate(names):
            at = [(n, s[name]) for n, s in steps if name in s and s[name].elements]
            style = {
                "color": colormaps["viridis"](i / max(len(names) - 1, 1) * 0.9),  # by depth
                "marker": "o" if len(at) == 1 else None,
                "label": name or "(no module)",
            }
            left.plot([n for n, _ in at], [m.density for _, m in at], **style)
            right.plot([n for n, _ in at], [m.ratio for _, m in at], **style)
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.spines[["top", "right"]].set_visible(False)
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
                frameon=False,
                ncols=1 + len(names) // 24,
            )

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def _cells(m: ModuleStats, steps: int) -> list[str]:
    became = [*m.packed.most_common(), ("shared", m.shared), *m.kept.most_common()]
    return [
        f"{m.seen / steps:.3g}",
        ", ".join(f"{n / steps:.3g} {what}" for what, n in became if n),
        f"{m.bytes_before / steps / 1e6:,.1f}" if m.bytes_before else "",
        f"{m.bytes_after / steps / 1e6:,.1f}" if m.bytes_before else "",
        f"{m.ratio:.2f}" if m.bytes_after else "",
        "" if m.density is None else f"{m.density:.1%}",
    ]
