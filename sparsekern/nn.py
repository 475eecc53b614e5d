"""SparseLinear, a drop-in for nn.Linear with a 2:4 weight, and sparsify_, which swaps a model's layers in place."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import choices, ops

_ops = torch.ops.sparsekern
# Looked up once: an overload costs a microsecond less per call than its name.
_linear_24 = _ops.linear_24.default
_linear_24_prepacked = _ops.linear_24_prepacked.default


class SparseLinear(nn.Module):
    """``y = x · Wᵀ + b`` with a 2:4 weight held as ``values`` and ``meta``: 9/16 of the bytes in 16 bits.

    A drop-in for ``nn.Linear``: training (gradients for x, values and bias; an optimiser
    moves `values`, the pattern stays), ``state_dict`` and safetensors (plain tensors), ``.to``,
    ``.half()``, deepcopy, pickle, autocast, ``torch.compile`` and ``torch.export``. Any
    `in_features`: the weight is padded inside to a multiple of 4.

    A ``state_dict`` with a dense ``weight`` (an nn.Linear's) loads if that weight is 2:4.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: learn an additive bias.
        device, dtype: of the parameters.

    Attributes:
        values: Parameter ``[out_features, K/2]``, K being in_features rounded up to a multiple of
            4.
        meta: uint8 buffer ``[out_features, ceil(K/8)]``.
        prepacked: whether the weight is in the device's own layout (`packed`) instead, see :meth:`prepack`.
        bias: Parameter ``[out_features]`` or None.

    >>> layer = SparseLinear(8, 2)
    >>> layer(torch.ones(3, 8)).shape, layer.weight.count_nonzero(dim=1)
    (torch.Size([3, 2]), tensor([4, 4]))
    """

    __constants__ = ("in_features", "out_features")
    in_features: int
    out_features: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        K = _padded(in_features)
        self.in_features = in_features
        self.out_features = out_features
        self.values = nn.Parameter(torch.empty(out_features, K // 2, device=device, dtype=dtype))
        self.register_buffer(
            "meta", torch.empty(out_features, (K + 7) // 8, device=device, dtype=torch.uint8)
        )
        self.prepacked = False
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """nn.Linear's initialisation, pruned to 2:4; a prepacked layer is one again afterwards."""
        prepacked, training = self.prepacked, self.training
        self.unprepack()
        dense = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            self.values.device,
            self.values.dtype,
        )
        self._assign(dense.weight.detach())
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(dense.bias)
        if prepacked:
            self.prepack().training = training

    @torch.no_grad()
    def _assign(self, weight: Tensor) -> None:
        """Take the two largest of each four of a dense weight, in place."""
        values, meta = _ops.pack_24(padded(weight))
        self.values.copy_(values)
        self.meta.copy_(meta)

    # ---- to and from nn.Linear ----

    @classmethod
    def from_linear(cls, linear: nn.Linear, prune: bool = True) -> SparseLinear:
        """A SparseLinear with the weight of an nn.Linear, on its device, in its dtype and mode.

        Args:
            linear: stays as it is.
            prune: keep the two largest magnitudes of every four. Otherwise the weight must be 2:4
                already.

        Raises:
            ValueError: `prune` is false and the weight is not 2:4; names the row and group.
            TypeError: the weight's dtype has no product.
        """
        weight = linear.weight
        ops._check_dtype(
            "SparseLinear.from_linear", "linear.weight", weight.dtype, ops.PRODUCT_DTYPES
        )
        values, meta = ops.pack_24(padded(weight.detach()), prune=prune or weight.is_meta)
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, "meta", weight.dtype
        )
        layer.values = nn.Parameter(values, requires_grad=weight.requires_grad)
        layer.meta = meta
        if linear.bias is not None:
            layer.bias = nn.Parameter(
                linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad
            )
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The same layer as an nn.Linear with a dense weight; values and bias are copied."""
        weight, bias = self.weight.detach(), self.bias
        linear = nn.Linear(
            self.in_features, self.out_features, bias is not None, "meta", weight.dtype
        )
        trains = self._trains if self.prepacked else self.values.requires_grad
        linear.weight = nn.Parameter(weight.clone(), requires_grad=trains)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return linear.train(self.training)

    @property
    def weight(self) -> Tensor:
        """The dense weight ``[out_features, in_features]``, computed at each access; differentiable in `values`."""
        return _ops.unpack_24(*self._canonical())[:, : self.in_features]

    # ---- the inference form ----

    def prepack(self) -> SparseLinear:
        """Turn into the inference form, in place: the layout this device multiplies fastest.

        `values` and `meta` are None from then on, and `packed` holds the weight; an optimiser that holds the
        Parameter keeps its memory. ``state_dict`` stays the same. ``train()`` turns the layer back, with the same
        Parameter if something still holds it, and with the ``requires_grad`` that `values` had before.
        """
        if self.prepacked or self.meta.is_meta:
            return self.eval()
        parameter = self._parameters.get("values")
        if parameter is None:
            raise RuntimeError("SparseLinear.prepack: values is parametrized; remove that first")
        with torch.inference_mode(False), torch.no_grad():
            packed = _ops.prepack_24(parameter.detach(), self.meta)
        # The slots stay, in their order. New dicts, as those of a shallow copy are shared.
        self._parameters = self._parameters | {"values": None}
        self._buffers = self._buffers | {"meta": None}
        self.register_buffer("packed", packed, persistent=False)
        self._dtype, self._trains = parameter.dtype, parameter.requires_grad
        self._parameter = weakref.ref(parameter)
        self.prepacked = True
        return self.eval()

    def unprepack(self) -> SparseLinear:
        """Turn back into the form that trains: `values` and `meta`, in place."""
        if self.prepacked:
            with torch.inference_mode(False), torch.no_grad():
                values, meta = self._canonical()
                parameter = self._parameter()
                if parameter is None:
                    parameter = nn.Parameter(values, requires_grad=self._trains)
            self._parameters = self._parameters | {"values": parameter}
            self._buffers = self._buffers | {"meta": meta}
            self.prepacked = False
            del self.packed, self._parameter, self._dtype, self._trains
        return self

    def _canonical(self) -> tuple[Tensor, Tensor]:
        if not self.prepacked:
            return self.values, self.meta
        return _ops.unprepack_24(
            self.packed, self.out_features, _padded(self.in_features), self._dtype
        )

    def train(self, mode: bool = True) -> SparseLinear:
        if mode:
            self.unprepack()
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        # .to, .half, .cuda: the opaque layout belongs to one device and dtype, so it is undone and
        # done again.
        prepacked, training = self.prepacked, self.training
        self.unprepack()
        super()._apply(fn, recurse)
        if prepacked:
            self.prepack().training = training
        return self

    def __getstate__(self) -> dict:
        # For pickle and deepcopy: the canonical form, with a note to prepack again.
        state = self.__dict__.copy()
        if self.prepacked:
            values, meta = self._canonical()
            for name in ("_parameter", "_dtype", "_trains"):
                del state[name]
            state["prepacked"] = "again"
            parameter = nn.Parameter(values, requires_grad=self._trains)
            state["_parameters"] = self._parameters | {"values": parameter}
            state["_buffers"] = self._buffers | {"meta": meta}
            del state["_buffers"]["packed"]
            state["_non_persistent_buffers_set"] = self._non_persistent_buffers_set - {"packed"}
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self.prepacked == "again":
            self.prepacked, training = False, self.training
            self.prepack().training = training

    # ---- state_dict: always values, meta, bias ----

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.prepacked:
            values, meta = self._canonical()
            destination[prefix + "values"] = values
            destination[prefix + "meta"] = meta

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        prepacked, training = self.prepacked, self.training
        self.unprepack()
        state_dict = dict(state_dict)  # what is changed below is for this layer alone
        try:
            self._check_loaded(state_dict, prefix)
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
            if self._load_state_dict_pre_hooks and not self.meta.is_meta:
                ops.check_24(
                    self.values.detach(), self.meta
                )  # they may have changed what was checked
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix or 'SparseLinear: '}{error}")
        if prepacked:
            self.prepack().training = training

    def _check_loaded(self, state_dict: dict, prefix: str) -> None:
        """Pack a dense weight; refuse a packed one that is not legal."""
        dense, values, meta = prefix + "weight", prefix + "values", prefix + "meta"
        found = {k for k in (dense, values, meta) if isinstance(state_dict.get(k), Tensor)}
        if dense in found and values not in state_dict:
            weight = state_dict.pop(dense)
            if tuple(weight.shape) != (self.out_features, self.in_features):
                raise ValueError(
                    f"weight has shape {tuple(weight.shape)}; it takes {(self.out_features, self.in_features)}"
                )
            packed = ops.pack_24(padded(weight.detach()), prune=weight.is_meta)
            state_dict[values], state_dict[meta] = packed
        elif meta in found and not state_dict[meta].is_meta:
            stored = state_dict[values] if values in found else self.values
            ops.check_24(stored.detach(), state_dict[meta])

    # ---- the product ----

    def forward(self, input: Tensor) -> Tensor:
        x = input
        if self.in_features % 4:
            if x.shape[-1:] != (self.in_features,):
                raise ValueError(
                    f"SparseLinear: input has shape {tuple(x.shape)}; it takes [..., {self.in_features}]"
                )
            x = F.pad(x, (0, -self.in_features % 4))
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and self._expands(x):
            return F.linear(x, _ops.unpack_24(*self._canonical()), self.bias)
        if not self.prepacked:
            return _linear_24(x, self.values, self._buffers["meta"], self.bias)
        packed, device = self._buffers["packed"], x.device.type
        if not torch.is_autocast_enabled(device):
            return _linear_24_prepacked(x, packed, self.out_features, self.bias)
        # Autocast cannot change the dtype of an opaque layout: compute in it, hand on what was asked for.
        y = _linear_24_prepacked(x.to(self._dtype), packed, self.out_features, self.bias)
        return y if y.dtype is torch.float64 else y.to(torch.get_autocast_dtype(device))

    def _product(self) -> tuple[str, int, int, torch.dtype, torch.device]:
        """What :mod:`choices <sparsekern.choices>` knows the layer's product by: op, N, K, dtype and device."""
        if self.prepacked:
            op, dtype, weight = "linear_24_prepacked", self._dtype, self._buffers["packed"]
        else:
            op, dtype, weight = "linear_24", self.values.dtype, self._buffers["meta"]
        return op, self.out_features, _padded(self.in_features), dtype, weight.device

    def _expands(self, x: Tensor) -> bool:
        if not choices.anything(x.device):
            return False
        op, *rest = self._product()
        return choices.expands(op, x.shape[:-1].numel(), *rest)

    def explain(self, M: int) -> str:
        """What :meth:`forward` does for an input of `M` tokens in inference, and why.

        >>> print(SparseLinear(64, 64).explain(16))
        M = 16: linear_24, the packed product; expanding was not measured here (sparsekern tune 16x64x64)
        """
        op, _, K, *_ = product = self._product()
        ratio = choices.measured(*product).get(choices.bucket(M))
        if ratio is None:
            how = f"sparsekern tune {M}x{self.out_features}x{K}"
            return f"M = {M}: {op}, the packed product; expanding was not measured here ({how})"
        words = f"around M = {choices.bucket(M)} expanding was measured {ratio:.2f} times as fast as the packed product"
        if ratio >= choices.WORTH:
            return f"M = {M}: the weight is expanded for a dense product: {words}"
        return f"M = {M}: {op}, the packed product: {words}, worth it from {choices.WORTH} on"

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        text += f", bias={self.bias is not None}"
        return text + ", prepacked=True" if self.prepacked else text


