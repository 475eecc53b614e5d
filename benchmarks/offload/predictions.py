"""Predicted steps of each net at the size of its publication, with the ratios that were measured layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsekern.offload.nets import NETS

from .capture import capture, forward_flops
from .results import Prediction, Trained
from .virtualised import (
    Layer,
    Machine,
    compressed_offload,
    raw_offload,
    timed,
    without_offload,
)

# Inputs, not claims. Links: what a copy reaches on PCIe gen3, gen4 and gen5, and half of NVLink-C2C's 900 GB/s.
# Engines: hardware that is far from being the limit, as Rhu et al. 2018 propose, and kernels at a third of the device
# memory's rate or a little more. FLOP/s and memory: below the peaks of the cards named, as training is.
PAPER = Machine("Titan X, PCIe gen3, fp32", 5e12, 250e9, 12.8e9, 200e9, "dma", 4)
MODERN = (
    Machine("A100, PCIe gen4, bf16", 150e12, 1.4e12, 25.1e9, 500e9, "kernel", 2),
    Machine("H100, PCIe gen5, bf16", 400e12, 2.6e12, 52.8e9, 1e12, "kernel", 2),
    Machine("H100, NVLink-C2C, bf16", 400e12, 2.6e12, 450e9, 1e12, "kernel", 2),
)
MACHINES = (PAPER, *MODERN)

# As published, where that differs from the default. The transformer keeps the depth that was trained, for its ratios.
_IMAGENET = {"classes": 1000}
_WIDE = {"width": 1024, "heads": 16}
FULL = {
    "alexnet": _IMAGENET,
    "vgg16": _IMAGENET,
    "squeezenet": _IMAGENET,
    "resnet18": _IMAGENET,
    "transformer-relu": _WIDE,
    "transformer-relu2": _WIDE,
    "transformer-gelu": _WIDE,
}


@dataclass
class FullLayer:
    """For one image or sequence: operations of the forward pass, elements that it moves, floats that it saves."""

    name: str
    flops: int
    traffic: float
    saved: float


def full_layers(net: str) -> list[FullLayer]:
    """Layer by layer, in the order of the forward pass, from shapes alone: nothing is allocated."""
    with FakeTensorMode():
        model = NETS[net].build(size=NETS[net].full_size, **FULL[net])
        inputs, targets = NETS[net].batch(
            1, size=NETS[net].full_size, generator=torch.Generator().manual_seed(0)
        )
        with capture(model) as captured:
            NETS[net].loss(model, inputs, targets)
        flops = forward_flops(model, inputs)
    saved: dict[str, float] = {}
    for s in captured.saved:
        if s.tensor.is_floating_point():
            saved[s.layer] = saved.get(s.layer, 0) + s.tensor.numel()
    return [
        FullLayer(name, flops.get(name, 0), nbytes / 4, saved.get(name, 0))
        for name, nbytes in captured.traffic.items()
    ]


def layers_on(full: list[FullLayer], trained: Trained, machine: Machine) -> list[Layer]:
    """The model's layers, with the ratios of the last record of `trained`."""
    ratios = {s.layer: s.ratio(machine.itemsize) for s in trained.records[-1].saved}
    return [
        timed(
            layer.name,
            layer.flops,
            layer.traffic * machine.itemsize,
            layer.saved * machine.itemsize,
            ratios.get(layer.name, 1.0),
            machine,
        )
        for layer in full
    ]


def predict(net: str, layers: list[Layer], machine: Machine) -> Prediction:
    steps = [
        without_offload(layers),
        raw_offload(layers, machine),
        compressed_offload(layers, machine),
    ]
    return Prediction(
        net,
        machine.name,
        [s.seconds for s in steps],
        [s.device_bytes for s in steps],
        [s.host_bytes for s in steps],
        steps[1].host_bytes / steps[2].host_bytes if steps[2].host_bytes else 1.0,
    )


def predictions(trained: dict[str, Trained]) -> list[Prediction]:
    found = []
    for net, t in trained.items():
        if net in FULL and t.records:
            full = full_layers(net)
            found += [predict(net, layers_on(full, t, m), m) for m in MACHINES]
    return found
