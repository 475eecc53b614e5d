"""The contract: every op of sparsekern, once.

For each op this file holds its schema, the one check that serves the fake and every back end, its
fake, its gradient and its docstring. What an op means is in ``reference.py``; who computes it is
chosen by ``backends``; the formats are drawn in ``csrc/layout.h``.

Letters, everywhere: ``M`` tokens, ``N`` out features, ``K`` in features.
``x[M, K]``, ``weight[N, K]``, ``values[N, K/2]``, ``meta[N, ceil(K/8)]`` (uint8).

To follow one op through the library::

    sk.linear_24(...)                      the docstring below
      torch.ops.sparsekern.linear_24       schema, autograd, autocast
        fake     check, then an empty output
        kernel   check, then the function that backends.resolve chose for this dtype and device
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends

ACTIVATIONS = ("none", "relu", "relu2", "gelu", "silu")  # the order of csrc/layout.h's enum
PRODUCT_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
FORMAT_DTYPES = PRODUCT_DTYPES | {torch.int8, torch.uint8}
_INTEGERS = {torch.bool, torch.int16, torch.int32, torch.int64}
_INTEGERS |= {torch.uint16, torch.uint32, torch.uint64}
_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}
_FLOAT8 |= {torch.float8_e8m0fnu}
ZVC_DTYPES = FORMAT_DTYPES | _INTEGERS | _FLOAT8 | {torch.complex32, torch.complex64}
ZVC_TILE = 4096
_PART = 1 << 21  # elements

_ops = torch.ops.sparsekern


# ---- checks: ValueError for shapes and values, TypeError for dtypes ----


def _names(dtypes) -> str:
    return ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))


def _check_dtype(op: str, name: str, dtype: torch.dtype, allowed: frozenset) -> None:
    if dtype not in allowed:
        raise TypeError(f"{op}: {name} has dtype {dtype}; it takes {_names(allowed)}")


def _check_same(op: str, name: str, t: Tensor, other: str, o: Tensor) -> None:
    if t.dtype is not o.dtype:
        raise TypeError(f"{op}: {name} has dtype {t.dtype}; it takes that of {other}, {o.dtype}")
    if t.device != o.device:
        raise ValueError(
            f"{op}: {name} is on {t.device}; it takes the device of {other}, {o.device}"
        )


def _check_weight(op: str, weight: Tensor, name: str = "weight", two_d: bool = True) -> None:
    _check_dtype(op, name, weight.dtype, FORMAT_DTYPES)
    if two_d and weight.dim() != 2:
        raise ValueError(
            f"{op}: {name} has shape {tuple(weight.shape)}; it takes two dimensions [N, K]"
        )
    if weight.layout is not torch.strided:
        raise TypeError(f"{op}: {name} has layout {weight.layout}; it takes {torch.strided}")
    if weight.dim() == 0 or weight.shape[-1] % 4:
        raise ValueError(
            f"{op}: {name} has shape {tuple(weight.shape)}; its last dimension must be a multiple of 4 "
            "(SparseLinear pads by itself)"
        )


def _check_packed(op: str, values: Tensor, meta: Tensor, dtypes: frozenset) -> None:
    _check_dtype(op, "values", values.dtype, dtypes)
    if values.dim() != 2 or values.shape[1] % 2:
        raise ValueError(
            f"{op}: values has shape {tuple(values.shape)}; it takes [N, K/2] with K a multiple of 4"
        )
    _check_meta(op, meta, values.shape[0], 2 * values.shape[1], "values", values)


def _check_meta(op: str, meta: Tensor, N: int, K: int, other: str, o: Tensor) -> None:
    if meta.device != o.device:
        raise ValueError(
            f"{op}: meta is on {meta.device}; it takes the device of {other}, {o.device}"
        )
    if meta.dtype is not torch.uint8:
        raise TypeError(f"{op}: meta has dtype {meta.dtype}; it takes uint8")
    if meta.dim() != 2 or meta.shape[0] != N or meta.shape[1] != (K + 7) // 8:
        raise ValueError(
            f"{op}: meta has shape {tuple(meta.shape)}; for N = {N}, K = {K} it takes {(N, (K + 7) // 8)}"
        )


def _check_product(
    op: str, x: Tensor, K: int, N: int, bias: Tensor | None, activation: str
) -> None:
    if x.layout is not torch.strided:
        raise TypeError(f"{op}: x has layout {x.layout}; it takes {torch.strided}")
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; for this weight it takes [..., {K}]")
    if bias is not None:
        _check_same(op, "bias", bias, "x", x)
        if bias.dim() != 1 or bias.shape[0] != N:
            raise ValueError(
                f"{op}: bias has shape {tuple(bias.shape)}; for this weight it takes ({N},)"
            )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation is {activation!r}; it takes one of {', '.join(ACTIVATIONS)}"
        )


def _check_zvc(op: str, name: str, t: Tensor) -> None:
    _check_dtype(op, name, t.dtype, ZVC_DTYPES)
    if t.layout is not torch.strided:
        raise TypeError(f"{op}: {name} has layout {t.layout}; it takes {torch.strided}")


def _tiles(n: int) -> int:
    return (n + ZVC_TILE - 1) // ZVC_TILE


# ---- registration ----

_lib = torch.library.Library("sparsekern", "DEF")


@dataclass(frozen=True)
class Op:
    """One op of the contract. `dtype` tells from the arguments for which element type a kernel is to be chosen."""

    name: str
    schema: str
    dtypes: frozenset[torch.dtype]
    check: Callable[..., None]
    fake: Callable
    dtype: Callable[..., torch.dtype]


OPS: dict[str, Op] = {}


def _kernel(op: Op) -> Callable:
    chosen: dict[tuple[torch.dtype, torch.device], Callable] = {}

    def kernel(*args):
        op.check(*args)
        key = op.dtype(*args), args[0].device
        function = chosen.get(key)
        if function is None:
            function = chosen[key] = backends.resolve(op.name, *key)
        return function(*args)

    schema = torch._C.parse_schema(f"sparsekern::{op.schema}")
    written = [i for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
    if not written:
        return kernel

    def writing_kernel(*args):
        kernel(*args)
        # So that autograd notices when something it saved was overwritten.
        torch.autograd.graph.increment_version(
            [args[i] for i in written if not args[i].is_inference()]
        )

    return writing_kernel


def _define(
    schema: str,
    dtypes: frozenset[torch.dtype],
    *,
    check: Callable[..., None],
    fake: Callable,
    dtype: Callable[..., torch.dtype] = lambda x, *_: x.dtype,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    name = schema.partition("(")[0]
    op = OPS[name] = Op(name, schema, dtypes, check, fake, dtype)
    qualified = f"sparsekern::{name}"
    torch.library.define(
        qualified, schema.removeprefix(name), lib=_lib, tags=(torch.Tag.pt2_compliant_tag,)
    )

    def checked_fake(*args):
        check(*args)
        return fake(*args)

    torch.library.register_fake(qualified, checked_fake, lib=_lib)
    # One kernel for all devices: `backends.resolve` has the table. torch's dispatcher stays the
    # only one at run time, as it routes fakes, autograd, autocast and tracing before this is
    # reached.
    _lib.impl(name, _kernel(op), "CompositeExplicitAutograd")
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_lib)


def _autocast(name: str, device_type: str) -> None:
    """Under autocast, linear_24 runs in the autocast dtype as F.linear does: x, values and bias are cast, meta is not.

    Every op shuts autocast off for what its kernel calls: a back end sees the dtypes it was given.
    """
    key = torch._C._dispatch_key_for_device(device_type)
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{key}"))
    op = getattr(_ops, name).default

    def cast(t, dtype):
        eligible = isinstance(t, Tensor) and t.is_floating_point() and t.dtype is not torch.float64
        return t.to(dtype) if eligible else t

    def kernel(*args):
        if name == "linear_24":
            dtype = torch.get_autocast_dtype(device_type)
            args = [cast(a, dtype) for a in args]
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return op(*args)

    _lib.impl(name, kernel, f"Autocast{key}")


def _no_autocast(t: Tensor):
    """For backward formulas, which run under whatever autocast their caller left on."""
    device = t.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _no_gradient(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))


# ---- prune_24, prune_24_transposable: straight-through gradients ----


def _straight_through(ctx, dy):
    return dy


def _save_nothing(ctx, inputs, output) -> None:
    pass


_define(
    "prune_24(Tensor weight) -> Tensor",
    FORMAT_DTYPES,
    check=lambda weight: _check_weight("prune_24", weight, two_d=False),
    fake=lambda weight: torch.empty_like(weight, memory_format=torch.contiguous_format),
    backward=_straight_through,
    setup_context=_save_nothing,
)


def _check_transposable(weight: Tensor) -> None:
    _check_weight("prune_24_transposable", weight)
    if weight.shape[0] % 4:
        raise ValueError(
            f"prune_24_transposable: weight has shape {tuple(weight.shape)}; both dimensions must be multiples of 4"
        )


_define(
    "prune_24_transposable(Tensor weight) -> Tensor",
    FORMAT_DTYPES,
    check=_check_transposable,
    fake=lambda weight: torch.empty_like(weight, memory_format=torch.contiguous_format),
    backward=_straight_through,
    setup_context=_save_nothing,
)


# ---- pack_24, unpack_24, gather_24 ----


def _fake_pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    return weight.new_empty(N, K // 2), weight.new_empty((N, (K + 7) // 8), dtype=torch.uint8)


def _pack_setup(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


_define(
    "pack_24(Tensor weight) -> (Tensor values, Tensor meta)",
    FORMAT_DTYPES,
    check=lambda weight: _check_weight("pack_24", weight),
    fake=_fake_pack,
    backward=lambda ctx, dvalues, _: _ops.unpack_24(dvalues, *ctx.saved_tensors),
    setup_context=_pack_setup,
)


def _save_meta(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


_define(
    "unpack_24(Tensor values, Tensor meta) -> Tensor",
    FORMAT_DTYPES,
    check=lambda values, meta: _check_packed("unpack_24", values, meta, FORMAT_DTYPES),
    fake=lambda values, meta: values.new_empty(values.shape[0], 2 * values.shape[1]),
    backward=lambda ctx, dweight: (_ops.gather_24(dweight, *ctx.saved_tensors), None),
    setup_context=_save_meta,
)


def _check_gather(dense: Tensor, meta: Tensor) -> None:
    _check_weight("gather_24", dense, "dense")
    _check_meta("gather_24", meta, *dense.shape, "dense", dense)


_define(
    "gather_24(Tensor dense, Tensor meta) -> Tensor",
    FORMAT_DTYPES,
    check=_check_gather,
    fake=lambda dense, meta: dense.new_empty(dense.shape[0], dense.shape[1] // 2),
    backward=lambda ctx, dvalues: (_ops.unpack_24(dvalues, *ctx.saved_tensors), None),
    setup_context=_save_meta,
)


# ---- linear_24 and its two gradients ----
# y = x · Wᵀ, dx = dy · W and dvalues = (dyᵀ · x) at the kept positions are one trilinear form read
# three ways, so each is the gradient of the others and derivatives of any order come for free.


def _check_linear(x, values, meta, bias=None, activation="none") -> None:
    # Every forward pays for this: a right call is recognised in few steps, the rest is for the words.
    dtype, device, shape = x.dtype, x.device, values.shape
    if (
        dtype in PRODUCT_DTYPES
        and values.dtype is dtype
        and meta.dtype is torch.uint8
        and values.device == meta.device == device
        and len(shape) == 2
        and not shape[1] % 2
        and meta.shape == (shape[0], (shape[1] + 3) // 4)
        and x.layout is torch.strided
        and x.dim()
        and x.shape[-1] == 2 * shape[1]
        and (
            bias is None
            or (bias.dtype is dtype and bias.device == device and bias.shape == shape[:1])
        )
        and activation in ACTIVATIONS
    ):
        return
    _check_packed("linear_24", values, meta, PRODUCT_DTYPES)
    _check_same("linear_24", "x", x, "values", values)
    _check_product("linear_24", x, 2 * values.shape[1], values.shape[0], bias, activation)


def _needed(ctx, names: str) -> dict[str, bool]:
    """Which inputs need a gradient. The dispatcher leaves out trailing arguments at their defaults."""
    needs = (*ctx.needs_input_grad, False, False)
    return dict(zip(names.split(), needs, strict=False))


def _recomputes(activation: str) -> bool:
    return activation not in ("none", "relu")


def _linear_setup(ctx, inputs, output) -> None:
    x, values, meta, bias, activation = inputs
    ctx.activation = activation
    keep_x = _needed(ctx, "x values")["values"] or _recomputes(activation)
    ctx.save_for_backward(
        x if keep_x else None,
        values,
        meta,
        bias if _recomputes(activation) else None,
        output if activation == "relu" else None,
    )


def _activation_backward(
    activation: str, dy: Tensor, y: Tensor | None, z: Callable[[], Tensor]
) -> Tensor:
    """dz from dy. Only relu can use the output; the others compute the pre-activation again, as checkpointing does."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, y, 0)
    if activation == "relu2":
        return dy * (2 * torch.relu(z()))
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(dy, z())
    if activation == "silu":
        if not torch.is_grad_enabled():
            return torch.ops.aten.silu_backward(dy, z())
        s = torch.sigmoid(at := z())  # the fused form has no derivative of its own
        return dy * s * (1 + at * (1 - s))
    return dy


