"""``sparsekern offload-report``: what activation offload would give a network, measured by training it a little.

Steps without and with the offload alternate on one model. Before that one step is run both ways from the same
state and the gradients are compared bit by bit; its bytes over time are the memory curve.
"""

from __future__ import annotations

import contextlib
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from .. import factory
from . import ActivationOffload, offload_activations
from .nets import NETS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Step = Callable[[], Tensor]  # a forward pass: the loss

_COLOURS = {"without": "#5b7083", "device": "#d9772b", "host": "#8b5a9e"}


class ReportError(ValueError):
    """Bad input; the message is all a user needs."""


@dataclass(frozen=True)
class Settings:
    """What to report on. `net` is a name of `nets.NETS` or ``package.module:factory``."""

    net: str
    batch: int = 32
    size: int | None = None
    steps: int = 10
    to: str = "auto"
    min_bytes: int = 256 << 10
    min_ratio: float = 1.25
    max_host_bytes: int | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    seed: int = 0
    out: Path | None = None


@dataclass
class Report:
    """What was measured. Bytes are those that backward needs, parameters left out; times are host seconds.

    Attributes:
        identical: gradients with the offload are bit for bit those without.
        reproducible: two runs without it agree bit for bit; where they do not, `identical` says nothing.
        without, with_offload: seconds of each step, alternating.
        curve: [(seconds, without, device, host)] over one step.
        allocated: peak of the device's allocator in a step without and with, where there is one.
        stats: the offload's own, over all steps.
    """

    settings: Settings
    model: str
    parameters: int
    identical: bool
    reproducible: bool
    without: list[float] = field(default_factory=list)
    with_offload: list[float] = field(default_factory=list)
    curve: list[tuple[float, int, int, int]] = field(default_factory=list)
    allocated: tuple[int, int] | None = None
    offload: ActivationOffload | None = None

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes at the peak of the step that the curve shows."""
        columns = list(zip(*self.curve, strict=True))[1:]
        return {n: max(c) for n, c in zip(("without", "device", "host"), columns, strict=True)}

    @property
    def cost(self) -> tuple[float, float, float]:
        """Time of a step with the offload over that of the step without before it: 10 %, median, 90 %."""
        ratios = [b / a for a, b in zip(self.without, self.with_offload, strict=True)]
        if len(ratios) < 2:
            return ratios[0], ratios[0], ratios[0]
        tenths = statistics.quantiles(ratios, n=10, method="inclusive")
        return tenths[0], statistics.median(ratios), tenths[-1]

    def as_dict(self) -> dict:
        settings = {
            k: v if isinstance(v, (int, float, type(None))) else str(v)
            for k, v in asdict(self.settings).items()
        }
        return {
            "settings": settings,
            "torch": torch.__version__,
            "model": self.model,
            "parameters": self.parameters,
            "gradients_identical": self.identical,
            "reproducible": self.reproducible,
            "seconds_without": self.without,
            "seconds_with": self.with_offload,
            "peak_bytes": self.peaks,
            "allocated_bytes": self.allocated,
            "curve": self.curve,
            "stats": self.offload.stats.as_dict(),
        }


def run(settings: Settings, console: Console | None = None) -> Report:
    """Measure. A progress bar on `console`, if there is one.

    Raises:
        ReportError: no such net or factory, or a setting outside its range.
    """
    device = _device(settings.device)
    torch.manual_seed(settings.seed)
    model, step = _load(settings, device)
    try:
        offload = offload_activations(
            settings.to,
            min_bytes=settings.min_bytes,
            min_ratio=settings.min_ratio,
            max_host_bytes=settings.max_host_bytes,
        )
    except ValueError as error:
        raise ReportError(str(error)) from None
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)

    first, peak_without = _gradients(model, step, contextlib.nullcontext(), device)
    again, _ = _gradients(model, step, contextlib.nullcontext(), device)
    report = Report(
        settings,
        model=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        identical=False,
        reproducible=_same(first, again),
        offload=offload,
    )
    trial = offload_activations(
        settings.to,
        min_bytes=settings.min_bytes,
        min_ratio=settings.min_ratio,
        max_host_bytes=settings.max_host_bytes,
    )
    curve = trial.stats.ledger.record()
    with_it, peak_with = _gradients(model, step, trial, device)
    report.curve = [(at - curve[0][0], *rest) for at, *rest in curve]
    report.identical = _same(first, with_it)
    if peak_with is not None:
        report.allocated = peak_without, peak_with
    del first, again, with_it

    with _progress(console) as progress:
        task = progress.add_task(f"training {settings.net}", total=settings.steps)
        for _ in range(settings.steps):
            for context, times in (
                (contextlib.nullcontext(), report.without),
                (offload, report.with_offload),
            ):
                times.append(_train(model, step, optimiser, context, device))
            progress.advance(task)
    return report


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ReportError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def _load(settings: Settings, device: torch.device) -> tuple[nn.Module, Step]:
    """The model, and what runs it forward to a loss."""
    net = NETS.get(settings.net)
    if net is not None:
        try:
            model = net.build(**({} if settings.size is None else {"size": settings.size}))
        except ValueError as error:
            raise ReportError(str(error)) from None
        model.to(device, settings.dtype)
        inputs, targets = net.batch(settings.batch, device, settings.dtype, size=settings.size)
        return model, lambda: net.loss(model, inputs, targets)
    if ":" not in settings.net:
        raise ReportError(
            f"no net {settings.net!r}; it takes one of {', '.join(NETS)}, or package.module:factory, where factory() "
            "returns (model, step) and step() runs a forward pass and returns the loss"
        )
    try:
        made = factory.call(settings.net)
    except factory.FactoryError as error:
        raise ReportError(str(error)) from error
    if not (
        isinstance(made, tuple)
        and len(made) == 2
        and isinstance(made[0], nn.Module)
        and callable(made[1])
    ):
        raise ReportError(
            f"{settings.net}() returned {type(made).__name__}; it takes (model, step): an nn.Module and what "
            "runs a forward pass and returns the loss"
        )
    return made


def _gradients(model: nn.Module, step: Step, context, device: torch.device):
    """Every gradient of one step from the present state, which is left as it was; and the allocator's peak."""
    state = copy.deepcopy([b for b in model.buffers()])
    accelerated = device.type != "cpu"
    model.zero_grad(set_to_none=True)
    if accelerated:
        torch.accelerator.reset_peak_memory_stats(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        with context:
            loss = step()
        loss.backward()
    peak = torch.accelerator.max_memory_allocated(device) if accelerated else None
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), state, strict=True):
            buffer.copy_(before)
    return gradients, peak


