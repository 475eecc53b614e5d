"""verify(): which pattern every layer really has, what that keeps, and what it gives on this machine."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..nn import SparseLinear, padded, sparsify_
from .masks import finalize, mask_of, masks
from .patterns import NM, PRUNABLE, matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

# From the strictest on: whatever is 1:4 is 2:8, whatever is 2:8 is 2:4, whatever is 2:4 is 4:8.
_PATTERNS = (NM(1, 4), NM(2, 8), NM(2, 4), NM(4, 8))
_IS_24 = ("1:4", "2:8", "2:4-transposable", "2:4")
_DENSE_FROM = 0.99  # a layer never pruned may hold a few exact zeros
_BINS = 60
_COLOURS = {"before": "#b7c3cc", "after": "#d9772b"}


class Speed(NamedTuple):
    """Medians of interleaved calls, milliseconds, at `M` tokens; `prepacked` is the inference form."""

    M: int
    dense: float
    packed: float
    prepacked: float

    @property
    def ratio(self) -> float:
        """How many times as fast as F.linear the inference form is."""
        return self.dense / self.prepacked


@dataclass
class VerifiedLayer:
    """What one layer's weight is.

    Attributes:
        kind: class of the layer; of a weight in a file "2-D" to "5-D".
        pattern: "1:4", "2:8", "2:4-transposable", "2:4" or "4:8", the strictest that holds; else
            "unstructured", or "dense" from 99 % non-zeros on. An N:M holds for groups along the input
            features, the last of a row filled up with zeros.
        density: share of elements that are not zero.
        held: whether a mask is held (see :func:`sparsekern.pruning.hold`).
        packed: whether the layer computes from the packed form already.
        packs: whether :func:`sparsekern.pruning.sparsify` packs it, or it is packed.
        why: what keeps it from that, "" if nothing; of a weight that is not 2:4 the first group at fault.
        kept: share of the reference's sum of magnitudes that lies where the weight is not zero.
        permutation: that share at 2:4 without and with a permutation of the input features, as given.
        bytes_dense, bytes_packed: of the weight; the latter those of values and meta, None unless it packs.
        speeds: as measured here, if asked for.
        problems: what cannot be right.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    pattern: str
    density: float
    held: bool
    packed: bool
    packs: bool
    why: str
    kept: float | None
    permutation: tuple[float, float] | None
    bytes_dense: int
    bytes_packed: int | None
    speeds: list[Speed] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class _Picture(NamedTuple):
    """What the picture shows of a layer: shares that are kept, and counts of weights."""

    bands: Tensor
    corner: bool
    edges: Tensor
    before: Tensor | None
    after: Tensor