def _linear_backward(ctx, dy):
    x, values, meta, bias, y = ctx.saved_tensors
    with _no_autocast(dy):
        dz = _activation_backward(
            ctx.activation, dy, y, lambda: _ops.linear_24(x, values, meta, bias)
        )
        need = _needed(ctx, "x values meta bias")
        dx = _ops.linear_24_dx(dz, values, meta) if need["x"] else None
        dvalues = _ops.linear_24_dvalues(dz, x, meta) if need["values"] else None
    dbias = dz.sum_to_size(dz.shape[-1]) if need["bias"] else None
    return (dx, dvalues, None, dbias, None)[: len(ctx.needs_input_grad)]


_define(
    "linear_24(Tensor x, Tensor values, Tensor meta, Tensor? bias=None, "
    'str activation="none") -> Tensor',
    PRODUCT_DTYPES,
    check=_check_linear,
    fake=lambda x, values, *_: x.new_empty(*x.shape[:-1], values.shape[0]),
    backward=_linear_backward,
    setup_context=_linear_setup,
)


def _check_dx(dy: Tensor, values: Tensor, meta: Tensor) -> None:
    _check_packed("linear_24_dx", values, meta, PRODUCT_DTYPES)
    _check_same("linear_24_dx", "dy", dy, "values", values)
    if dy.dim() == 0 or dy.shape[-1] != values.shape[0]:
        raise ValueError(
            f"linear_24_dx: dy has shape {tuple(dy.shape)}; it takes [..., {values.shape[0]}]"
        )


