"""Neurons that pruning has cut off, found and taken out: a smaller dense net comes out (Han et al. 2015, section 3.5).

::

    no output   every weight that reads the neuron is zero      it goes, and nothing changes
    no input    every weight into it is zero                    it gives one constant, what the modules
                                                                behind it make of its bias: that is
                                                                folded into the bias of the next layer

A neuron is an output feature of an ``nn.Linear`` or an output channel of an ``nn.Conv2d``. One pass
forward takes those without input, as folding cuts the next layer's, and one pass back those without
output; after these there are no more.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .chains import Chain, chains
from .dropout import DROPOUTS
from .masks import finalize

ELEMENTWISE = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus,
    nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
LAYERS = (nn.Linear, nn.Conv2d)


@dataclass
class DeadNeurons:
    """The dead neurons of one layer, by their index in it as it was.

    Attributes:
        neurons: how many the layer had.
        no_input, no_output: those that are taken out, each in one of the two.
        kept: dead ones that cannot be taken out.
        reason: why `kept` are, "" if there are none.
    """

    layer: str
    neurons: int
    no_input: list[int] = field(default_factory=list)
    no_output: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    reason: str = ""

    @property
    def removed(self) -> int:
        return len(self.no_input) + len(self.no_output)

    def __str__(self) -> str:
        text = (
            f"{self.layer:24s} {self.neurons} to {self.neurons - self.removed} neurons: "
            f"{len(self.no_input)} without input, {len(self.no_output)} without output"
        )
        return f"{text}; {len(self.kept)} dead ones stay: {self.reason}" if self.kept else text


class DeadReport(list[DeadNeurons]):
    """One :class:`DeadNeurons` per linear and 2-D convolution layer in a sequence; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def dead_neurons(model: nn.Module) -> DeadReport:
    """What :func:`remove_dead_neurons` would take out; the model stays as it is."""
    return remove_dead_neurons(model)[1]


@torch.no_grad()
def remove_dead_neurons(model: nn.Module) -> tuple[nn.Module, DeadReport]:
    """A copy of a pruned model without its dead neurons, and the report of them.

    In ``eval()`` the copy gives what the model gives, to rounding. It holds no masks; to retrain it,
    ``hold(layer, layer.weight != 0)``. Neurons are taken out between two layers of an ``nn.Sequential``,
    flattened, with activations, pools, dropout, batch normalisation and ``nn.Flatten`` between them. An
    ``nn.Linear`` there is taken to read ``[batch, features]``. Where a constant would not be the same at
    every place, such as in front of a convolution that pads with zeros, the neuron stays, with the reason.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> _ = model[0].weight.data[1].zero_(), model[2].weight.data[:, 2].zero_()
    >>> smaller, report = remove_dead_neurons(model)
    >>> print(report[0])
    0                        3 to 1 neurons: 1 without input, 1 without output
    >>> smaller[0].out_features, smaller[2].in_features
    (1, 1)
    """
    smaller = finalize(copy.deepcopy(model))
    shared = _shared(smaller)
    report = DeadReport()
    for chain in chains(smaller):
        joints = _joints(chain, shared)
        for joint in joints:
            joint.fold_constants()
        for joint in reversed(joints):
            joint.drop_unread()
        report += [joint.dead for joint in joints]
    return smaller, report


def _shared(model: nn.Module) -> set[int]:
    """Modules with state that stand in two places, or whose parameters do, by id."""
    modules = [m for _, m in model.named_modules(remove_duplicate=False)]
    places = Counter(id(m) for m in modules)
    owners = Counter(id(p) for m in set(modules) for p in m._parameters.values() if p is not None)
    return {
        id(m)
        for m in modules
        if (places[id(m)] > 1 and m.state_dict())
        or any(owners[id(p)] > 1 for p in m._parameters.values())
    }


def _joints(chain: Chain, shared: set[int]) -> list[_Joint]:
    """Each layer of a chain with what is behind it up to the next; the last one has none."""
    at = [i for i, (_, module) in enumerate(chain) if type(module) in LAYERS]
    ends = [*at[1:], None]
    return [
        _Joint(
            *chain[i],
            chain[i + 1 : end],
            None if end is None else chain[end][1],
            shared,
        )
        for i, end in zip(at, ends, strict=True)
    ]