def _padded(in_features: int) -> int:
    return (in_features + 3) // 4 * 4


def padded(weight: Tensor) -> Tensor:
    """``[N, K]`` with K rounded up to a multiple of 4 by zeros: what the formats take of any layer."""
    return F.pad(weight, (0, -weight.shape[-1] % 4)) if weight.shape[-1] % 4 else weight


# ---- a whole model ----


@dataclass(frozen=True)
class LayerReport:
    """What :func:`sparsify_` did with one layer. `reason` is empty where it was swapped; bytes are of the weight."""

    name: str
    shape: tuple[int, int]
    swapped: bool
    reason: str
    bytes_before: int
    bytes_after: int


class SparsifyReport(list[LayerReport]):
    """The layers of a model, in order; printing it gives a table."""

    @property
    def swapped(self) -> list[LayerReport]:
        return [layer for layer in self if layer.swapped]

    @property
    def skipped(self) -> list[LayerReport]:
        return [layer for layer in self if not layer.swapped]

    def __str__(self) -> str:
        before, after = (sum(getattr(r, f) for r in self) for f in ("bytes_before", "bytes_after"))
        width = max([len(r.name) for r in self], default=0)
        lines = [
            f"{r.name:<{width}}  {r.shape[0]:>6} x {r.shape[1]:<6}  "
            + (
                f"2:4, {r.bytes_before} to {r.bytes_after} bytes"
                if r.swapped
                else f"left alone: {r.reason}"
            )
            for r in self
        ]
        return "\n".join(
            [
                *lines,
                f"{len(self.swapped)} of {len(self)} layers swapped, {before} to {after} bytes",
            ]
        )