def _save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _dx_backward(ctx, ddx):
    dy, values, meta = ctx.saved_tensors
    need_dy, need_values, _ = ctx.needs_input_grad
    return (
        _ops.linear_24(ddx, values, meta) if need_dy else None,
        _ops.linear_24_dvalues(dy, ddx, meta) if need_values else None,
        None,
    )


_define(
    "linear_24_dx(Tensor dy, Tensor values, Tensor meta) -> Tensor",
    PRODUCT_DTYPES,
    check=_check_dx,
    fake=lambda dy, values, meta: dy.new_empty(*dy.shape[:-1], 2 * values.shape[1]),
    backward=_dx_backward,
    setup_context=_save_inputs,
)


def _check_dvalues(dy: Tensor, x: Tensor, meta: Tensor) -> None:
    _check_dtype("linear_24_dvalues", "dy", dy.dtype, PRODUCT_DTYPES)
    _check_same("linear_24_dvalues", "x", x, "dy", dy)
    if x.dim() == 0 or dy.dim() == 0 or x.shape[:-1] != dy.shape[:-1] or x.shape[-1] % 4:
        raise ValueError(
            f"linear_24_dvalues: dy has shape {tuple(dy.shape)} and x {tuple(x.shape)}; they take [..., N] and "
            "[..., K] with the same leading dimensions and K a multiple of 4"
        )
    _check_meta("linear_24_dvalues", meta, dy.shape[-1], x.shape[-1], "x", x)