class _Joint:
    """A layer, the modules behind it, and the layer that reads them."""

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        between: Chain,
        reader: nn.Module | None,
        shared: set[int],
    ):
        self.layer, self.between, self.reader = layer, between, reader
        self.dead = DeadNeurons(name, layer.weight.shape[0])
        self.alive = torch.arange(layer.weight.shape[0])  # indices in the layer as it was
        self.refusal = self._refusal(shared)

    def _refusal(self, shared: set[int]) -> str:
        """Why no neuron can be taken out between these layers, or ""."""
        layer, reader, neurons = self.layer, self.reader, len(self.alive)
        if reader is None:
            return "nothing is known of what reads the last layer of a sequence"
        modules = [layer, *(m for _, m in self.between), reader]
        if any(id(m) in shared for m in modules):
            return "a module or a parameter of it is used in two places"
        if any(getattr(m, "groups", 1) != 1 for m in (layer, reader)):
            return "convolutions in groups pair inputs with outputs"
        flat, norms = isinstance(layer, nn.Linear), []
        for name, module in self.between:
            kind = type(module)
            if kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
                flat = True
            elif (
                kind is (nn.BatchNorm1d if flat else nn.BatchNorm2d) and module.track_running_stats
            ):
                norms.append((name, module, flat))
            elif kind not in (*ELEMENTWISE, *DROPOUTS, *(() if flat else POOLS)):
                return f"{name}, {module}, is not known to act on each neuron alone"
        if flat != isinstance(reader, nn.Linear):
            return "from a convolution to a linear layer it takes one nn.Flatten(), elsewhere none"
        features = reader.weight.shape[1]
        if features % neurons or (not isinstance(layer, nn.Conv2d) and features != neurons):
            return f"{neurons} neurons do not make the {features} inputs of the next layer"
        for name, norm, after in norms:
            if norm.num_features != (features if after else neurons):
                return f"{name} normalises another number of features"
        return ""

    def _read(self) -> Tensor:
        """The reader's weight as ``[out, neurons, places]``: of a kernel, or of a map that was flattened."""
        weight = self.reader.weight
        return weight.reshape(weight.shape[0], len(self.alive), -1)

    def fold_constants(self) -> None:
        """Take out what has no input."""
        dead = self.layer.weight.flatten(1).count_nonzero(1) == 0
        if not dead.any():
            return
        if self.refusal:
            self._stays(dead, self.refusal)
            return
        constants, uneven, reason = self._constants()
        self._stays(dead & uneven, reason)
        dead = self._all_but_one(dead & ~uneven)
        read = self._read()
        # Summed in fp64, and rounded once.
        places = constants[dead].double().expand(-1, read.shape[2])
        folded = torch.einsum("ons,ns->o", read[:, dead].double(), places)
        if folded.any():
            bias = 0.0 if self.reader.bias is None else self.reader.bias.double()
            grad = self.reader.weight.requires_grad
            bias = (folded + bias).to(read.dtype)
            self.reader.bias = nn.Parameter(bias, grad)
        self.dead.no_input += self.alive[dead.cpu()].tolist()
        self._keep(~dead)

    def drop_unread(self) -> None:
        """Take out what nothing reads."""
        if self.refusal:
            return
        dead = self._read().count_nonzero((0, 2)) == 0
        if dead.any():
            dead = self._all_but_one(dead)
            gone = self.alive[dead.cpu()].tolist()
            self.dead.no_output += gone
            self.dead.kept = [n for n in self.dead.kept if n not in set(gone)]
            self.dead.reason = self.dead.reason if self.dead.kept else ""
            self._keep(~dead)

    def _constants(self) -> tuple[Tensor, Tensor, str]:
        """What each neuron gives the reader if it has no input, ``[neurons, places]``, or ``[neurons, 1]`` if
        that is the same everywhere; for which neurons it is not a constant after all, bool, and why.
        """
        bias, neurons, reason = self.layer.bias, len(self.alive), ""
        uneven = self.layer.weight.new_zeros(neurons, dtype=torch.bool)
        c = self.layer.weight.new_zeros(neurons) if bias is None else bias.detach().clone()
        places = self.reader.weight.shape[1] // neurons
        for name, module in self.between:
            if isinstance(module, ELEMENTWISE):
                c = module(c)
            elif isinstance(module, BATCH_NORMS):
                statistics = (module.running_mean, module.running_var, module.weight, module.bias)
                c = nn.functional.batch_norm(c[None], *statistics, eps=module.eps)[0]
            elif isinstance(module, nn.Flatten) and len(c) == neurons:
                c = c.repeat_interleave(places)
            elif isinstance(module, nn.AvgPool2d) and not _even(module) and c.any():
                # A shift behind it may make the inner ones 0 again, but not the ones at the border.
                uneven, reason = uneven | (c != 0), f"{name} does not keep a constant at its border"
        c = c.view(neurons, -1)
        pads = isinstance(self.reader, nn.Conv2d) and self.reader.padding_mode == "zeros"
        if pads and self.reader.padding not in ((0, 0), "valid"):
            uneven = uneven | (c != 0).any(1)
            reason = reason or "the next convolution pads with zeros, which no bias stands for"
        return c, uneven, reason

    def _stays(self, dead: Tensor, reason: str) -> None:
        if dead.any():
            self.dead.kept = sorted({*self.dead.kept, *self.alive[dead.cpu()].tolist()})
            self.dead.reason = reason

    def _all_but_one(self, dead: Tensor) -> Tensor:
        """A layer of no neurons is none in torch: the first one stays."""
        if dead.all():
            dead = dead.clone()
            dead[0] = False
            self._stays(torch.arange(len(dead)) == 0, "a layer takes one neuron")
        return dead

    def _keep(self, kept: Tensor) -> None:
        """Cut the layer, what is between and the reader down to the neurons kept, bool ``[neurons]``."""
        spread = kept.repeat_interleave(self.reader.weight.shape[1] // len(kept))
        _cut(self.layer, kept)
        flat = False
        for _, module in self.between:
            flat = flat or isinstance(module, nn.Flatten)
            if isinstance(module, BATCH_NORMS):
                _cut(module, spread if flat else kept)
        weight = self.reader.weight
        self.reader.weight = nn.Parameter(weight[:, spread].clone(), weight.requires_grad)
        name = "in_features" if isinstance(self.reader, nn.Linear) else "in_channels"
        setattr(self.reader, name, int(spread.sum()))
        self.alive = self.alive[kept.cpu()]


def _even(pool: nn.AvgPool2d) -> bool:
    """Whether the average of a constant is that constant everywhere."""
    padded = pool.padding not in (0, (0, 0)) and pool.count_include_pad
    return not padded and pool.divisor_override is None


def _cut(module: nn.Module, kept: Tensor) -> None:
    """Cut everything of a layer or of a normalisation that runs along its output neurons."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            setattr(module, name, nn.Parameter(parameter[kept].clone(), parameter.requires_grad))
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.dim():
            setattr(module, name, buffer[kept].clone())
    sizes = {nn.Linear: "out_features", nn.Conv2d: "out_channels"}
    setattr(module, sizes.get(type(module), "num_features"), int(kept.sum()))