def sparsify_(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    prune: bool = True,
    prepack: bool = False,
) -> SparsifyReport:
    """Swap the nn.Linear layers of a model for SparseLinear, in place.

    A layer is left alone, with the reason in the report, where a swap would change more than its
    speed: a subclass of nn.Linear, a weight shared with another module or parametrized, hooks that
    expect the old layer, a dtype without a product, or a parent that reads ``weight`` directly (the
    output projection of nn.MultiheadAttention). nn.TransformerEncoderLayer keeps its layers'
    results, but not its fused inference path, which reads dense weights.

    Args:
        model: changed in place. If it is itself an nn.Linear, use ``SparseLinear.from_linear``.
        filter_fn: called with (layer, its qualified name); False leaves the layer alone.
        prune: prune each weight to 2:4 by magnitude. Otherwise a layer that is not 2:4 is an error,
            and the model is left as it was.
        prepack: turn the new layers into their inference form.

    Returns:
        A :class:`SparsifyReport`, one :class:`LayerReport` per nn.Linear.

    Raises:
        TypeError: `model` is an nn.Linear.
        ValueError: `prune` is false and a weight is not 2:4; names the layer, row and group.

    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> print(sparsify_(model))
    0      32 x 16      2:4, 2048 to 1088 bytes
    2       4 x 32      2:4, 512 to 272 bytes
    2 of 2 layers swapped, 2560 to 1360 bytes
    """
    if isinstance(model, nn.Linear):
        raise TypeError(
            "sparsify_: model is an nn.Linear, which cannot be swapped in place; it takes a module that "
            "holds layers. Use SparseLinear.from_linear(layer)"
        )
    # Addresses rather than Parameters: two Parameters over the same memory are tied as well.
    owners: dict[int, set[int]] = {}
    names: dict[nn.Linear, list[str]] = {}  # a layer may have several
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            names.setdefault(module, []).append(name)
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(_identity(parameter), set()).add(id(module))

    report = SparsifyReport()
    places: list[tuple[nn.Module, str, SparseLinear]] = []
    for layer, called in names.items():
        parents = [model.get_submodule(name.rpartition(".")[0]) for name in called]
        reason = _reason_to_skip(layer, parents, owners)
        if not reason and filter_fn is not None and not all(filter_fn(layer, n) for n in called):
            reason = "filter_fn said no"
        before = after = 0 if is_lazy(layer.weight) else layer.weight.nbytes
        if not reason:
            try:
                new = SparseLinear.from_linear(layer, prune=prune)
            except ValueError as error:
                raise ValueError(f"sparsify_: layer {called[0]!r}: {error}") from None
            after = new.values.nbytes + new.meta.nbytes
            places += [(p, n.rpartition(".")[2], new) for p, n in zip(parents, called, strict=True)]
        shape = layer.out_features, layer.in_features
        report += [LayerReport(n, shape, not reason, reason, before, after) for n in called]

    for parent, child, new in places:
        setattr(parent, child, new)
    for module in model.modules():
        # torch's switches for the fused paths of nn.TransformerEncoder, which read dense weights
        if isinstance(module, nn.TransformerEncoderLayer) and _holds_sparse(module):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and _holds_sparse(module):
            module.use_nested_tensor = False
    if prepack:
        for _, _, new in places:
            new.prepack()
    return report