def _dvalues_backward(ctx, ddvalues):
    dy, x, meta = ctx.saved_tensors
    need_dy, need_x, _ = ctx.needs_input_grad
    return (
        _ops.linear_24(x, ddvalues, meta) if need_dy else None,
        _ops.linear_24_dx(dy, ddvalues, meta) if need_x else None,
        None,
    )


_define(
    "linear_24_dvalues(Tensor dy, Tensor x, Tensor meta) -> Tensor",
    PRODUCT_DTYPES,
    check=_check_dvalues,
    fake=lambda dy, x, meta: dy.new_empty(dy.shape[-1], x.shape[-1] // 2),
    backward=_dvalues_backward,
    setup_context=_save_inputs,
)


# ---- prepacking: a device's own layout ----


def _packed_bytes(N: int, K: int, dtype: torch.dtype) -> int:
    return N * (K // 2) * dtype.itemsize + N * ((K + 7) // 8)


def _check_opaque(op: str, packed: Tensor, N: int, K: int, dtype: torch.dtype) -> None:
    if packed.dtype is not torch.uint8:
        raise TypeError(f"{op}: packed has dtype {packed.dtype}; it takes uint8")
    if N < 0 or K < 0 or K % 4:
        raise ValueError(f"{op}: got N = {N}, K = {K}; it takes N >= 0 and K a multiple of 4")
    want = _packed_bytes(N, K, dtype)
    if packed.dim() != 1 or packed.shape[0] != want:
        raise ValueError(
            f"{op}: packed has shape {tuple(packed.shape)}; a weight [{N}, {K}] of {dtype} takes ({want},)"
        )
    if packed.storage_offset() % 8:
        raise ValueError(
            f"{op}: packed starts {packed.storage_offset()} bytes into its storage; it takes multiples of 8"
        )


_define(
    "prepack_24(Tensor values, Tensor meta) -> Tensor packed",
    PRODUCT_DTYPES,
    check=lambda values, meta: _check_packed("prepack_24", values, meta, PRODUCT_DTYPES),
    fake=lambda values, meta: values.new_empty(
        _packed_bytes(values.shape[0], 2 * values.shape[1], values.dtype), dtype=torch.uint8
    ),
    backward=lambda ctx, _: (None, None),
    setup_context=_no_gradient,
)


def _check_unprepack(packed: Tensor, N: int, K: int, dtype: torch.dtype) -> None:
    _check_dtype("unprepack_24", "dtype", dtype, PRODUCT_DTYPES)
    _check_opaque("unprepack_24", packed, N, K, dtype)


def _fake_unprepack(packed: Tensor, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return packed.new_empty((N, K // 2), dtype=dtype), packed.new_empty(N, (K + 7) // 8)


_define(
    "unprepack_24(Tensor packed, int N, int K, ScalarType dtype) -> (Tensor values, Tensor meta)",
    PRODUCT_DTYPES,
    check=_check_unprepack,
    fake=_fake_unprepack,
    dtype=lambda packed, N, K, dtype: dtype,
)


def _check_linear_prepacked(x, packed, N, bias=None, activation="none") -> None:
    _check_dtype("linear_24_prepacked", "x", x.dtype, PRODUCT_DTYPES)
    K = x.shape[-1] if x.dim() else 0
    _check_opaque("linear_24_prepacked", packed, N, K, x.dtype)
    if packed.device != x.device:
        raise ValueError(
            f"linear_24_prepacked: packed is on {packed.device}; it takes the device of x, {x.device}"
        )
    _check_product("linear_24_prepacked", x, K, N, bias, activation)


def _linear_prepacked_setup(ctx, inputs, output) -> None:
    x, packed, ctx.N, bias, ctx.activation = inputs
    recomputes = _recomputes(ctx.activation)
    ctx.K, ctx.dtype = x.shape[-1], x.dtype
    ctx.save_for_backward(
        x if recomputes else None,
        packed,
        bias if recomputes else None,
        output if ctx.activation == "relu" else None,
    )


def _linear_prepacked_backward(ctx, dy):
    x, packed, bias, y = ctx.saved_tensors
    need = _needed(ctx, "x packed N bias")
    dx = None
    with _no_autocast(dy):
        dz = _activation_backward(
            ctx.activation, dy, y, lambda: _ops.linear_24_prepacked(x, packed, ctx.N, bias)
        )
        if need["x"]:
            dx = _ops.linear_24_dx(dz, *_ops.unprepack_24(packed, ctx.N, ctx.K, ctx.dtype))
    dbias = dz.sum_to_size(ctx.N) if need["bias"] else None
    return (dx, None, None, dbias, None)[: len(ctx.needs_input_grad)]


_define(
    "linear_24_prepacked(Tensor x, Tensor packed, int N, Tensor? bias=None, "
    'str activation="none") -> Tensor',
    PRODUCT_DTYPES,
    check=_check_linear_prepacked,
    fake=lambda x, packed, N, *_: x.new_empty(*x.shape[:-1], N),
    backward=_linear_prepacked_backward,
    setup_context=_linear_prepacked_setup,
)


# ---- zero-value compression: bytes, no gradients ----


def _fake_pack_zvc(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = x.numel()
    values = x.new_empty(torch.library.get_ctx().new_dynamic_size())
    return (
        x.new_empty((n + 7) // 8, dtype=torch.uint8),
        values,
        x.new_empty(_tiles(n), dtype=torch.int64),
    )


_define(
    "pack_zvc(Tensor x) -> (Tensor mask, Tensor values, Tensor offsets)",
    ZVC_DTYPES,
    check=lambda x: _check_zvc("pack_zvc", "x", x),
    fake=_fake_pack_zvc,
    backward=lambda ctx, *_: None,
    setup_context=_no_gradient,
)


def _check_zvc_arrays(op: str, n: int, other: str, o: Tensor, **arrays) -> None:
    """`arrays`: name to (tensor, dtype, length it must have). All on the device of `o`, which is called `other`."""
    for name, (t, dtype, length) in arrays.items():
        if t.dtype is not dtype:
            raise TypeError(f"{op}: {name} has dtype {t.dtype}; it takes {dtype}")
        if t.device != o.device:
            raise ValueError(
                f"{op}: {name} is on {t.device}; it takes the device of {other}, {o.device}"
            )
        if t.dim() != 1 or (length is not None and t.shape[0] != length):
            takes = "one dimension" if length is None else f"({length},) for {n} elements"
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; it takes {takes}")


def _check_pack_zvc_out(
    x: Tensor, mask: Tensor, values: Tensor, offsets: Tensor, count: Tensor
) -> None:
    op, n = "pack_zvc_out", x.numel()
    _check_zvc(op, "x", x)
    _check_zvc_arrays(
        op,
        n,
        "x",
        x,
        mask=(mask, torch.uint8, (n + 7) // 8),
        values=(values, x.dtype, None),  # as much room as there is
        offsets=(offsets, torch.int64, _tiles(n)),
        count=(count, torch.int64, 1),
    )
    for name, t in (("mask", mask), ("values", values), ("offsets", offsets)):
        if not t.is_contiguous():
            raise ValueError(
                f"{op}: {name} has strides {t.stride()}; it takes a contiguous tensor to write to"
            )
    if values.requires_grad:
        raise ValueError(f"{op}: values requires grad; it takes a tensor that can be written to")


_define(
    "pack_zvc_out(Tensor x, Tensor(a!) mask, Tensor(b!) values, Tensor(c!) offsets, "
    "Tensor(d!) count) -> ()",
    ZVC_DTYPES,
    check=_check_pack_zvc_out,
    fake=lambda *_: None,
)


def _check_unpack_zvc(mask: Tensor, values: Tensor, offsets: Tensor, size: list[int]) -> None:
    op, n = "unpack_zvc", 1
    for length in size:
        if length < 0:
            raise ValueError(f"{op}: size is {list(size)}; it takes lengths of zero and more")
        n = n * length
    _check_zvc(op, "values", values)
    _check_zvc_arrays(
        op,
        n,
        "values",
        values,
        mask=(mask, torch.uint8, (n + 7) // 8),
        values=(values, values.dtype, None),
        offsets=(offsets, torch.int64, _tiles(n)),
    )


_define(
    "unpack_zvc(Tensor mask, Tensor values, Tensor offsets, SymInt[] size) -> Tensor",
    ZVC_DTYPES,
    check=_check_unpack_zvc,
    fake=lambda mask, values, offsets, size: values.new_empty(size),
    dtype=lambda mask, values, *_: values.dtype,
    backward=lambda ctx, _: (None, None, None, None),
    setup_context=_no_gradient,
)

for _name in OPS:
    for _device_type in ("cpu", "cuda"):
        _autocast(_name, _device_type)


# ---- the public functions ----


def prune_24(weight: Tensor) -> Tensor:
    """Zero all but the two largest magnitudes of every four consecutive elements along the last dimension.

    Magnitudes compare as integers on the bits with the sign cleared, a tie keeps the lower index
    and a NaN counts as largest, so every back end prunes bit for bit alike. Kept zeros come out as
    +0.0. The gradient is straight-through: that of the output, unmasked.

    Args:
        weight: ``[..., K]``, float16, bfloat16, float32, float64, int8 or uint8, any strides, K a
            multiple of 4.

    Returns:
        A contiguous tensor of the same shape and dtype.

    Raises:
        ValueError: K is not a multiple of 4.
        TypeError: another dtype.

    Source: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks" (arXiv 2104.08378),
    section 4.

    >>> prune_24(torch.tensor([[1.0, -3.0, 2.0, 0.5]]))
    tensor([[ 0., -3.,  2.,  0.]])
    """
    return _ops.prune_24(weight)


def prune_24_transposable(weight: Tensor) -> Tensor:
    """Prune so that the result is 2:4 along rows and along columns: both ``W`` and ``Wᵀ`` then run sparse.

    Of the 90 masks of a 4x4 tile that keep two in every row and column, the one with the largest
    sum of magnitudes (in fp32; fp64 for fp64) is taken, the first of equals. NaN and infinity count
    as infinite. Gradient: straight-through.

    Args:
        weight: ``[N, K]``, N and K multiples of 4, dtypes as :func:`prune_24`.

    Returns:
        A contiguous tensor of the same shape and dtype.

    Raises:
        ValueError: a dimension is not a multiple of 4.
        TypeError: another dtype.

    Source: Hubara et al. 2021, "Accelerated Sparse Neural Training" (arXiv 2102.08124).

    >>> prune_24_transposable(torch.arange(1.0, 17.0).reshape(4, 4)).count_nonzero(0)
    tensor([2, 2, 2, 2])
    """
    return _ops.prune_24_transposable(weight)


def is_24(weight: Tensor) -> bool:
    """Whether every four consecutive elements along the last dimension have at most two that are not zero.

    >>> is_24(torch.tensor([[1, 2, 0, 0]])), is_24(torch.tensor([[1, 2, 3, 0]]))
    (True, False)
    """
    if weight.dim() == 0 or weight.shape[-1] % 4:
        return False
    return _first_dense_group(weight) is None


def _first_dense_group(weight: Tensor) -> tuple[int, int] | None:
    """(row, group) of the first group with more than two non-zeros, rows counted over all leading dimensions."""
    if weight.numel() == 0:
        return None
    K = weight.shape[-1]
    rows = weight.detach().reshape(-1, K)
    # On the CPU in parts: intermediates stay in the cache, yet threads meet only a few times per part.
    step = max(1, _PART // K) if rows.device.type == "cpu" else rows.shape[0]
    for start in range(0, rows.shape[0], step):
        # Four booleans are four bytes of 0 or 1: the product's top byte is their sum.
        groups = (rows[start : start + step] != 0).flatten().view(torch.int32) * 0x01010101
        if int(groups.max()) >= 3 << 24:
            row, group = divmod(int((groups >= 3 << 24).nonzero()[0]), K // 4)
            return start + row, group
    return None


def pack_24(weight: Tensor, prune: bool = False) -> tuple[Tensor, Tensor]:
    """Pack a 2:4 weight into its kept values and two-bit positions.

    Args:
        weight: ``[N, K]``, K a multiple of 4, dtypes as :func:`prune_24`, any strides.
        prune: keep the two largest magnitudes of each group. Otherwise a group with more than two
            non-zeros is an error; PyTorch's own conversion drops the surplus in silence.

    Returns:
        ``values [N, K/2]`` in the weight's dtype and ``meta [N, ceil(K/8)]`` uint8, a nibble ``i0 |
        i1 << 2`` per group, even groups in the low half. A 16-bit weight takes 9/16 of its dense
        bytes, a 32-bit one 17/32.

    Raises:
        ValueError: K is not a multiple of 4, or the weight is not 2:4 and `prune` is false; names
            the row and group.
        TypeError: another dtype.

    Source: PTX ISA, "Matrix multiply-accumulate operation using mma.sp", sparsity selector and
    metadata.

    >>> pack_24(torch.tensor([[0.0, 5.0, 0.0, 7.0]]))
    (tensor([[5., 7.]]), tensor([[77]], dtype=torch.uint8))
    """
    if not prune:
        _check_weight("pack_24", weight)
        if (first := _first_dense_group(weight)) is not None:
            row, group = first
            found = weight[row, 4 * group : 4 * group + 4].tolist()
            raise ValueError(
                f"pack_24: weight is not 2:4: row {row}, group {group} (columns {4 * group} to {4 * group + 3}) is "
                f"{found}; it takes at most two non-zeros in four, or prune=True to keep the two largest"
            )
    return _ops.pack_24(weight)


def unpack_24(values: Tensor, meta: Tensor) -> Tensor:
    """The dense weight of a packed one: ``dense[n, 4g + i] = values[n, 2g + s]`` for the two positions i of slot s.

    Differentiable in `values`.

    Args:
        values: ``[N, K/2]``, dtypes as :func:`prune_24`.
        meta: uint8 ``[N, ceil(K/8)]``. Only legal nibbles have a meaning, see :func:`check_24`.

    Returns:
        ``[N, K]``, contiguous.

    Raises:
        ValueError: shapes that do not belong together.
        TypeError: another dtype.

    >>> unpack_24(torch.tensor([[5.0, 7.0]]), torch.tensor([[77]], dtype=torch.uint8))
    tensor([[0., 5., 0., 7.]])
    """
    return _ops.unpack_24(values, meta)


def check_24(values: Tensor, meta: Tensor) -> None:
    """Raise unless `values` and `meta` are a legal packed weight. For bytes that come from a file or another process.

    A legal nibble is ``i0 | i1 << 2`` with ``i0 < i1``: 4, 8, 9, 12, 13 or 14; after an odd last
    group the high half is 4.

    Raises:
        ValueError: shapes that do not belong together, or an illegal nibble; names its row and
            group.
        TypeError: another dtype.
    """
    _check_packed("check_24", values, meta, FORMAT_DTYPES)
    nibbles = torch.stack([meta & 15, meta >> 4], dim=-1).flatten(1)
    legal = (nibbles & 3) < (nibbles >> 2)
    groups = values.shape[1] // 2
    legal[:, groups:] = nibbles[:, groups:] == 4
    if not bool(legal.all()):
        row, group = (~legal).nonzero()[0].tolist()
        raise ValueError(
            f"check_24: meta row {row}, group {group} is the nibble {int(nibbles[row, group])}; it takes "
            f"{'4, 8, 9, 12, 13 or 14' if group < groups else '4 after an odd last group'}"
        )


def linear_24(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """``y = activation(x · Wᵀ + bias)`` for a 2:4 weight W, straight from the packed form.

    Sums are kept in fp32 (fp64 for fp64) and rounded once, after bias and activation. Differentiable
    in x, values and bias; under autocast it runs in the autocast dtype. Where x is infinite or NaN at
    a position that W does not keep, a kernel that skips it gives a finite sum and one that multiplies
    by zero a NaN; which of the two is not specified.

    Args:
        x: ``[..., K]`` float32, float16, bfloat16 (float64 on the reference back end), any strides,
            any M.
        values: ``[N, K/2]``, the dtype of x.
        meta: uint8 ``[N, ceil(K/8)]``, legal nibbles (:func:`check_24`).
        bias: ``[N]``, the dtype of x, or None.
        activation: ``none``, ``relu``, ``relu2`` (squared ReLU), ``gelu`` (erf form) or ``silu``.

    Returns:
        ``[..., N]`` in the dtype of x, contiguous, as ``torch.nn.functional.linear`` gives.

    Raises:
        ValueError: shapes that do not belong together, different devices, an unknown activation.
        TypeError: dtypes that differ or are not served.

    Source: Mishra et al. 2021 (arXiv 2104.08378), section 3.

    >>> values, meta = pack_24(torch.tensor([[0.0, 5.0, 0.0, 7.0]]))
    >>> linear_24(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]), values, meta)
    tensor([[7050.]])
    """
    return _ops.linear_24(x, values, meta, bias, activation)


def prepack_24(values: Tensor, meta: Tensor) -> Tensor:
    """A packed weight in the layout this device multiplies fastest: opaque bytes, as many as before, not for files.

    Where no such layout has been measured to pay, it is the bytes of `values` followed by those of
    `meta`. :func:`unprepack_24` is the exact inverse.

    Args:
        values: ``[N, K/2]`` float32, float16, bfloat16 or float64.
        meta: uint8 ``[N, ceil(K/8)]``.

    Returns:
        uint8 ``[N * K/2 * itemsize + N * ceil(K/8)]``.
    """
    return _ops.prepack_24(values, meta)


def unprepack_24(packed: Tensor, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``values, meta`` of a prepacked weight ``[N, K]`` of `dtype`; the exact inverse of :func:`prepack_24`.

    Raises:
        ValueError: `packed` has another size than such a weight has.
        TypeError: another dtype.
    """
    return _ops.unprepack_24(packed, N, K, dtype)


def linear_24_prepacked(
    x: Tensor, packed: Tensor, N: int, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """:func:`linear_24` on a weight from :func:`prepack_24`: for inference, where the weight does not change.

    Differentiable in x and bias. K and the weight's dtype are those of x.

    Raises:
        ValueError: `packed` has another size than a weight ``[N, x.shape[-1]]`` of x's dtype has.
        TypeError: dtypes that are not served.
    """
    return _ops.linear_24_prepacked(x, packed, N, bias, activation)


def unpack_zvc(mask: Tensor, values: Tensor, offsets: Tensor, size) -> Tensor:
    """The contiguous tensor of shape `size` that a zero-value compressed stream holds.

    The stream is checked before anything is decoded: a mask, offsets or length that do not fit
    together are an error, never a read outside. Tiles may lie in any order in `values`.

    Args:
        mask: uint8 ``[ceil(n/8)]``, bit ``i % 8`` of byte ``i / 8`` set where element i is not
            all-zero bits.
        values: the non-zero elements, one dimension, any dtype of 1, 2, 4 or 8 bytes.
        offsets: int64 ``[ceil(n/4096)]``, where each tile of 4096 starts in `values`.
        size: the shape; its product is n.

    Raises:
        ValueError: the stream lies about itself; says how.
        TypeError: another dtype.

    Source: Rhu et al. 2018, "Compressing DMA Engine" (arXiv 1705.01626).

    >>> stream = torch.ops.sparsekern.pack_zvc(torch.tensor([0, 3, 0, 0, 4]))
    >>> unpack_zvc(*stream, [5])
    tensor([0, 3, 0, 0, 4])
    """
    return _ops.unpack_zvc(mask, values, offsets, size)
