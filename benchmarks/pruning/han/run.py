"""Tables 2 and 3 and figures 4, 5 and 6 of Han et al. 2015 (arXiv 1506.02626), on MNIST.

    python -m benchmarks.pruning.han [--seeds 3] [--quick] [--data FOLDER | --synthetic] [--out FILE.md]

Trains LeNet-300-100 and LeNet-5, prunes them by magnitude in three rounds to a twelfth, retrains, and
writes a Markdown file with three pictures beside it. What is trained is kept in a folder, epoch by
epoch: a run that was stopped or killed goes on when it is started again, and ends in the same bits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import output
from sparsekern import demo
from sparsekern.pruning import mask_of, sensitivity

from . import curves, figures, report
from .nets import NETS, Net, stages
from .tables import measured, model_of
from .train import Images, Plan, State, error, train

DATA = output.ROOT.parent / "shared" / "data"


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
    with output.progress(console) as progress:
        task = progress.add_task("", total=trainings.epochs, note="")
        for name, done in trainings.run():
            progress.update(task, completed=done, description=name)
            if not console.is_terminal:
                print(f"{done}/{trainings.epochs} epochs: {name}", file=sys.stderr, flush=True)


# ---- what comes of them ----


def results(trainings: Trainings, options: argparse.Namespace, console: Console) -> report.Results:
    own = {"seeds": options.seeds, "data": trainings.data.source, "quick": int(options.quick)}
    found = report.Results(output.facts("benchmarks.pruning.han", options.threads) | own)
    for name, net in NETS.items():
        of = images(net, trainings.data)
        for seed in range(options.seeds):
            found.measured.append(measured(net, seed, trainings.states[f"{name}-{seed}"], of))
        model = model_of(net, trainings.states[f"{name}-0"].models["dense"])
        named = {layer.module: layer.name for layer in net.layers}
        scan = sensitivity(
            model, lambda m, of=of: error(m, of.x_test, of.y_test), progress=console.is_terminal
        )
        found.densities = scan.densities
        found.sensitivity[name] = {named[module]: values for module, values in scan.layers.items()}
    found.curves, found.dense = points(trainings)
    share = first_mask(trainings).float().mean(0).view(28, 28)
    middle = share[:, 7:21].mean().item()
    found.bands = (middle, 2 * share.mean().item() - middle)
    return found


def points(trainings: Trainings) -> tuple[dict[str, list[tuple[float, float]]], dict[str, float]]:
    """Figure 5: label to points of share pruned away and error; label to the error of the dense nets."""
    found: dict[str, list[tuple[float, float]]] = {label: [] for label in figures.STYLES}
    for plan in trainings.curves:
        for record in trainings.states[plan.name].records:
            pruned = 1 - record["density"]
            if plan.name == "curve-l2-iterative":
                found["L2, pruned and retrained in rounds"].append((pruned, record["error"]))
            elif plan.start:
                found[f"{plan.start.upper()}, no retraining"].append((pruned, record["pruned"]))
                found[f"{plan.start.upper()}, retrained"].append((pruned, record["error"]))
    l1, l2 = (trainings.states[name].records[0] for name in ("curve-l1", f"{curves.NET.name}-0"))
    return found, {"dense by L2": l2["error"], "dense by L1": l1["error"]}


def first_mask(trainings: Trainings) -> Tensor:
    """Of fc1 of LeNet-300-100, seed 0."""
    model = model_of(curves.NET, trainings.states[f"{curves.NET.name}-0"].model)
    return mask_of(model[0]).mask


def pictures(found: report.Results, trainings: Trainings, path: Path) -> None:
    """Beside `path`, its ending replaced."""
    figures.mask(first_mask(trainings), path.with_name(f"{path.stem}-mask.png"))
    figures.curves(found.curves, found.dense, path.with_name(f"{path.stem}-curves.png"))
    figures.sensitivities(found, path.with_name(f"{path.stem}-sensitivity.png"))


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
    options.work = options.work or output.ROOT / "build" / f"han{kind}"
    options.work.mkdir(parents=True, exist_ok=True)
    return options


def main() -> int:
    options = parsed()
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    trainings = Trainings(options, digits(options))
    try:
        with_progress(trainings, console)
        found = results(trainings, options, console)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    path = options.out or output.dated(f"{found.facts['date']}-pruning-han")
    path.write_text(report.markdown(found, path.stem))
    path.with_suffix(".json").write_text(json.dumps(asdict(found), indent=1) + "\n")
    pictures(found, trainings, path)
    output.show(report.head(found), report.against_the_paper(found), report.tables(found))
    print(f"written to {path}", file=sys.stderr)
    return 0
