"""The table of "Compressing DMA Engine" (Rhu et al., arXiv 1705.01626), measured on nets that train here.

    python -m benchmarks.offload [--net NAME ...] [--quick] [--data FOLDER | --synthetic] [--out FILE.md]

Trains each net on MNIST or on text, and on the way compresses what its steps keep for the backward
pass: by zero values, run lengths and zlib, in NCHW and in NHWC, by layer. Then predicts what that
gives a net whose activations live on the host. Writes a Markdown file and, beside it, all numbers as
JSON and two pictures. Ctrl-C ends the training; what was measured is written, and ``--resume
FILE.json`` goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import sparsekern as sk
from sparsekern import demo
from sparsekern.info import usable_cores
from sparsekern.offload.nets import NETS

from .. import output
from . import codecs, report
from .capture import Map, Saved, capture
from .plot import plot
from .predictions import predictions
from .results import MapBytes, Record, Results, SavedBytes, Trained

DATA = Path(__file__).parents[3] / "shared" / "data"
MEASUREMENTS = (
    7  # of which the last is at the end, and each one before at half the steps of the next
)

Batches = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Run:
    """How a net is trained: images or sequences a step, steps, Adam's rate, and sizes that are not the default."""

    batch: int
    steps: int
    rate: float
    sizes: dict[str, int | float] = field(default_factory=dict)


RUNS = {
    "alexnet": Run(32, 300, 3e-4),
    "vgg16": Run(32, 100, 2e-4),
    "squeezenet": Run(32, 300, 5e-4),
    "resnet18": Run(32, 100, 1e-3),
    "cnn": Run(64, 600, 1e-3),
    "transformer-relu": Run(16, 300, 1e-3),
    "transformer-relu2": Run(16, 300, 1e-3),
    "transformer-gelu": Run(16, 300, 1e-3),
}
_THIN = {"width": 0.125}
QUICK = {
    "alexnet": Run(2, 3, 1e-4, _THIN | {"hidden": 32}),
    "vgg16": Run(2, 3, 1e-4, _THIN | {"hidden": 32}),
    "squeezenet": Run(2, 3, 1e-4, _THIN),
    "resnet18": Run(2, 3, 1e-3, _THIN),
    "cnn": Run(4, 4, 1e-3),
    "transformer-relu": Run(2, 3, 1e-3, {"width": 16, "heads": 2}),
    "transformer-relu2": Run(2, 3, 1e-3, {"width": 16, "heads": 2}),
    "transformer-gelu": Run(2, 3, 1e-3, {"width": 16, "heads": 2}),
}


# ---- data ----


def digit_batches(digits: demo.Digits, net: str, batch: int, seed: int) -> Batches:
    """Digits at mean 0 and deviation 1, as nets for images are fed: not even their ground is zero."""
    size, channels = NETS[net].size, 1 if net == "cnn" else 3
    mean, deviation = digits.x_train.mean(), digits.x_train.std()
    generator = torch.Generator().manual_seed(seed)

    def batches() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(digits.y_train), (batch,), generator=generator)
        images = (digits.x_train[chosen].view(batch, 1, 28, 28) - mean) / deviation
        if size != 28:
            images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
        return images.repeat(1, channels, 1, 1), digits.y_train[chosen]

    return batches


def text_batches(text: str, size: int, batch: int, seed: int) -> Batches:
    """Random stretches of the text and, one place on, what follows."""
    symbols = {c: i for i, c in enumerate(sorted(set(text)))}
    tokens = torch.tensor([symbols[c] for c in text])
    generator = torch.Generator().manual_seed(seed)

    def batches() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(tokens) - size, (batch, 1), generator=generator)
        stretch = tokens[starts + torch.arange(size + 1)]
        return stretch[:, :-1].contiguous(), stretch[:, 1:].contiguous()

    return batches


def synthetic_batches(net: str, batch: int, seed: int) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return lambda: NETS[net].batch(batch, generator=generator)


