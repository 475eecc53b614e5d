"""What tables 2 and 3 say of a net: non-zeros in activations and weights, and the FLOP that they leave."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsekern import pruning

from .nets import ROUNDS, Net
from .train import Images, State, error, restore


@dataclass(frozen=True)
class Row:
    """A layer, or all: weights without biases, and shares from 0 to 1.

    Attributes:
        flop: two per multiply-add, of the dense layer.
        act: share of its outputs that are not zero, on the test images.
        kept: share of its weights that are not zero.
        flop_kept: of its FLOP those with a weight that is kept and an input that is not zero, taken as
            independent: `kept` times `act` of the layer before. The first layer's inputs count as non-zero.
    """

    name: str
    weights: int
    flop: int
    act: float
    kept: float
    flop_kept: float


@torch.no_grad()
def activations(model: nn.Module, names: list[str], x: Tensor) -> dict[str, tuple[int, float]]:
    """Of each module named: outputs per image, and the share of them that are not zero."""
    counts = {name: [0, 0] for name in names}

    def count(name: str):
        def hook(module, inputs, output):
            counts[name][0] += int(output.count_nonzero())
            counts[name][1] += output.numel()

        return hook

    hooks = [model.get_submodule(n).register_forward_hook(count(n)) for n in names]
    model.eval()
    for part in x.split(500):
        model(part)
    for hook in hooks:
        hook.remove()
    return {name: (total // len(x), alive / total) for name, (alive, total) in counts.items()}


def rows(net: Net, model: nn.Module, x: Tensor) -> list[Row]:
    """One per layer, and the total: weights and FLOP summed, Act% by outputs, FLOP% by FLOP."""
    outputs = activations(model, [layer.output for layer in net.layers], x)
    found, act_before = [], 1.0
    for layer in net.layers:
        weight = model.get_submodule(layer.module).weight
        kept = int(weight.count_nonzero()) / weight.numel()
        act = outputs[layer.output][1]
        flop = 2 * weight.numel() * layer.places
        found.append(Row(layer.name, weight.numel(), flop, act, kept, kept * act_before))
        act_before = act
    weights, flop = sum(r.weights for r in found), sum(r.flop for r in found)
    elements = [outputs[layer.output][0] for layer in net.layers]
    act = sum(r.act * n for r, n in zip(found, elements, strict=True)) / sum(elements)
    kept = sum(r.kept * r.weights for r in found) / weights
    total = Row("total", weights, flop, act, kept, sum(r.flop_kept * r.flop for r in found) / flop)
    return [*found, total]


@dataclass
class Measured:
    """One training of one net, from its last state.

    Attributes:
        records: of the stages, errors from 0 to 1; see ``train.Record``.
        parameters, alive: with biases; alive ones are not zero, biases all.
        neurons, dead, smaller: neurons of all layers, those taken out, parameters after that.
        smaller_error: of the net without them.
        storage: every tensor in the file, see ``pruning.Stored``.
    """

    net: str
    seed: int
    records: list[dict]
    rows: list[Row]
    parameters: int
    alive: int
    neurons: int
    dead: int
    smaller: int
    smaller_error: float
    storage: list[pruning.Stored]
    file_bytes: int
    seconds: float

    @property
    def before(self) -> float:
        return self.records[0]["error"]

    @property
    def pruned(self) -> float:
        """The worst right after a pruning of the last round."""
        return max(r["pruned"] for r in self.records if r["stage"].startswith(f"round {ROUNDS}"))

    @property
    def after(self) -> float:
        return self.records[-1]["error"]

    @property
    def rate(self) -> float:
        """All parameters over those that are left, biases too, as in the paper's table 1."""
        return self.parameters / self.alive


def model_of(net: Net, state: Mapping[str, Tensor]) -> nn.Module:
    model = net.build().to(memory_format=torch.channels_last)
    restore(model, state)
    return model


def measured(net: Net, seed: int, state: State, images: Images) -> Measured:
    model = model_of(net, state.model)
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    found = rows(net, model, images.x_test)
    with tempfile.TemporaryDirectory() as folder:
        stored = pruning.save_relative(model, Path(folder) / "pruned.safetensors")
        again = net.build().to(memory_format=torch.channels_last)
        again.load_state_dict(pruning.load_relative(Path(folder) / "pruned.safetensors"))
    if error(again, images.x_test, images.y_test) != state.records[-1]["error"]:
        raise AssertionError(f"{net.name}, seed {seed}: what was stored errs otherwise than before")
    smaller, dead = pruning.remove_dead_neurons(model)
    return Measured(
        net.name,
        seed,
        state.records,
        found,
        found[-1].weights + biases,
        round(found[-1].kept * found[-1].weights) + biases,
        sum(d.neurons for d in dead),
        sum(d.removed for d in dead),
        sum(p.numel() for p in smaller.parameters()),
        error(smaller, images.x_test, images.y_test),
        stored.tensors,
        stored.file_bytes,
        state.seconds,
    )