@dataclass
class Verification:
    """What :func:`verify` found; ``str`` of it is the table and the notes."""

    layers: list[VerifiedLayer]
    machine: str
    sensitivity: Mapping[str, Sequence[tuple[float, float]]]
    _pictures: list[_Picture] = field(repr=False)

    @property
    def ok(self) -> bool:
        """No layer has a problem. A layer that is dense is none."""
        return not any(layer.problems for layer in self.layers)

    @property
    def density(self) -> float:
        """Of all layers together."""
        elements = [math.prod(layer.shape) for layer in self.layers]
        kept = sum(n * layer.density for n, layer in zip(elements, self.layers, strict=True))
        return kept / max(1, sum(elements))

    @property
    def bytes_dense(self) -> int:
        return sum(layer.bytes_dense for layer in self.layers)

    @property
    def bytes_here(self) -> int:
        """Where every layer that packs is packed."""
        return sum(
            layer.bytes_dense if layer.bytes_packed is None else layer.bytes_packed
            for layer in self.layers
        )

    def as_dict(self) -> dict:
        return {
            "ok": self.ok,
            "machine": self.machine,
            "torch": torch.__version__,
            "density": self.density,
            "bytes_dense": self.bytes_dense,
            "bytes_here": self.bytes_here,
            "layers": [
                asdict(layer) | {"speeds": [s._asdict() | {"ratio": s.ratio} for s in layer.speeds]}
                for layer in self.layers
            ],
            "sensitivity": {name: list(curve) for name, curve in self.sensitivity.items()},
        }

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1)

    def table(self) -> Table:
        """A row per layer. Columns about what was not given or measured are left out."""

        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("layer", no_wrap=True)
        table.add_column("weight", no_wrap=True)
        table.add_column("pattern", no_wrap=True)
        tokens = sorted({speed.M for layer in self.layers for speed in layer.speeds})
        optional = {
            "kept": any(layer.kept is not None for layer in self.layers),
            "permuted": any(layer.permutation is not None for layer in self.layers),
        }
        columns = ["density", *(name for name, shown in optional.items() if shown), "bytes"]
        for name in [*columns, *(f"M={M}" for M in tokens)]:
            table.add_column(name, justify="right", no_wrap=True)
        for layer in self.layers:
            cells = [layer.name, f"{layer.kind} {'x'.join(map(str, layer.shape))}"]
            cells += [layer.pattern + (", held" if layer.held else ""), f"{layer.density:.1%}"]
            if optional["kept"]:
                cells.append("" if layer.kept is None else f"{layer.kept:.1%}")
            if optional["permuted"]:
                gain = layer.permutation and layer.permutation[1] - layer.permutation[0]
                cells.append("" if gain is None else f"{100 * gain:+.1f} points")
            cells.append(_size(layer.bytes_dense, layer.bytes_packed))
            by_m = {speed.M: f"{speed.ratio:.2f}x" for speed in layer.speeds}
            cells += [by_m.get(M, "") for M in tokens]
            table.add_row(*cells, style="red" if layer.problems else None)
        return table

    def notes(self) -> list[str]:
        """Below the table: problems, why what was pruned does not pack, and the sums."""
        lines = [f"{layer.name}: PROBLEM: {p}" for layer in self.layers for p in layer.problems]
        lines += [
            f"{layer.name}: {layer.why}"
            for layer in self.layers
            if not layer.packs and layer.pattern != "dense"
        ]
        packing = sum(layer.packs for layer in self.layers)
        text = f"{packing} of {len(self.layers)} layers are 2:4 and compute packed here; {self.density:.1%} of the "
        text += f"weights are not zero; {_size(self.bytes_dense, self.bytes_here)}."
        lines.append(text)
        if any(layer.speeds for layer in self.layers):
            lines.append(
                f"M=: speed of the packed inference form over F.linear at M tokens, on {self.machine}."
            )
        return lines

    def show(self, console: Console) -> None:
        from rich.text import Text

        console.print(self.table())
        for line in self.notes():
            console.print(Text(line, "bold red" if ": PROBLEM: " in line else ""))

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160, highlight=False, emoji=False)
        with console.capture() as captured:
            self.show(console)
        return captured.get()

    def plot(self, path: str | Path) -> None:
        """Write the picture: mask bands and weight histograms by layer, sensitivity curves if there are any."""
        self.draw().savefig(path, dpi=130)

    def draw(self) -> Figure:
        """The picture, of the ten largest layers.

        Raises:
            ImportError: matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError(
                "verify: a picture needs matplotlib: pip install 'sparsekern[prune]'"
            ) from None

        largest = sorted(range(len(self.layers)), key=lambda i: -math.prod(self.layers[i].shape))
        shown = sorted(largest[:10])
        heights = [1.9] * len(shown) + [3.2] * bool(self.sensitivity)
        figure = Figure(figsize=(12, 0.6 + sum(heights)), layout="constrained", facecolor="white")
        grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
        for row, i in enumerate(shown):
            _draw_bands(figure.add_subplot(grid[row, 0]), self.layers[i], self._pictures[i])
            _draw_histogram(figure.add_subplot(grid[row, 1]), self._pictures[i], not row)
        if self.sensitivity:
            _draw_sensitivity(figure.add_subplot(grid[-1, :]), self.sensitivity)
        left = len(self.layers) - len(shown)
        figure.suptitle(
            "What is kept, and the weights" + (f" ({left} smaller layers left out)" if left else "")
        )
        return figure


# ---- the check ----


class _Weight(NamedTuple):
    """A layer to verify: its weight as dense, and the mask or packed form that it comes from."""

    name: str
    kind: str
    weight: Tensor
    mask: Tensor | None = None
    packed: tuple[Tensor, Tensor] | None = None
    module: nn.Module | None = None


@torch.no_grad()
def verify(
    model: nn.Module | Mapping[str, Tensor],
    reference: nn.Module | Mapping[str, Tensor] | None = None,
    *,
    permutation: Mapping[str, tuple[float, float]] | None = None,
    sensitivity: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    measure: bool = False,
    tokens: Sequence[int] = (1, 32, 256),
    progress: Callable[[str], object] | None = None,
) -> Verification:
    """What every Linear, convolution and SparseLinear of a model really is, by its elements.

    Args:
        model: or a ``state_dict``, in which a matrix that is no layer's, such as an embedding's, looks
            like a linear layer's.
        reference: the dense model or its ``state_dict``: what of its magnitude was kept.
        permutation: layer name to the share of magnitude that 2:4 keeps without and with a
            permutation of the input features.
        sensitivity: layer name to pairs (density, metric), for the picture.
        measure: time what packs here against ``F.linear``, on the device where the weights are.
        tokens: numbers of rows of the input, M, to time at.
        progress: called with a layer's name before that layer is looked at.

    Raises:
        ValueError: `reference` has none of the layers, or one of another shape; or a layer is lazy and
            has no weight yet.

    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> model[0].weight.data = ops.prune_24(model[0].weight.data)
    >>> [(layer.name, layer.pattern, layer.density) for layer in verify(model).layers]
    [('0', '2:4', 0.5), ('2', 'dense', 1.0)]
    >>> verify(model).layers[1].why
    'row 0, group 0 (columns 0 to 3) has 4 non-zeros'
    """
    found = list(_weights(model))
    before = _reference(found, reference)
    refused = _refused(model) if isinstance(model, nn.Module) else {}
    verified, pictures = [], []
    timed: dict[tuple, list[Speed]] = {}
    for one in found:
        if progress is not None:
            progress(one.name)
        layer = _verify_layer(one, before.get(one.name), refused.get(one.name, ""))
        layer.permutation = (permutation or {}).get(one.name)
        if measure and layer.packs and not one.weight.is_meta:
            key = (*one.weight.shape, one.weight.dtype, one.weight.device)
            if key not in timed:
                timed[key] = _measure(one.weight, tokens)
            layer.speeds = timed[key]
        verified.append(layer)
        pictures.append(_picture(one.weight, layer, before.get(one.name)))
    from ..info import cpu_name

    device = next((one.weight.device for one in found), torch.device("cpu"))
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    if device.type == "cpu":
        machine += f", {torch.get_num_threads()} threads"
    return Verification(verified, machine, sensitivity or {}, pictures)


def _weights(model: nn.Module | Mapping[str, Tensor]) -> Iterator[_Weight]:
    if not isinstance(model, nn.Module):
        yield from _weights_of_state(model)
        return
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            packed = module._canonical()
            weight = module.weight.detach()
            yield _Weight(name, "SparseLinear", weight, None, packed, module)
        elif isinstance(module, PRUNABLE):
            if nn.parameter.is_lazy(module.weight):
                raise ValueError(
                    f"verify: layer {name} is not initialised yet: run a batch through the model first"
                )
            held = mask_of(module)
            mask = None if held is None else held.mask
            kind = next(k.__name__ for k in PRUNABLE if isinstance(module, k))
            yield _Weight(name, kind, module.weight.detach(), mask, None, module)


def _weights_of_state(state: Mapping[str, Tensor]) -> Iterator[_Weight]:
    original, held = ".parametrizations.weight.original", ".parametrizations.weight.0.mask"
    for key, tensor in state.items():
        if not (isinstance(tensor, Tensor) and tensor.dtype in ops.PRODUCT_DTYPES):
            continue
        name, _, last = key.rpartition(".")
        if (
            last == "values"
            and (meta := state.get(key.removesuffix("values") + "meta")) is not None
        ):
            weight = torch.ops.sparsekern.unpack_24(tensor, meta)
            yield _Weight(name, "SparseLinear", weight, None, (tensor, meta))
        elif (
            key.endswith(original)
            and (mask := state.get(key.removesuffix(original) + held)) is not None
        ):
            weight = torch.where(mask, tensor, tensor.new_zeros(()))
            yield _Weight(key.removesuffix(original), f"{tensor.dim()}-D", weight, mask)
        elif last == "weight" and 2 <= tensor.dim() <= 5:
            yield _Weight(name, f"{tensor.dim()}-D", tensor)


def _reference(
    found: list[_Weight], reference: nn.Module | Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The reference's weights by the names of the layers found, padded as a packed file pads."""
    if reference is None:
        return {}
    weights = {one.name: one.weight for one in _weights(reference)}
    if found and not any(one.name in weights for one in found):
        raise ValueError(
            f"verify: reference has none of the layers {', '.join(one.name for one in found)};"
            f" it has {', '.join(weights) or 'none'}"
        )
    shared = {}
    for one in found:
        if one.name not in weights:
            continue
        before = weights[one.name]
        if one.packed is not None and one.module is None and before.dim() == 2:
            before = padded(before)
        if before.shape != one.weight.shape:
            raise ValueError(
                f"verify: reference has {one.name} of shape {tuple(before.shape)}, the model"
                f" {tuple(one.weight.shape)}"
            )
        shared[one.name] = before.to(one.weight.device)
    return shared


