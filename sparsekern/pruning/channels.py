"""Which dimensions of which weights carry the same channels, read from a model's exported graph.

A dimension is a product of axes, the outer first: a convolution's output ``[N, C, H, W]`` flattened has the
dimensions ``(N,)`` and ``(C, H, W)``. Ops make axes one that must be in the same order: a linear layer its
weight's columns and its input's features, an addition those of both sides. A view may cut an axis in
two (heads, groups): then all parts are ordered alike. What needs channels where they are, such as a slice
or the model's output, freezes their axis with the reason. So does every op that has no rule here.

After that, ordering an axis that is not frozen, everywhere it occurs in parameters and buffers, leaves what
the model computes as it was, up to the order of sums.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind


class Axis:
    """Channels, or anything else that a dimension runs over.

    Attributes:
        frozen: why their order must stay, "" if it need not.
    """

    def __init__(self, size: int, frozen: str = "") -> None:
        self.size, self.frozen = size, frozen
        self._same: Axis | None = None
        self._parts: tuple[Axis, ...] = ()

    def leaves(self) -> list[Axis]:
        """What it was found to be: itself, the axis it is one with, or its parts, outer first."""
        axis = self
        while axis._same is not None:
            axis = axis._same
        if axis is not self:
            self._same = axis  # so that chains stay short
        if axis._parts:
            return [leaf for part in axis._parts for leaf in part.leaves()]
        return [axis]

    def join(self, other: Axis) -> None:
        """Both, leaves of the same size, are one from now on."""
        other._same = self
        self.frozen = self.frozen or other.frozen

    def cut(self, outer: int) -> None:
        """A leaf becomes `outer` runs."""
        self._parts = (Axis(outer, self.frozen), Axis(self.size // outer, self.frozen))


Dim = list[Axis]  # empty where the size is 1
Layout = list[Dim]


def leaves(axes: Iterable[Axis]) -> Dim:
    return [leaf for axis in axes for leaf in axis.leaves()]


def freeze(axes: Iterable[Axis], reason: str) -> None:
    for leaf in leaves(axes):
        leaf.frozen = leaf.frozen or reason


def fresh(shape: Iterable[int], frozen: str = "") -> Layout:
    return [[Axis(size, frozen)] if size != 1 else [] for size in shape]


def unify(a: Iterable[Axis], b: Iterable[Axis], reason: str) -> None:
    """Two dimensions of one size are in one order. `reason`: why they are frozen where they do not line up."""
    a, b = leaves(a), leaves(b)
    while a and b:
        x, y = a[0], b[0]
        if x.size == y.size:
            if x is not y:
                x.join(y)
            a, b = a[1:], b[1:]
        else:
            large, small = (x, y) if x.size > y.size else (y, x)
            if small.size == 0 or large.size % small.size:
                break
            large.cut(small.size)
        a, b = leaves(a), leaves(b)
    freeze(a + b, reason)


def reshape(layout: Layout, shape: Sequence[int], reason: str) -> Layout:
    """Elements in the same order, other dimensions."""
    axes = leaves(axis for dim in layout for axis in dim)
    out: Layout = []
    for size in shape:
        dim: Dim = []
        while size != 1:
            smaller, larger = sorted((axes[0].size, size)) if axes else (0, size)
            if not smaller or larger % smaller:
                freeze((axis for dim in layout for axis in dim), reason)
                return fresh(shape, reason)
            if axes[0].size > size:
                axes[0].cut(size)
                axes = leaves(axes)
            dim.append(axes[0])
            size //= axes[0].size
            axes = leaves(axes[1:])
        out.append(dim)
    return out


@dataclass
class State:
    """A parameter or buffer, under all its names, and the axes of its dimensions."""

    tensor: Tensor
    layout: Layout
    names: list[str] = field(default_factory=list)
    used: bool = False


class Channels:
    """The axes of every parameter and buffer that a model uses.

    Args:
        args, kwargs: what the model is called with; shapes and branches are those of this call.

    Raises:
        RuntimeError: torch.export cannot follow the model.
    """

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.states: dict[int, State] = {}
        self._storages: dict[int, State] = {}
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it would hide the layers in one op
        try:
            exported = torch.export.export(model, args, kwargs, strict=False)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise RuntimeError(
                f"permute: torch.export cannot follow the model: {type(error).__name__}: {first}"
            ) from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        inputs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
        values: dict[fx.Node, Layout | list[Layout]] = {}
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                values[node] = self._placeholder(model, node, inputs[node.name])
            elif node.op == "output":
                for source in node.all_input_nodes:
                    _freeze_value(values[source], "they are the model's output")
            elif node.op == "get_attr":
                values[node] = fresh(_shape(node.meta.get("val")), "they are a constant")
            else:
                values[node] = _call(node, values)
        for state in self.states.values():
            if not state.used:
                _freeze_value(state.layout, "the examples do not reach them")

    def _placeholder(self, model: nn.Module, node: fx.Node, spec) -> Layout:
        if spec.kind is InputKind.PARAMETER:
            tensor = model.get_parameter(spec.target)
        elif spec.kind is InputKind.BUFFER:
            tensor = model.get_buffer(spec.target)
        else:
            what = "the model's input" if spec.kind is InputKind.USER_INPUT else "a constant"
            return fresh(_shape(node.meta.get("val")), f"they are {what}")
        state = self.states.get(id(tensor))
        if state is None:
            state = self.states[id(tensor)] = State(tensor, fresh(tensor.shape))
            if tensor.numel():
                other = self._storages.setdefault(tensor.untyped_storage().data_ptr(), state)
                if other is not state:
                    for axes in (*other.layout, *state.layout):
                        freeze(axes, f"{other.names[0]} and {spec.target} share memory")
        state.names.append(spec.target)
        state.used |= bool(node.users)
        return state.layout


def _shape(value) -> list[int]:
    if not isinstance(value, Tensor):
        return []
    for size in value.shape:
        if not isinstance(size, int):
            raise RuntimeError("permute: the model has shapes that depend on its data")
    return list(value.shape)


def _freeze_value(value: Layout | list[Layout], reason: str) -> None:
    for part in value:
        if part and isinstance(part[0], list):
            _freeze_value(part, reason)
        else:
            freeze(part, reason)


# ---- what ops do to layouts ----


@dataclass
class Call:
    """One op of the graph: its arguments by name, tensors among them as layouts."""

    name: str
    of: dict
    shapes: list[list[int]]  # of its outputs
    several: bool  # whether it has a list of outputs

    @property
    def shape(self) -> list[int]:
        return self.shapes[0]

    @property
    def x(self) -> Layout:
        """The first argument."""
        return next(iter(self.of.values()))

    def layouts(self) -> list[Layout]:
        """Of all arguments that are tensors or lists of tensors."""
        found = []
        for value in self.of.values():
            if isinstance(value, _Value):
                found.append(value)
            elif isinstance(value, (list, tuple)):
                found += [v for v in value if isinstance(v, _Value)]
        return found

    def why(self, what: str) -> str:
        return f"{what} ({self.name})"


class _Value(list):
    """A layout among a call's arguments, told from lists of numbers by its type."""


