"""What one training step keeps for its backward pass: seen by hooks, without changing the step.

Two views of the same forward pass. `maps` are the inputs of layers, which vDNN (Rhu et al., arXiv
1602.08124) moves and whose zeros Rhu et al. (arXiv 1705.01626) count. `saved` is all that autograd
packs, a storage counted once however many nodes keep it, and neither parameters nor buffers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

# The layers whose inputs are maps, and what they are called in tables.
KINDS: dict[type[nn.Module], str] = {
    nn.Conv2d: "conv",
    nn.MaxPool2d: "pool",
    nn.AdaptiveAvgPool2d: "pool",
    nn.Linear: "dense",
    nn.BatchNorm2d: "norm",
    nn.LayerNorm: "norm",
}


@dataclass
class Map:
    """The input of a layer, and of every later one that reads the same memory."""

    layer: str
    kind: str
    tensor: Tensor


@dataclass
class Saved:
    """A storage that autograd keeps, as one flat tensor over all of it, and the layer that saved it last.

    All of it, because a view keeps the whole alive. The last layer, because from there on nothing in the
    forward pass needs it any more, and it can go.
    """

    layer: str
    tensor: Tensor


@dataclass
class Captured:
    """Of one forward pass, in its order.

    Attributes:
        traffic: layer, in the order in which they end, to the bytes that it reads and writes without its
            parameters; 0 where it has layers inside.
        parameter_bytes: of the parameters and buffers that autograd packed, each once.
        packed_bytes: of all that autograd packed, each time it did.
    """

    maps: list[Map] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    traffic: dict[str, int] = field(default_factory=dict)
    parameter_bytes: int = 0
    packed_bytes: int = 0


def _key(tensor: Tensor) -> int:
    """The storage itself, not its address: fake tensors have none. It must be held alive meanwhile."""
    return tensor.untyped_storage()._cdata


def _nbytes(found: object) -> int:
    tensors = found if isinstance(found, (tuple, list)) else (found,)
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


@contextlib.contextmanager
def capture(model: nn.Module) -> Iterator[Captured]:
    """Record the forward pass inside the context; the result is complete on leaving it.

    Everything recorded stays alive with the result, so compress it before the backward pass and let
    it go.
    """
    found = Captured()
    layers = ["loss"]  # what runs now; outside the model it is the loss
    own = {_key(t) for t in (*model.parameters(), *model.buffers())}
    counted, maps, saved = set(), {}, {}

    def enter(name: str, module: nn.Module):
        def hook(_, inputs):
            layers.append(name)
            kind = KINDS.get(type(module))
            if kind is not None:
                x = inputs[0].detach()
                maps.setdefault(_key(x), Map(name, kind, x))

        return hook

    def leave(name: str, leaf: bool):
        def hook(_, inputs, output):
            layers.pop()
            found.traffic[name] = _nbytes(inputs) + _nbytes(output) if leaf else 0

        return hook

    def pack(tensor: Tensor) -> Tensor:
        key = _key(tensor)
        found.packed_bytes += tensor.nbytes
        if key in own:
            if key not in counted:
                found.parameter_bytes += tensor.nbytes
            counted.add(key)
            return tensor
        saved.pop(key, None)  # so that the order is that of the last time
        numel = tensor.untyped_storage().nbytes() // tensor.itemsize
        saved[key] = Saved(layers[-1], tensor.detach().as_strided((numel,), (1,), 0))
        return tensor

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                leaf = not any(True for _ in module.children())
                for handle in (
                    module.register_forward_pre_hook(enter(name, module)),
                    module.register_forward_hook(leave(name, leaf)),
                ):
                    stack.callback(handle.remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t))
        yield found
    found.maps, found.saved = list(maps.values()), list(saved.values())


def _attention_flops(query, key, value, *_, out_shape=None, **__) -> int:
    return sdpa_flop_count(query, key, value)


def forward_flops(model: nn.Module, inputs: Tensor) -> dict[str, int]:
    """Operations of a forward pass by innermost layer, two per multiply-add; layers without are left out.

    Attention is counted as if nothing were masked.
    """
    # torch counts attention's kernels on GPUs alone.
    also = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=also) as counter, torch.no_grad():
        model(inputs)
    top = type(model).__name__
    counts = {
        name.removeprefix(f"{top}."): sum(by_op.values())
        for name, by_op in counter.get_flop_counts().items()
        if name not in ("Global", top)
    }
    # A layer's count holds that of the layers inside it.
    children = dict.fromkeys(counts, 0)
    for name, count in counts.items():
        parent = name.rpartition(".")[0]
        if parent in children:
            children[parent] += count
    return {name: n - children[name] for name, n in counts.items() if n - children[name]}