def _refused(model: nn.Module) -> dict[str, str]:
    """Why sparsify would leave a layer dense although it is 2:4, by name."""
    # On meta tensors: what is asked is about modules, and a large model is not to be copied for it.
    tensors = {
        id(t): t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values())
    }
    memo = {
        i: nn.Parameter(t.to("meta"), t.requires_grad)
        if isinstance(t, nn.Parameter)
        else t.to("meta")
        for i, t in tensors.items()
        if t is not None and not nn.parameter.is_lazy(t)
    }
    skeleton = copy.deepcopy(model, memo)
    for module in {held.module for held in masks(skeleton)}:
        with contextlib.suppress(ValueError):  # other parametrizations: sparsify_ will name them
            finalize(module)
    if isinstance(skeleton, nn.Linear):
        return {"": "the model is a layer itself: SparseLinear.from_linear packs it"}
    return {layer.name: layer.reason for layer in sparsify_(skeleton) if layer.reason}


def _verify_layer(one: _Weight, before: Tensor | None, refused: str) -> VerifiedLayer:
    weight = one.weight
    rows = padded(matrix(weight)).contiguous()
    density = weight.count_nonzero().item() / max(1, weight.numel())
    pattern = _pattern(rows, density)
    linear = weight.dim() == 2
    is_24 = pattern in _IS_24
    packs = one.packed is not None or (is_24 and linear and not refused)
    if packs:
        why = ""
    elif not is_24:
        why = _first_fault(weight, rows)
    else:
        why = refused if linear else "2:4, but convolutions compute dense here"
    total = before.abs().double().sum().item() if before is not None else 0.0
    kept = before[weight != 0].abs().double().sum().item() / total if total else None
    N, K = rows.shape
    return VerifiedLayer(
        one.name,
        one.kind,
        tuple(weight.shape),
        str(weight.dtype).removeprefix("torch."),
        pattern,
        density,
        one.mask is not None,
        one.packed is not None,
        packs,
        why,
        kept,
        None,
        weight.nbytes,
        N * (K // 2) * weight.element_size() + N * ((K + 7) // 8) if packs else None,
        problems=_problems(one),
    )


def _pattern(rows: Tensor, density: float) -> str:
    """The strictest pattern of a matrix ``[rows, K]``, K a multiple of 4."""
    if density >= _DENSE_FROM or not rows.numel():
        return "dense"
    kept = rows != 0
    for pattern in _PATTERNS:
        if _at_most(kept, pattern):
            whole = kept.shape[0] % 4 == 0  # else the transpose has no groups
            both = pattern == NM(2, 4) and whole and _at_most(kept.T, pattern)
            return "2:4-transposable" if both else str(pattern)
    return "unstructured"


def _at_most(kept: Tensor, pattern: NM) -> bool:
    filled = F.pad(kept, (0, -kept.shape[1] % pattern.m))
    groups = filled.reshape(-1, pattern.m).sum(-1, dtype=torch.int8)
    return int(groups.max()) <= pattern.n


def _first_fault(weight: Tensor, rows: Tensor) -> str:
    """Where a weight is not 2:4 first, in the words of its own shape."""
    first = ops._first_dense_group(rows)
    if first is None:
        return "fewer input features than a group has"
    row, group = first
    columns = range(4 * group, min(4 * group + 4, matrix(weight).shape[1]))
    count = int(rows[row, 4 * group : 4 * group + 4].count_nonzero())
    span = f"{columns[0]} to {columns[-1]}"
    if weight.dim() == 2:
        return f"row {row}, group {group} (columns {span}) has {count} non-zeros"
    kernel = weight.shape[2:]
    place, left = [], row % math.prod(kernel)
    for size in reversed(kernel):
        place.insert(0, left % size)
        left //= size
    return (
        f"output {row // math.prod(kernel)}, kernel {tuple(place)}, group {group} (input channels {span})"
        f" has {count} non-zeros"
    )


def _problems(one: _Weight) -> list[str]:
    problems = []
    if not bool(one.weight.isfinite().all()):
        bad = one.weight.numel() - int(one.weight.isfinite().sum())
        problems.append(f"{bad} weights are infinite or NaN")
    if one.mask is not None:
        if one.mask.shape != one.weight.shape or one.mask.dtype is not torch.bool:
            problems.append(
                f"the mask is {one.mask.dtype} of shape {tuple(one.mask.shape)}, not torch.bool of the weight's"
            )
        elif leaked := int((one.weight[~one.mask] != 0).sum()):
            problems.append(f"{leaked} weights that the mask drops are not zero")
    if one.packed is not None:
        try:
            ops.check_24(*(t.detach() for t in one.packed))
        except (TypeError, ValueError) as error:
            problems.append(str(error))
    return problems


# ---- speed ----


def _measure(weight: Tensor, tokens: Sequence[int], seconds: float = 0.3) -> list[Speed]:
    """F.linear, linear_24 and linear_24_prepacked in turn, round after round, at each number of tokens."""
    weight = padded(weight).contiguous()
    values, meta = ops.pack_24(weight)
    packed = ops.prepack_24(values, meta)
    N, K = weight.shape
    wait = torch.cuda.synchronize if weight.is_cuda else lambda: None
    speeds = []
    for M in tokens:
        x = torch.randn(M, K, device=weight.device).to(weight.dtype)
        forms = (
            lambda x=x: F.linear(x, weight),
            lambda x=x: ops.linear_24(x, values, meta),
            lambda x=x: ops.linear_24_prepacked(x, packed, N),
        )
        for form in forms * 3:  # first-use self-tests, allocations, clocks
            form()
        wait()
        times: tuple[list[float], ...] = ([], [], [])
        end = time.perf_counter() + seconds
        while len(times[0]) < 7 or (len(times[0]) < 500 and time.perf_counter() < end):
            for form, ms in zip(forms, times, strict=True):
                start = time.perf_counter()
                form()
                wait()
                ms.append((time.perf_counter() - start) * 1e3)
        speeds.append(Speed(M, *map(statistics.median, times)))
    return speeds


# ---- the picture ----


def _picture(weight: Tensor, layer: VerifiedLayer, before: Tensor | None) -> _Picture:
    """Small tensors on the CPU that stand for a layer."""
    kept = matrix(weight) != 0
    # Of N:M any coarser view is one grey; of the rest a corner says nothing.
    corner = layer.pattern not in ("unstructured", "dense")
    if corner:
        bands = kept[:24, :96].float()
    else:
        size = tuple(min(n, most) for n, most in zip(kept.shape, (128, 800), strict=True))
        bands = F.adaptive_avg_pool2d(kept[None, None].float(), size)[0, 0]
    flat = [w.float().flatten().cpu() for w in (weight[weight != 0], before) if w is not None]
    finite = torch.cat(flat)
    finite = finite[finite.isfinite()]
    top = float(finite.abs().max()) if finite.numel() else 1.0
    edges = torch.linspace(-top, top, _BINS + 1)
    counts = [torch.histc(w[w.isfinite()], _BINS, -top, top) for w in flat]
    return _Picture(bands.cpu(), corner, edges, counts[1] if len(counts) > 1 else None, counts[0])


def _draw_bands(axes: Axes, layer: VerifiedLayer, picture: _Picture) -> None:
    axes.imshow(picture.bands.numpy(), cmap="Greys", vmin=0, aspect="auto", interpolation="nearest")
    rows, columns = picture.bands.shape
    part = f", first {rows} x {columns}" if picture.corner else ""
    text = f"{layer.name}: {layer.pattern}, {layer.density:.1%} kept{part}"
    axes.set_title(text, fontsize=9, loc="left")
    axes.set_yticks([])
    if picture.corner:
        axes.set_xticks([c - 0.5 for c in range(0, columns, 4)], [])
    axes.set_xlabel(
        "input features" if not picture.corner else "input features by four", fontsize=8
    )
    axes.tick_params(labelsize=7)


def _draw_histogram(axes: Axes, picture: _Picture, legend: bool) -> None:
    for counts, name in ((picture.before, "before"), (picture.after, "after")):
        if counts is not None:
            axes.stairs(
                counts.numpy(), picture.edges.numpy(), fill=name == "before", color=_COLOURS[name],
                label="before" if name == "before" else "after, zeros left out",
            )  # fmt: skip
    axes.set_xlabel("weight", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=7, frameon=False)


def _draw_sensitivity(axes: Axes, sensitivity: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    for name, curve in sensitivity.items():
        density, metric = zip(*sorted(curve), strict=True)
        axes.plot([100 * d for d in density], metric, "o-", markersize=3, label=name)
    axes.set_xlabel("density of that layer alone, %", fontsize=8)
    axes.set_ylabel("metric", fontsize=8)
    axes.set_title("Sensitivity", fontsize=9, loc="left")
    axes.legend(fontsize=7, frameon=False)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _size(dense: int, packed: int | None) -> str:
    """Bytes as they are, and as they would be."""
    return _bytes(dense) if packed in (None, dense) else f"{_bytes(dense)} → {_bytes(packed)}"


def _bytes(count: int) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
