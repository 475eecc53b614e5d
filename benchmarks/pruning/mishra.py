"""Mishra et al. 2021 (arXiv 2104.08378) in miniature: train, prune to 2:4, train again, beside the controls.

    python -m benchmarks.pruning.mishra [--net NAME ...] [--seeds N] [--quick] [--data mnist.npz]

Each net learns MNIST densely, is pruned to 2:4 once, and goes through the same training again with the
mask held. Controls: the dense net through the same training again, a random mask, the same mask on fresh
weights, and SR-STE, which trains sparse from the first step. Ctrl-C ends it; finished pairs of net and
seed are kept in --work, and the same command goes on from there.
"""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cpu.report import Table
from sparsekern import demo, pruning

from . import record


def lenet_300_100() -> nn.Module:
    """LeCun et al. 1998, with ReLU."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def cnn() -> nn.Module:
    """Three convolutions and two dense layers: 390,410 parameters."""
    layers: list[nn.Module] = []
    for channels, out in ((1, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1152, 256), nn.ReLU(), nn.Linear(256, 10))


NETS: dict[str, Callable[[], nn.Module]] = {"lenet-300-100": lenet_300_100, "cnn": cnn}


@dataclass(frozen=True)
class Run:
    """One training. SGD with momentum 0.9, its rate falling to zero along a cosine.

    Attributes:
        digits: of the training set, the first ones.
    """

    epochs: int
    digits: int
    batch: int
    rate: float = 0.05


RUNS = {"lenet-300-100": Run(10, 60_000, 128), "cnn": Run(2, 10_000, 64)}
QUICK = {"lenet-300-100": Run(1, 1_000, 64), "cnn": Run(1, 64, 64)}
SR_STE_DECAY = 2e-4
VARIANTS = {
    "dense": "trained once",
    "one-shot 2:4": "pruned by magnitude, not trained again",
    "2:4, trained again": "the paper's recipe",
    "dense, trained again": "control: the same second training without a mask",
    "random 2:4, trained again": "control: a random mask on the dense weights",
    "2:4 from scratch": "control: the recipe's mask on fresh weights, trained once",
    "SR-STE from scratch": "masks that follow the weights, trained once",
}
TRAININGS = len(VARIANTS) - 1  # all but the pruning itself

PAPER = [  # network, data, metric, dense, sparse: FP16
    ("ResNet-50", "ImageNet", "top-1", 76.1, 76.2),
    ("ResNeXt-101_32x8d", "ImageNet", "top-1", 79.3, 79.3),
    ("Xception", "ImageNet", "top-1", 79.2, 79.2),
    ("SSD-RN50", "COCO17", "bbAP", 24.8, 24.8),
    ("MaskRCNN-RN50", "COCO17", "bbAP", 37.9, 37.9),
    ("FairSeq Transformer", "WMT14 En-De", "BLEU", 28.2, 28.5),
    ("BERT-Large", "SQuAD 1.1", "F1", 91.9, 91.9),
]


# ---- measure ----


def images(x: Tensor) -> Tensor:
    """``[n, 1, 28, 28]`` at MNIST's mean and deviation."""
    return (x.view(-1, 1, 28, 28) - 0.1307) / 0.3081