def _same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return all(
        x is y if x is None or y is None else torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


def _train(model: nn.Module, step: Step, optimiser, context, device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    optimiser.zero_grad(set_to_none=True)
    with context:
        loss = step()
    loss.backward()
    optimiser.step()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


@contextlib.contextmanager
def _progress(console: Console | None) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=console is None) as progress:
        yield progress


# ---- what people see ----


def verdict(report: Report) -> list[str]:
    """What a user would gain and pay, in sentences."""
    peaks, stats = report.peaks, report.offload.stats
    low, middle, high = report.cost
    saved = 1 - peaks["device"] / peaks["without"] if peaks["without"] else 0.0
    host = f", {peaks['host'] / 1e6:,.1f} MB on the host" if peaks["host"] else ""
    lines = [
        f"At the peak autograd holds {peaks['without'] / 1e6:,.1f} MB of activations without it, "
        f"{peaks['device'] / 1e6:,.1f} MB on the device with it{host}: {saved:.0%} less on the device.",
        f"What was packed takes {stats.total.ratio:.2f} times fewer bytes.",
        f"A step takes {middle:.2f} times as long (10 % and 90 %: {low:.2f}, {high:.2f}; "
        f"{statistics.median(report.without) * 1e3:,.1f} ms without).",
    ]
    if report.allocated is not None:
        before, after = report.allocated
        lines.append(
            f"The device's allocator peaked at {before / 1e6:,.1f} MB without, {after / 1e6:,.1f} MB with."
        )
    if report.identical:
        lines.append("Gradients are bit for bit the same.")
    elif not report.reproducible:
        lines.append(
            "This network's gradients differ from run to run without the offload already, so they were not compared."
        )
    else:
        lines.append("GRADIENTS DIFFER with the offload: please report this.")
    return lines


def draw(report: Report) -> Figure:
    """Bytes over one step without and with, and density and ratio by module over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    axes = top.subplots()
    times, without, device, host = zip(*report.curve, strict=True)
    ms = [t * 1e3 for t in times]
    for values, name, label in (
        (without, "without", "without the offload"),
        (device, "device", "with: on the device"),
        (host, "host", "with: on the host"),
    ):
        if any(values):
            axes.step(
                ms, [v / 1e6 for v in values], where="post", color=_COLOURS[name], label=label
            )
    axes.set(
        xlabel="ms of one step, forward then backward (with the offload)",
        ylabel="MB saved for backward",
        title=f"{report.settings.net}, batch {report.settings.batch}, to {report.settings.to}",
        ylim=(0, None),
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    report.offload.stats.draw(bottom)
    return figure


def show(report: Report, console: Console) -> None:
    """Print table and verdict, and write what `settings.out` asks for: report.json and report.png."""
    console.print(report.offload.stats.table())
    for line in verdict(report):
        console.print(line)
    out = report.settings.out
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report.as_dict(), indent=1))
    wrote = [out / "report.json"]
    try:
        draw(report).savefig(out / "report.png", dpi=150)
        wrote.append(out / "report.png")
    except ImportError:
        console.print("no picture: pip install 'sparsekern[bench]' brings matplotlib")
    console.print(f"wrote {' and '.join(map(str, wrote))}")
