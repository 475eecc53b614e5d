"""The step time of a network whose saved activations live on the host, by the overlap rule of vDNN.

Rhu et al. 2016 (arXiv 1602.08124) offload what a layer saved while that layer's forward
pass runs, and fetch what the layer before will need while a layer's backward pass runs; the next
layer starts when both are through. With layers 1 to n, times f and b of their passes and o of their
transfers, which a layer that saves nothing has none of::

    forward   Σ_l max(f_l, o_l)
    backward  Σ_l max(b_l, o_p(l)),  p(l) the nearest layer before l that moved,
                                     if no later layer has fetched it already

What the last layer with anything to save keeps is needed at once, so it stays. ``o`` is the same both
ways, as the two passes never share the link. Two ways to compress, for a map of x bytes, ratio r, a
link of P bytes/s and an engine that takes or gives C raw bytes/s::

    dma     o = max(x / (r P), x / C)   in the copy engine, as Rhu et al. 2018 (arXiv 1705.01626) propose
    kernel  o = x / (r P), and x / C of the compute stream before the layer's forward pass and
            before its backward pass, as software has to

A map of ratio 1 or less moves raw and pays neither. So where every f exceeds its o nothing can be
gained, and where every o exceeds its f and b, and C is no limit, the gain is r.

Bytes on the device, of saved activations alone (parameters, gradients and workspace are the same with
and without): without offload all of them; with it the layer's own and the one being written for the
next or fetched for the one before, and the compressed copy where a kernel makes or reads it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Layer:
    """Seconds of its passes, bytes that it saves, and how many times smaller those become."""

    name: str
    forward: float
    backward: float
    nbytes: float = 0.0
    ratio: float = 1.0


@dataclass(frozen=True)
class Machine:
    """What a prediction takes in. Rates per second; none of them is a claim about a product.

    Attributes:
        flops: that a layer's products reach.
        memory: bytes of device memory, which bounds the layers that only move data.
        link: bytes of the link to the host, one way.
        engine: raw bytes that compression takes in, decompression gives out.
        kind: where compression runs, see the head of this file.
        itemsize: bytes of an activation.
    """

    name: str
    flops: float
    memory: float
    link: float
    engine: float = math.inf
    kind: Literal["dma", "kernel"] = "dma"
    itemsize: int = 4


@dataclass(frozen=True)
class Step:
    """Seconds of a training step without the optimiser; bytes of saved activations, at their peak on the device."""

    forward: float
    backward: float
    device_bytes: float
    host_bytes: float

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


def timed(
    name: str, flops: float, traffic: float, nbytes: float, ratio: float, machine: Machine
) -> Layer:
    """A layer by the roofline: the longer of its operations and its bytes; twice that backward.

    Twice, because the gradients of its inputs and of its weights each take as many operations.
    """
    forward = max(flops / machine.flops, traffic / machine.memory)
    return Layer(name, forward, 2 * forward, nbytes, ratio)


def without_offload(layers: Sequence[Layer]) -> Step:
    """Everything stays on the device: the oracle of both papers."""
    return Step(
        sum(layer.forward for layer in layers),
        sum(layer.backward for layer in layers),
        sum(layer.nbytes for layer in layers),
        0.0,
    )


def raw_offload(layers: Sequence[Layer], machine: Machine) -> Step:
    """vDNN: every map as it is."""
    return compressed_offload([replace(layer, ratio=1.0) for layer in layers], machine)


def compressed_offload(layers: Sequence[Layer], machine: Machine) -> Step:
    """vDNN with every map compressed that becomes smaller by it."""
    saving = [i for i, layer in enumerate(layers) if layer.nbytes]
    moved, following = saving[:-1], dict(itertools.pairwise(saving))
    in_kernel = [machine.kind == "kernel" and layer.ratio > 1 for layer in layers]
    packed = [layer.nbytes / max(1.0, layer.ratio) for layer in layers]

    def transfer(i: int) -> float:
        seconds = packed[i] / machine.link
        compresses_on_the_way = layers[i].ratio > 1 and not in_kernel[i]
        return max(seconds, layers[i].nbytes / machine.engine) if compresses_on_the_way else seconds

    def on_compute_stream(i: int) -> float:
        return layers[i].nbytes / machine.engine if in_kernel[i] else 0.0

    def beside(i: int) -> float:
        """Bytes of the compressed copy on the device, which only a kernel needs."""
        return packed[i] if in_kernel[i] else 0.0

    forward = backward = device = 0.0
    for i, layer in enumerate(layers):
        forward += layer.forward
        if i in moved:
            forward += on_compute_stream(i) + max(0.0, transfer(i) - layer.forward)
            device = max(device, layer.nbytes + beside(i) + layers[following[i]].nbytes)
    fetched = set()
    for i in reversed(range(len(layers))):
        layer, arriving, seconds = layers[i], 0.0, layers[i].backward
        before = max((m for m in moved if m < i), default=None)
        if before is not None:
            arriving = beside(before) or layers[before].nbytes
            if before not in fetched:
                seconds = max(seconds, transfer(before))
                fetched.add(before)
        if i in moved:
            seconds += on_compute_stream(i)
            arriving = max(arriving, beside(i))
        backward += seconds
        device = max(device, layer.nbytes + arriving)
    return Step(forward, backward, device, sum(packed[i] for i in moved))