def photograph(net: str, batch: int, seed: int) -> Tensor:
    """Parts of a photograph at random places, mean 0 and deviation 1: texture, which digits have not.

    It is the portrait of Grace Hopper that comes with matplotlib, at a third of its resolution.
    """
    from matplotlib import cbook, image

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        pixels = torch.from_numpy(np.array(image.imread(file, format="jpg"))).float()
    pixels = pixels.permute(2, 0, 1)
    if net == "cnn":
        pixels = pixels.mean(0, keepdim=True)
    pixels = F.avg_pool2d(pixels, 3)
    pixels = (pixels - pixels.mean()) / pixels.std()
    size, generator = NETS[net].size, torch.Generator().manual_seed(seed)
    rows = torch.randint(pixels.shape[1] - size, (batch,), generator=generator).tolist()
    columns = torch.randint(pixels.shape[2] - size, (batch,), generator=generator).tolist()
    parts = [pixels[:, r : r + size, c : c + size] for r, c in zip(rows, columns, strict=True)]
    return torch.stack(parts)


class Data:
    """What the nets are trained on; files are read once, when the first net asks."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.digits: demo.Digits | None = None

    def missing(self, nets: Iterable[str]) -> list[str]:
        if self.folder is None:
            return []
        files = {"tinyshakespeare.txt" if "transformer" in net else "mnist.npz" for net in nets}
        return sorted(f for f in files if not (self.folder / f).exists())

    def batches(self, net: str, batch: int, seed: int) -> tuple[str, Batches]:
        """What it is, and what gives the batches."""
        if self.folder is None:
            return "synthetic", synthetic_batches(net, batch, seed)
        if "transformer" in net:
            text = (self.folder / "tinyshakespeare.txt").read_text()
            return "tinyshakespeare", text_batches(text, NETS[net].size, batch, seed)
        self.digits = self.digits or demo.load_npz(self.folder / "mnist.npz")
        return "MNIST", digit_batches(self.digits, net, batch, seed)


# ---- measure ----


def map_bytes(found: Map) -> MapBytes:
    x = found.tensor.float()
    density = sk.pack_zvc(x).values.numel() / x.numel()
    return MapBytes(found.layer, found.kind, list(x.shape), density, x.nbytes, codecs.measured(x))


def _narrow(x: Tensor) -> int:
    """Bytes of an integer tensor in the narrowest type that holds its values."""
    low, high = (int(v) for v in x.aminmax())
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32):
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return x.numel() * min(dtype.itemsize, x.itemsize)
    return x.nbytes


def saved_bytes(saved: list[Saved]) -> list[SavedBytes]:
    """By layer."""
    layers: dict[str, SavedBytes] = {}
    for s in saved:
        into, x = layers.setdefault(s.layer, SavedBytes(s.layer)), s.tensor
        if not x.numel():
            continue
        if x.is_floating_point():
            zvc = codecs.zvc_bytes(x)
            into.floats += x.nbytes
            into.floats_zvc += min(x.nbytes, zvc)
            into.floats_zvc_bf16 += min(2 * x.numel(), codecs.zvc_bytes(x.bfloat16()))
            into.shrunk += x.nbytes if zvc < x.nbytes else 0
        else:
            into.integers += x.nbytes
            into.integers_narrow += x.nbytes if x.dtype is torch.bool else _narrow(x)
    return list(layers.values())


def measured_at(steps: int) -> list[int]:
    """0, then each at half the next, up to the last step."""
    return sorted({0, *(round((steps - 1) / 2**i) for i in range(MEASUREMENTS - 1))})


def train(net: str, run: Run, data: Data, seed: int) -> Iterator[Trained]:
    """Trains and measures; gives the same object after every step, so that an interrupted one is not lost.

    The seed decides weights, dropout and batches.
    """
    torch.manual_seed(seed)
    model = NETS[net].build(**run.sizes)
    source, batches = data.batches(net, run.batch, seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=run.rate, fused=True)
    trained = Trained(
        net,
        NETS[net].description,
        source,
        NETS[net].size,
        run.batch,
        run.steps,
        run.rate,
        seed,
        sum(p.numel() for p in model.parameters()),
    )
    start = time.monotonic()
    for step in range(run.steps):
        inputs, targets = batches()
        if step in measured_at(run.steps):
            with capture(model) as captured:
                loss = NETS[net].loss(model, inputs, targets)
            record = Record(
                step,
                loss.item(),
                [map_bytes(m) for m in captured.maps],
                saved_bytes(captured.saved),
                captured.parameter_bytes,
                captured.packed_bytes,
            )
            del captured
            trained.records.append(record)
        else:
            loss = NETS[net].loss(model, inputs, targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        trained.losses.append(loss.item())
        trained.seconds = time.monotonic() - start
        if step < run.steps - 1:
            yield trained
    if trained.is_convolutional:
        with capture(model) as captured:
            model(photograph(net, run.batch, seed))
        trained.photograph = [map_bytes(m) for m in captured.maps]
    yield trained


def train_all(runs: dict[str, Run], data: Data, seed: int, results: Results) -> None:
    """Nets that `results` has complete are left out; Ctrl-C ends it early."""
    console = Console(stderr=True)
    kept = {net for net, trained in results.trained.items() if trained.complete}
    left = {net: run for net, run in runs.items() if net not in kept}
    done = 0
    with output.progress(console) as progress:
        tasks = {
            net: progress.add_task(net, total=run.steps, start=False, note="")
            for net, run in left.items()
        }
        try:
            for net, run in left.items():
                progress.start_task(tasks[net])
                for trained in train(net, run, data, seed):
                    results.trained[net] = trained
                    step, loss = len(trained.losses), trained.losses[-1]
                    progress.update(tasks[net], completed=step, note=f"loss {loss:.2f}")
                    if not console.is_terminal and trained.records[-1].step == step - 1:
                        words = f"{done}/{len(left)} {net}: {step} of {run.steps} steps, loss {loss:.2f}"
                        print(words, file=sys.stderr, flush=True)
                done += 1
        except KeyboardInterrupt:
            results.interrupted = f"{done} of {len(left)} nets"


# ---- the command ----


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offload", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("--net", nargs="+", choices=[*RUNS, "all"], default=["all"])
    add("--quick", action="store_true", help="thin nets, few steps: the form, not the numbers")
    add("--data", type=Path, default=DATA, help="folder with mnist.npz and tinyshakespeare.txt")
    add("--synthetic", action="store_true", help="train on made-up batches instead")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=min(2, usable_cores()))
    add("--out", type=Path, help="the Markdown file; default: a dated one in benchmarks/results")
    add("--resume", type=Path, help="the JSON file of an earlier run: its nets are kept")
    options = parser.parse_args()
    options.net = list(RUNS) if "all" in options.net else options.net
    options.data = Data(None if options.synthetic else options.data)
    if missing := options.data.missing(options.net):
        parser.error(
            f"--data {options.data.folder}: there is no {' and no '.join(missing)}; "
            "name another folder, or --synthetic"
        )
    if options.threads < 1:
        parser.error(f"--threads is {options.threads}; it takes numbers from 1 on")
    if options.out and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no such folder")
    if options.resume and not options.resume.exists():
        parser.error(f"--resume {options.resume}: there is no such file")
    return options


def main() -> int:
    # A slower back end that steps in is an error: nobody should wait for the reference by accident.
    os.environ.setdefault("SPARSEKERN_STRICT", "1")
    options = parsed()
    torch.set_num_threads(options.threads)
    own = {"cores": usable_cores(), "seed": options.seed, "quick": int(options.quick)}
    results = Results(output.facts("benchmarks.offload", options.threads) | own)
    if options.resume:
        results.trained = Results.from_json(json.loads(options.resume.read_text())).trained
    runs = QUICK if options.quick else RUNS
    train_all({n: runs[n] for n in options.net}, options.data, options.seed, results)
    results.predictions = predictions(results.trained)
    path = options.out or output.dated(f"{results.facts['date']}-offload-paper")
    path.write_text(report.markdown(results, path.stem))
    path.with_suffix(".json").write_text(json.dumps(asdict(results), indent=1) + "\n")
    plot(results, path)
    output.show(report.head(results), report.against_the_paper(results), report.tables(results))
    print(f"written to {path}", file=sys.stderr)
    return 130 if results.interrupted else 0