def train(
    model: nn.Module, digits: demo.Digits, run: Run, seed: int, done: Callable[[], None]
) -> None:
    """One training from the weights at hand: a fresh optimiser, the rate from its start, order by `seed`."""
    x, y = images(digits.x_train[: run.digits]), digits.y_train[: run.digits]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=run.rate, momentum=0.9)
    steps = run.epochs * math.ceil(len(x) / run.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(run.epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(run.batch):
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        done()


@torch.no_grad()
def error(model: nn.Module, digits: demo.Digits) -> float:
    """Per cent of the test digits."""
    parts = zip(digits.x_test.split(200), digits.y_test.split(200), strict=True)
    wrong = sum((model(images(x)).argmax(1) != y).sum().item() for x, y in parts)
    return 100 * wrong / len(digits.y_test)


def measure(
    net: str, run: Run, digits: demo.Digits, seed: int, advance: record.Advance
) -> dict[str, float]:
    """Per cent of errors of each variant; `advance` is called once per epoch."""
    found: dict[str, float] = {}

    def fresh(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return NETS[net]()

    head = [name for name, m in fresh(0).named_modules() if isinstance(m, nn.Linear)][-1]

    def inner(module: nn.Module, name: str) -> bool:
        return name != head  # as in the paper, what gives the answer stays dense

    def trained(variant: str, model: nn.Module, seed: int) -> nn.Module:
        train(model, digits, run, seed, lambda: advance(variant))
        found[variant] = error(model, digits)
        return model

    dense = trained("dense", fresh(seed), seed)
    pruned = copy.deepcopy(dense)
    pruning.prune(pruned, "2:4", inner)
    found["one-shot 2:4"] = error(pruned, digits)
    masks = {held.name: held.mask for held in pruning.masks(pruned)}

    again = seed + 1000  # another order of the digits than the first time
    trained("2:4, trained again", pruned, again)
    trained("dense, trained again", copy.deepcopy(dense), again)

    random = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(seed)
    pruning.prune(
        random, "2:4", inner, lambda weight, _: torch.rand(weight.shape, generator=generator)
    )
    trained("random 2:4, trained again", random, again)

    scratch = fresh(seed + 2000)
    for name, mask in masks.items():
        pruning.hold(scratch.get_submodule(name.removesuffix(".weight")), mask)
    trained("2:4 from scratch", scratch, again)

    following = fresh(seed)
    pruning.straight_through(following, "2:4", SR_STE_DECAY, inner)
    trained("SR-STE from scratch", following, seed)
    return found


# ---- report ----


def against(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """What the paper says and what these nets did, one line per net."""
    gains = [sparse - dense for *_, dense, sparse in PAPER]
    lines = [
        f"The paper: 2:4 changes its metric by {min(gains):+.1f} to {max(gains):+.1f} points, seven rows, below."
    ]
    for net, seeds in found.items():

        def change(a: str, b: str, seeds: list[dict[str, float]] = seeds) -> str:
            return record.spread([s[a] - s[b] for s in seeds], sign="+")

        recipe, once = "2:4, trained again", "dense"
        lines += [
            f"**{net}**, change of the error in points, within a seed. Pruning alone: {change('one-shot 2:4', once)}. "
            f"The recipe: {change(recipe, once)} from the dense net, {change(recipe, 'dense, trained again')} from the "
            "dense net that was trained as often. A random mask instead of the recipe's: "
            f"{change('random 2:4, trained again', recipe)}.",
            f"**{net}**, with one training only, from the dense net: the recipe's mask on fresh weights "
            f"{change('2:4 from scratch', once)}, SR-STE {change('SR-STE from scratch', once)}.",
        ]
    if found:
        share = fmean(s["dense"] for seeds in found.values() for s in seeds) / 100
        deviation = 100 * math.sqrt(share * (1 - share) / 10_000)
        lines.append(
            f"A hundredth of a point is one digit; at {share:.1%} another 10,000 digits would give another error, by a "
            f"deviation of {deviation:.2f} points. The digits are the same for all nets here."
        )
    return lines


def tables(found: dict[str, list[dict[str, float]]], runs: dict[str, Run]) -> list[Table]:
    made = []
    for net, seeds in found.items():
        run = runs[net]
        rows = [
            [
                variant,
                words,
                record.spread([s[variant] for s in seeds]),
                ", ".join(f"{s[variant]:.2f}" for s in seeds),
            ]
            for variant, words in VARIANTS.items()
        ]
        made.append(
            Table(
                net,
                "Error on the 10,000 test digits in per cent, mean ± standard deviation. One training: "
                f"{run.epochs} epochs of {run.digits:,} digits, batches of {run.batch}, SGD at "
                f"{run.rate:g}, momentum 0.9, cosine. The first layer of the CNN has one input channel "
                "and stays dense, as does the last of both.",
                ["variant", "what it is", "error, %", "by seed"],
                rows,
            )
        )
    rows = [
        [network, data, metric, f"{dense:.1f}", f"{sparse:.1f}", f"{sparse - dense:+.1f}"]
        for network, data, metric, dense, sparse in PAPER
    ]
    made.append(
        Table(
            "The paper's rows",
            "Seven rows of the paper, FP16; higher is better.",
            ["network", "data", "metric", "dense", "2:4", "change"],
            rows,
        )
    )
    return made


def main() -> int:
    os.environ.setdefault("SPARSEKERN_STRICT", "1")
    parser = record.parser("mishra", __doc__.partition("\n")[0], "mnist.npz")
    parser.add_argument("--net", nargs="+", choices=list(NETS), default=list(NETS))
    options = record.checked(parser)
    torch.set_num_threads(options.threads)
    digits = demo.load_npz(options.data)
    runs = QUICK if options.quick else RUNS
    parts = {
        f"{net}-{seed}": (
            asdict(runs[net]),
            TRAININGS * runs[net].epochs,
            lambda advance, net=net, seed=seed: measure(net, runs[net], digits, seed, advance),
        )
        for net in options.net
        for seed in range(options.seeds)
    }
    kept, interrupted = record.measure(parts, options.work)
    found: dict[str, list[dict[str, float]]] = {}
    for part, values in kept.items():
        found.setdefault(part.rpartition("-")[0], []).append(values["result"])
    words = [
        'Anchors: Mishra et al., "Accelerating Sparse Deep Neural Networks" (arXiv 2104.08378); Zhou et al., SR-STE '
        f"(arXiv 2102.04010). Seeds 0 to {options.seeds - 1} decide weights, order"
        " and random masks."
    ]
    record.write(
        "mishra",
        "2:4 by training again, on MNIST",
        words,
        against(found),
        tables(found, runs),
        options,
        kept,
        interrupted,
    )
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
