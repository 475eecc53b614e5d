"""What activation offload costs in time and gives in bytes on the CPU: `python -m benchmarks.offload.cost`.

Each net is trained for real until its activations are as sparse as training makes them. Then steps without the
offload, with each of its policies and with torch's own ``save_on_cpu`` take turns on one model, same batch, and
a step's time is divided by that of the step without in the same turn.

Bytes are those autograd holds for backward at the peak, parameters left out. On a CPU, "cpu" moves from host to
host: it shows what the machinery costs, not a gain.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import sparsekern as sk
from sparsekern.info import cpu_name, usable_cores
from sparsekern.offload.nets import NETS

from .. import output
from ..cpu import machine
from .paper import QUICK, RUNS, Data

WAYS = ("auto", "device", "cpu", "save_on_cpu")
NAMES = ("transformer-relu2", "transformer-relu", "vgg16", "alexnet", "transformer-gelu")


@dataclass
class Cost:
    """One net: seconds of each step by way ("without" too), hooks' seconds and peak bytes by policy, density."""

    net: str
    data: str
    trained: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    hooks: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)
    density: float | None = None

    def over_without(self, way: str) -> tuple[float, float, float]:
        """10 %, median and 90 % of a step's time over that of the step without it in the same turn."""
        pairs = zip(self.seconds[way], self.seconds["without"], strict=True)
        ratios = [a / b for a, b in pairs]
        if len(ratios) == 1:
            return ratios[0], ratios[0], ratios[0]
        tenths = statistics.quantiles(ratios, n=10, method="inclusive")
        return tenths[0], statistics.median(ratios), tenths[-1]


def measure(net: str, options: argparse.Namespace, data: Data) -> Cost:
    run = (QUICK if options.quick else RUNS)[net]
    torch.manual_seed(options.seed)
    model = NETS[net].build(**run.sizes)
    optimiser = torch.optim.Adam(model.parameters(), lr=run.rate)
    name, batches = data.batches(net, run.batch, options.seed)
    cost = Cost(net, name, run.steps)

    def step(context, batch) -> float:
        start = time.perf_counter()
        optimiser.zero_grad(set_to_none=True)
        with context:
            loss = NETS[net].loss(model, *batch)
        loss.backward()
        return time.perf_counter() - start

    for _ in track(range(run.steps), f"training {net}", console=options.console, transient=True):
        step(contextlib.nullcontext(), batches())
        optimiser.step()
    offloads = {way: sk.offload_activations(way) for way in WAYS if way != "save_on_cpu"}
    ways = {"without": contextlib.nullcontext, **{w: lambda o=o: o for w, o in offloads.items()}}
    ways["save_on_cpu"] = torch.autograd.graph.save_on_cpu
    for way in ways:
        step(ways[way](), batches())
    before = {w: o.stats.pack_seconds + o.stats.unpack_seconds for w, o in offloads.items()}
    turns = track(range(options.turns), f"measuring {net}", console=options.console, transient=True)
    for _ in turns:
        batch = batches()
        for way, context in ways.items():
            cost.seconds.setdefault(way, []).append(step(context(), batch))
    for way, offload in offloads.items():
        stats = offload.stats
        cost.hooks[way] = (stats.pack_seconds + stats.unpack_seconds - before[way]) / options.turns
        cost.peaks[way] = stats.peak_bytes
    cost.density = offloads["auto"].stats.total.density
    return cost


def table(costs: list[Cost]) -> Table:
    found = Table(title="Activation offload on the CPU")
    for name in ("net", "policy"):
        found.add_column(name)
    for name in ("time, x", "hooks", "MB without", "MB with", "less", "non-zero"):
        found.add_column(name, justify="right")
    for cost in costs:
        plain = cost.peaks["auto"]["plain"]
        found.add_section()
        for way in WAYS:
            low, middle, high = cost.over_without(way)
            row = [cost.net, way, f"{middle:.2f} [{low:.2f}, {high:.2f}]"]
            if way in cost.peaks:
                held = max(cost.peaks[way]["device"], cost.peaks[way]["host"])
                share = cost.hooks[way] / statistics.median(cost.seconds[way])
                row += [f"{share:.1%}", f"{plain / 1e6:.1f}", f"{held / 1e6:.1f}"]
                row += [f"{1 - held / plain:.0%}"]
                row += ["" if cost.density is None else f"{cost.density:.1%}"]
            else:
                row += [""] * 5
            found.add_row(*row)
    return found


def markdown(costs: list[Cost], options: argparse.Namespace) -> str:
    from rich import box

    console = Console(width=140, color_system=None)
    found = table(costs)
    found.box, found.title = box.MARKDOWN, None
    with console.capture() as capture:
        console.print(found)
    trained = "; ".join(f"{c.net} {c.trained} steps on {c.data}" for c in costs)
    lines = [line for line in capture.get().splitlines() if line.strip(" |")]
    rows = "\n".join(line for i, line in enumerate(lines) if i < 2 or line.strip("|- "))
    command = " ".join(["python", "-m", "benchmarks.offload.cost", *sys.argv[1:]])
    return f"""# {datetime.date.today().isoformat()}, activation offload on the CPU: what it costs and gives

{cpu_name()}, {options.threads} of {usable_cores()} cores, torch {torch.__version__},
Python {platform.python_version()}, sparsekern {machine.revision()}. Command: `{command}`.

Trained before measuring: {trained}. {options.turns} turns. *time*: of forward and backward over the same without,
median [10 %, 90 %]; *hooks*: share of the step in the two hooks; *MB*: saved for backward at the peak, parameters left
out. `save_on_cpu` is torch's: it copies everything, parameters too. On a CPU "cpu" moves from host to host and gains
only what compression does.

{rows}
"""


def parsed() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--net", nargs="+", choices=RUNS, default=list(NAMES))
    p.add_argument("--turns", type=int, default=15, help="steps measured each way")
    p.add_argument("--threads", type=int, default=usable_cores())
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--data",
        type=Path,
        default=Path(__file__).parents[3] / "shared" / "data",
        help="folder with mnist.npz and tinyshakespeare.txt; without them batches are synthetic",
    )
    p.add_argument("--quick", action="store_true", help="tiny nets: to see the form")
    p.add_argument(
        "--out", type=Path, help="the Markdown file; default: dated, in benchmarks/results"
    )
    return p.parse_args()


def main() -> int:
    os.environ.setdefault("SPARSEKERN_STRICT", "1")
    options = parsed()
    torch.set_num_threads(options.threads)
    options.console = Console()
    data = Data(options.data)
    if missing := data.missing(options.net):
        print(f"no {', '.join(missing)} in {options.data}: synthetic batches", file=sys.stderr)
        data = Data(None)
    costs = []
    try:
        for net in options.net:
            costs.append(measure(net, options, data))
    except KeyboardInterrupt:
        print("interrupted: what follows is what was measured", file=sys.stderr)
    if not costs:
        return 130
    options.console.print(table(costs))
    path = options.out or output.RESULTS / f"{datetime.date.today().isoformat()}-offload-cost.md"
    path.write_text(markdown(costs, options))
    print(f"written to {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