def _identity(parameter: Tensor) -> int:
    """What two tied parameters have in common: their address, or themselves where there is none yet."""
    if is_lazy(parameter) or parameter.is_meta:
        return id(parameter)
    return parameter.data_ptr() or id(parameter)


def _holds_sparse(module: nn.Module) -> bool:
    return any(isinstance(m, SparseLinear) for m in module.modules())


def _reason_to_skip(layer: nn.Linear, parents: list[nn.Module], owners: dict[int, set[int]]) -> str:
    if "weight" not in layer._parameters or nn.utils.parametrize.is_parametrized(layer):
        return "its weight is parametrized"
    if is_lazy(layer.weight):
        return "it is lazy and has no weight yet"
    if type(layer) is not nn.Linear:
        if any(isinstance(parent, nn.MultiheadAttention) for parent in parents):
            return "nn.MultiheadAttention reads its weight directly"
        return f"a subclass of nn.Linear ({type(layer).__name__})"
    if layer.weight.dtype not in ops.PRODUCT_DTYPES:
        return f"no 2:4 product for {layer.weight.dtype}"
    for name, parameter in layer._parameters.items():
        if parameter is not None and len(owners[_identity(parameter)]) > 1:
            return f"its {name} is shared with another module"
        if parameter is not None and (
            parameter._backward_hooks or parameter._post_accumulate_grad_hooks
        ):
            return f"its {name} has hooks, which would be lost"
    if any(hooks for name, hooks in layer.__dict__.items() if name.endswith("hooks")):
        return "it has hooks, which would be lost"
    if layer._modules or layer._buffers:
        return "it holds modules or buffers of its own, which would be lost"
    if "forward" in layer.__dict__:
        return "its forward was replaced"
    return ""