Rule = Callable[[Call], "Layout | list[Layout]"]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """`names`: of aten ops, without overload; a trailing underscore, for the one in place, is left out."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _call(node: fx.Node, values: dict) -> Layout | list[Layout]:
    if node.target is operator.getitem:
        return values[node.args[0]][node.args[1]]

    def lay(arg):
        if isinstance(arg, fx.Node):
            return _Value(values[arg])
        return [lay(a) for a in arg] if isinstance(arg, (list, tuple)) else arg

    several = isinstance(node.meta.get("val"), (list, tuple))
    outputs = node.meta["val"] if several else [node.meta.get("val")]
    shapes = [_shape(output) for output in outputs]
    schema = getattr(node.target, "_schema", None)
    if schema is None:  # a higher-order op
        name, of = str(node.target), dict(enumerate(map(lay, (*node.args, *node.kwargs.values()))))
        function = None
    else:
        name = node.target.overloadpacket.__name__
        of = {a.name: a.default_value for a in schema.arguments}
        of.update(zip(of, map(lay, node.args), strict=False))
        of.update((key, lay(value)) for key, value in node.kwargs.items())
        function = RULES.get(name.removesuffix("_")) if node.target.namespace == "aten" else None
        if function is None and torch.Tag.pointwise in node.target.tags:
            function = pointwise
    call = Call(name, of, shapes, several)
    result = (function or unknown)(call)
    found = result if several else [result]
    right = [
        [math.prod(a.size for a in leaves(dim)) for dim in layout] for layout in found
    ] == shapes
    return result if right else unknown(call)


def unknown(call: Call) -> Layout | list[Layout]:
    reason = call.why("they pass an op that may mix them")
    for layout in call.layouts():
        _freeze_value(layout, reason)
    out = [fresh(shape, reason) for shape in call.shapes]
    return out if call.several else out[0]


def broadcast(call: Call, layouts: list[Layout]) -> Layout:
    """One layout of several whose trailing dimensions line up; where all have size 1 it has none."""
    out: Layout = [[] for _ in range(max(map(len, layouts), default=0))]
    for layout in layouts:
        for i, dim in enumerate(layout, len(out) - len(layout)):
            if dim and out[i]:
                unify(out[i], dim, call.why("they meet others that do not line up"))
            out[i] = out[i] or dim
    return out


@rule("hardswish", "masked_fill", "copy", "rsub", "__and__", "__or__", "__xor__", "where")
def pointwise(call: Call) -> Layout:
    """And every op that torch tags so."""
    return broadcast(call, call.layouts())


@rule("dropout", "alpha_dropout", "feature_dropout", "contiguous", "clone", "detach", "alias", "to")
@rule(
    "type_as", "_to_copy", "lift_fresh_copy", "zeros_like", "ones_like", "full_like", "log_sigmoid"
)
@rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def same(call: Call) -> Layout:
    """Softmax mixes, but does not mind the order; dropout that is always on draws by place."""
    return unknown(call) if call.of.get("train") else call.x


@rule("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "empty", "scalar_tensor")
def filled(call: Call) -> Layout:
    return fresh(call.shape)


@rule("_assert_tensor_metadata", "_assert_async", "_assert_scalar")
def nothing(call: Call) -> Layout:
    return []


@rule("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "view_as")
@rule("reshape_as")
def reshaped(call: Call) -> Layout:
    return reshape(call.x, call.shape, call.why("they are cut by a view"))


@rule("permute", "transpose", "t", "numpy_T", "movedim", "moveaxis", "swapaxes", "swapdims")
def transposed(call: Call) -> Layout:
    # torch says where each dimension goes: it is told apart by its size.
    probe = torch.empty([i + 2 for i in range(len(call.x))], device="meta")
    rest = [value for value in call.of.values()][1:]
    return [call.x[size - 2] for size in getattr(torch.ops.aten, call.name)(probe, *rest).shape]


@rule("expand", "expand_as", "broadcast_to")
def expanded(call: Call) -> Layout:
    out = fresh(call.shape)
    x = call.x
    for i, dim in enumerate(x, len(out) - len(x)):
        if dim:
            out[i] = dim
    return out


@rule("mean", "sum", "amax", "amin", "max", "min", "var", "std", "norm", "linalg_vector_norm")
@rule("prod", "any", "all", "logsumexp", "argmax", "argmin", "var_mean")
def reduced(call: Call) -> Layout | list[Layout]:
    layouts = call.layouts()
    if len(layouts) > 1:  # max of two
        return broadcast(call, layouts)
    x, dims = call.x, call.of.get("dim")
    dims = range(len(x)) if dims is None or dims == [] else dims
    dims = {d % max(1, len(x)) for d in ([dims] if isinstance(dims, int) else dims)}
    if call.name.startswith("arg") or (call.several and call.name != "var_mean"):
        for d in dims:
            freeze(x[d], call.why("their numbers are looked up"))
    if len(call.shape) == len(x):
        out = [[] if i in dims else dim for i, dim in enumerate(x)]
    else:
        out = [dim for i, dim in enumerate(x) if i not in dims]
    return [out] * len(call.shapes) if call.several else out


@rule("linear")
def linear(call: Call) -> Layout:
    x, weight, bias = call.of["input"], call.of["weight"], call.of["bias"]
    unify(x[-1], weight[-1], call.why("they do not line up with a weight"))
    if bias is not None:
        unify(bias[0], weight[0], call.why("they do not line up with a bias"))
    return [*x[:-1], *weight[:-1]]


@rule("matmul", "mm", "bmm")
def matmul(call: Call) -> Layout:
    a, b = call.layouts()
    if len(a) < 2 or len(b) < 2:
        return unknown(call)
    unify(a[-1], b[-2], call.why("they do not line up in a product"))
    return [*broadcast(call, [a[:-2], b[:-2]]), a[-2], b[-1]]


@rule("addmm")
def addmm(call: Call) -> Layout:
    added, a, b = call.layouts()
    unify(a[-1], b[-2], call.why("they do not line up in a product"))
    return broadcast(call, [[a[-2], b[-1]], added])


@rule("einsum")
def einsum(call: Call) -> Layout:
    inputs, arrow, output = call.of["equation"].replace(" ", "").partition("->")
    if not arrow or "." in inputs:
        return unknown(call)
    axes: dict[str, Dim] = {}
    for letters, layout in zip(inputs.split(","), call.layouts(), strict=True):
        for letter, dim in zip(letters, layout, strict=True):
            if letter in axes and dim and axes[letter]:
                unify(axes[letter], dim, call.why("they do not line up in a product"))
            axes[letter] = axes.get(letter) or dim
    return [axes[letter] for letter in output]


@rule("conv1d", "conv2d", "conv3d")
def conv(call: Call) -> Layout:
    x, weight, bias, groups = (call.of[k] for k in ("input", "weight", "bias", "groups"))
    spatial = len(weight) - 2
    for dim in (*x[-spatial:], *weight[2:]):
        freeze(dim, call.why("they are places of a convolution"))
    why = call.why("they do not line up with a weight")
    batch, channels, filters = x[: -spatial - 1], x[-spatial - 1], weight[0]
    if groups == 1:
        unify(channels, weight[1], why)
    else:  # [groups, in] and [groups, out]; a depthwise convolution has one of in
        numbers = [Axis(groups)]
        unify(channels, [*numbers, *weight[1]], why)
        unify(filters, [*numbers, *_rest(filters, groups)], why)
    if bias is not None:
        unify(bias[0], filters, why)
    places = fresh(call.shape[len(batch) + 1 :], call.why("they are places of a convolution"))
    return [*batch, filters, *places]


def _rest(dim: Dim, outer: int) -> Dim:
    """What a dimension holds in each of `outer` runs."""
    inner = math.prod(axis.size for axis in leaves(dim)) // outer
    return [Axis(inner)] if inner != 1 else []


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(call: Call) -> Layout:
    x, weight, bias, groups = (call.of[k] for k in ("input", "weight", "bias", "groups"))
    spatial = len(weight) - 2
    if groups != 1 or len(x) != len(weight):
        return unknown(call)
    for dim in (*x[2:], *weight[2:]):
        freeze(dim, call.why("they are places of a convolution"))
    unify(x[1], weight[0], call.why("they do not line up with a weight"))
    if bias is not None:
        unify(bias[0], weight[1], call.why("they do not line up with a bias"))
    places = fresh(call.shape[-spatial:], call.why("they are places of a convolution"))
    return [x[0], weight[1], *places]


@rule("batch_norm", "instance_norm", "prelu", "group_norm")
def per_channel(call: Call) -> Layout:
    """The second dimension has a parameter each; groups are runs of it."""
    x, *others = call.layouts()
    if len(x) < 2:
        return unknown(call)
    for other in others:
        if other and other[0]:
            unify(x[1], other[0], call.why("they do not line up with a parameter"))
    if groups := call.of.get("num_groups"):
        runs = [Axis(groups)] if groups != 1 else []
        unify(x[1], [*runs, *_rest(x[1], groups)], call.why("they do not line up with groups"))
    return x


@rule("layer_norm", "rms_norm")
def layer_norm(call: Call) -> Layout:
    return broadcast(call, call.layouts())


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
@rule("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
@rule("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")
@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d")
@rule("upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "pad", "constant_pad_nd")
def places(call: Call) -> Layout | list[Layout]:
    """Pools, padding and interpolation: dimensions that they leave alone stay as they are."""
    x = call.x
    if "pad" in call.of:
        moved = len(call.of["pad"]) // 2
        still = [not any(call.of["pad"][2 * i : 2 * i + 2]) for i in range(moved)][::-1]
    else:
        pool = re.search(r"pool(\d)d", call.name)
        moved = int(pool[1]) if pool else len(x) - 2
        still = [False] * moved
    why = call.why("they are places of a pool or of padding")
    out = list(x[: len(x) - moved])
    for i, stays in zip(range(len(x) - moved, len(x)), still, strict=True):
        if not stays:
            freeze(x[i], why)
        out.append(x[i] if stays else fresh([call.shape[i]], why)[0])
    return [out] * len(call.shapes) if call.several else out


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Layout:
    query, key, value, mask = (call.of[k] for k in ("query", "key", "value", "attn_mask"))
    if call.of["enable_gqa"]:
        return unknown(call)
    why = call.why("they do not line up in attention")
    unify(query[-1], key[-1], why)
    unify(key[-2], value[-2], why)
    batch = [query[:-2], key[:-2], value[:-2]]
    if mask is not None:
        batch.append(mask[:-2])
        for dim, places in ((mask[-2], query[-2]), (mask[-1], key[-2])):
            if dim:
                unify(dim, places, why)
    if call.of["is_causal"]:
        freeze([*query[-2], *key[-2]], call.why("they are places of a causal mask"))
    return [*broadcast(call, batch), query[-2], value[-1]]


@rule("embedding")
def embedding(call: Call) -> Layout:
    weight, indices = call.of["weight"], call.of["indices"]
    freeze(weight[0], call.why("their numbers are looked up"))
    return [*indices, weight[1]]


@rule("slice", "narrow", "select", "unbind")
def picked(call: Call) -> Layout | list[Layout]:
    """A part of a dimension, whole if it is all; select and unbind drop it."""
    x, d = call.x, call.of["dim"]
    d %= len(x)
    drops = call.name in ("select", "unbind")
    size = math.prod(axis.size for axis in leaves(x[d]))
    if not drops and call.shape[d] == size:
        return x
    why = call.why("a part of them is taken")
    freeze(x[d], why)
    part = [] if drops else fresh([call.shape[d]], why)
    out = [*x[:d], *part, *x[d + 1 :]]
    return [out] * len(call.shapes) if call.several else out


@rule("chunk", "split", "split_with_sizes", "glu")
def split(call: Call) -> Layout | list[Layout]:
    """Parts of one size are runs, which have one order; others stay as they are."""
    x, d = call.x, call.of["dim"]
    d %= len(x)
    why = call.why("a part of them is taken")
    sizes = [shape[d] for shape in call.shapes] if call.several else 2 * [call.shape[d]]  # glu
    if len(set(sizes)) == 1 and sizes[0]:
        inner = fresh(sizes[:1])[0]
        unify(x[d], [*fresh([len(sizes)], why)[0], *inner], why)
        parts = [inner] * len(sizes)
    else:
        freeze(x[d], why)
        parts = [fresh([size], why)[0] for size in sizes]
    out = [[*x[:d], part, *x[d + 1 :]] for part in parts]
    return out if call.several else out[0]


@rule("cat", "concat", "concatenate", "stack")
def cat(call: Call) -> Layout:
    """Inputs of one size become runs, which have one order; others stay as they are."""
    tensors = call.of["tensors"]
    d = call.of["dim"] % len(call.shape)
    why = call.why("they are concatenated")
    if call.name == "stack":
        out = broadcast(call, tensors)
        return [*out[:d], *fresh([len(tensors)], why), *out[d:]]
    if len({len(layout) for layout in tensors}) > 1:
        return unknown(call)
    sizes = {math.prod(axis.size for axis in leaves(layout[d])) for layout in tensors}
    if len(sizes) == 1:
        out = broadcast(call, tensors)
        return [*out[:d], [*fresh([len(tensors)], why)[0], *out[d]], *out[d + 1 :]]
    for layout in tensors:
        freeze(layout[d], why)
    out = broadcast(call, [[*layout[:d], [], *layout[d + 1 :]] for layout in tensors])
    out[d] = fresh([call.shape[d]], why)[0]
    return out
