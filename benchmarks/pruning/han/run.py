"""Tables 2 and 3 and figures 4, 5 and 6 of Han et al. 2015 (arXiv 1506.02626), on MNIST.

    python -m benchmarks.pruning.han [--seeds 3] [--quick] [--data FOLDER | --synthetic] [--out FILE.md]

Trains LeNet-300-100 and LeNet-5, prunes them by magnitude in three rounds to a twelfth, retrains, and
writes a Markdown file with three pictures beside it. What is trained is kept in a folder, epoch by
epoch: a run that was stopped or killed goes on when it is started again, and ends in the same bits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from sparsekern import demo

from . import curves
from .nets import NETS, Net, stages
from .train import Images, Plan, State, train

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"
DATA = ROOT.parent / "shared" / "data"


# ---- data ----


def synthetic(n: int = 600) -> demo.Digits:
    """Ten made-up images, blurred by noise: what shows the form where there is no MNIST."""
    generator = torch.Generator().manual_seed(0)
    shapes = torch.rand(10, 784, generator=generator)
    y = torch.randint(10, (2 * n,), generator=generator)
    x = (shapes[y] + 0.5 * torch.randn(2 * n, 784, generator=generator)).clamp(0, 1)
    return demo.Digits("made-up images", x[:n], y[:n], x[n:], y[n:])


def digits(options: argparse.Namespace) -> demo.Digits:
    found = synthetic() if options.synthetic else demo.load_npz(options.data / "mnist.npz")
    if options.quick:
        found = demo.Digits(
            found.source,
            *(part[:1000] for part in (found.x_train, found.y_train, found.x_test, found.y_test)),
        )
    return found


def images(net: Net, of: demo.Digits) -> Images:
    return Images(net.inputs(of.x_train), of.y_train, net.inputs(of.x_test), of.y_test)


# ---- trainings ----


class Trainings:
    """All trainings of a run, each with its checkpoint in one folder."""

    def __init__(self, options: argparse.Namespace, data: demo.Digits):
        self.folder: Path = options.work
        self.data = data
        self.plans = {
            f"{name}-{seed}": Plan(name, seed, stages(net, options.quick))
            for name, net in NETS.items()
            for seed in range(options.seeds)
        }
        dense = self.plans[f"{curves.NET.name}-0"].stages[0]
        self.curves = [curves.dense_l1(dense.epochs), *curves.plans(options.quick)]
        self.plans |= {plan.name: plan for plan in self.curves}
        self.states: dict[str, State] = {}

    @property
    def epochs(self) -> int:
        return sum(stage.epochs for plan in self.plans.values() for stage in plan.stages)

    def start(self, plan: Plan) -> Mapping[str, Tensor] | None:
        """The dense net that a curve begins with."""
        if not plan.start:
            return None
        dense = "curve-l1" if plan.start == "l1" else f"{curves.NET.name}-0"
        return self.states[dense].models["dense"]

    def run(self) -> Iterator[tuple[str, int]]:
        """After every epoch what it was and how many are done; kept ones count at once."""
        done = 0
        for name, plan in self.plans.items():
            net = NETS.get(plan.name, curves.NET)
            lengths = [stage.epochs for stage in plan.stages]
            path = self.folder / f"{name}.pt"
            for state in train(plan, net.build, images(net, self.data), path, self.start(plan)):
                self.states[name] = state
                yield name, done + sum(lengths[: state.stage]) + state.epoch
            done += sum(lengths)


def with_progress(trainings: Trainings, console: Console) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=trainings.epochs)
        for name, done in trainings.run():
            progress.update(task, completed=done, description=name)
            if not console.is_terminal:
                print(f"{done}/{trainings.epochs} epochs: {name}", file=sys.stderr, flush=True)


# ---- the command ----


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pruning.han", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="trainings of each net, seeds from 0 on")
    add("--quick", action="store_true", help="1000 images, one epoch: the form, not the numbers")
    add("--data", type=Path, default=DATA, help="folder with mnist.npz in Keras's layout")
    add("--synthetic", action="store_true", help="train on made-up images instead")
    add("--threads", type=int, default=1)
    add("--work", type=Path, help="folder of checkpoints; default: build/han, one more for --quick")
    add("--out", type=Path, help="the Markdown file; default: a dated one in benchmarks/results")
    options = parser.parse_args()
    for name in ("seeds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it takes numbers from 1 on")
    if not options.synthetic and not (options.data / "mnist.npz").exists():
        parser.error(
            f"--data {options.data}: there is no mnist.npz; name another folder, or --synthetic"
        )
    if options.out and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no such folder")
    kind = "-synthetic" * options.synthetic + "-quick" * options.quick
    options.work = options.work or ROOT / "build" / f"han{kind}"
    options.work.mkdir(parents=True, exist_ok=True)
    return options


def main() -> int:
    options = parsed()
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    trainings = Trainings(options, digits(options))
    try:
        with_progress(trainings, console)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0
