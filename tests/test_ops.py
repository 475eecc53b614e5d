"""The torch side of every op: schema, fake, gradients, autocast, tracing. The answers are tested elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import sparsekern as sk
from sparsekern import backends, ops, reference
from sparsekern.samples import Samples

CPU = torch.device("cpu")
_ops = torch.ops.sparsekern


def samples(op: str, dtype: torch.dtype = torch.float32, exact: bool = False) -> list[tuple]:
    return list(Samples(dtype, CPU, exact).of(op, quick=True))


def requiring_grad(args: tuple) -> tuple:
    return tuple(
        a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in args
    )


def test_the_contract_is_what_is_registered():
    assert set(ops.OPS) == {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("sparsekern::")
    }
    for op in ops.OPS.values():
        assert str(getattr(_ops, op.name).default._schema).startswith(f"sparsekern::{op.name}(")


@pytest.mark.parametrize("op", ops.OPS)
def test_opcheck(op):
    function = getattr(_ops, op).default
    for args in samples(op):
        torch.library.opcheck(function, args)
        if op != "pack_zvc_out":  # it writes to its arguments, which therefore take no gradient
            torch.library.opcheck(function, requiring_grad(args))


@pytest.mark.parametrize("op", ops.OPS)
def test_the_fake_has_the_real_shapes_dtypes_and_strides(op):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for args in samples(op):
        real = getattr(_ops, op)(*args)
        with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False) as mode:
            fake_args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            fake = getattr(_ops, op)(*fake_args)
        if op == "pack_zvc":  # how many values there are is not known before the data is
            real, fake = (real[0], real[2]), (fake[0], fake[2])
        pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
        for r, f in pairs:
            if r is not None:
                assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


@pytest.mark.parametrize("op", ops.OPS)
def test_every_op_runs_on_meta_tensors(op):
    for args in samples(op):
        args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        if op == "pack_zvc":
            continue  # its size depends on the data
        out = getattr(_ops, op)(*args)
        assert out is None or (out[0] if isinstance(out, tuple) else out).is_meta


# ---- gradients ----


def packed_weight(N: int, K: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    values, meta = reference.pack_24(torch.randn(N, K, dtype=torch.float64))
    return values.requires_grad_(), meta


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_gradients_of_linear_24(activation, with_bias, leading):
    values, meta = packed_weight(5, 12)
    x = torch.randn(*leading, 12, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True) if with_bias else None
    assert gradcheck(lambda x, v, b: sk.linear_24(x, v, meta, b, activation), (x, values, bias))


@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
def test_second_derivatives_of_linear_24(activation):
    values, meta = packed_weight(3, 8)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x, v: sk.linear_24(x, v, meta, None, activation), (x, values))


def test_gradients_of_the_gradient_ops():
    values, meta = packed_weight(3, 8)
    dy = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda dy, v: _ops.linear_24_dx(dy, v, meta), (dy, values))
    assert gradcheck(lambda dy, x: _ops.linear_24_dvalues(dy, x, meta), (dy, x))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_gradients_of_linear_24_prepacked(activation):
    values, meta = packed_weight(5, 12)
    packed = sk.prepack_24(values.detach(), meta)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, b: sk.linear_24_prepacked(x, packed, 5, b, activation), (x, bias))


def test_gradients_of_pack_unpack_and_gather():
    values, meta = packed_weight(4, 12)
    dense = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda v: sk.unpack_24(v, meta), (values,))
    assert gradcheck(lambda w: _ops.gather_24(w, meta), (dense,))
    assert gradcheck(lambda w: sk.pack_24(w, prune=True)[0], (dense,))
    assert not sk.pack_24(dense, prune=True)[1].requires_grad


@pytest.mark.parametrize("op", [sk.prune_24, sk.prune_24_transposable])
def test_pruning_passes_its_gradient_straight_through(op):
    weight = torch.randn(4, 8, requires_grad=True)
    g = torch.randn(4, 8)
    op(weight).backward(g)
    assert torch.equal(weight.grad, g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_gradients_agree_with_a_masked_dense_layer(dtype, activation, isa):
    torch.manual_seed(0)
    dense = sk.prune_24(torch.randn(40, 64)).to(dtype)
    values, meta = sk.pack_24(dense)
    x, bias, dy = torch.randn(17, 64), torch.randn(40), torch.randn(17, 40)
    ours = [t.to(dtype).clone().requires_grad_() for t in (x, values, bias)]
    sk.linear_24(ours[0], ours[1], meta, ours[2], activation).backward(dy.to(dtype))
    wide = [t.to(dtype).double().clone().requires_grad_() for t in (x, dense, bias)]
    reference._activate(F.linear(*wide), activation).backward(dy.to(dtype).double())
    torchs = [t.to(dtype).clone().requires_grad_() for t in (x, dense, bias)]
    reference._activate(F.linear(*torchs), activation).backward(dy.to(dtype))
    grads = [(o.grad, t.grad, w.grad) for o, t, w in zip(ours, torchs, wide, strict=True)]
    grads[1] = (grads[1][0], *(reference.gather_24(g, meta) for g in grads[1][1:]))
    for got, torch_grad, want in grads:
        error, theirs = ((g.double() - want).square().mean().sqrt() for g in (got, torch_grad))
        assert error <= 2 * theirs + torch.finfo(dtype).eps * want.abs().mean()


def test_zvc_takes_no_gradient():
    x = torch.randn(10, requires_grad=True)
    stream = _ops.pack_zvc(x)
    assert not any(t.requires_grad for t in stream)
    assert not _ops.unpack_zvc(*stream, [10]).requires_grad


# ---- autocast and tracing ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_the_product_in_its_dtype_and_returns_fp32_gradients(dtype):
    values, meta = sk.pack_24(torch.randn(8, 16), prune=True)
    x, bias = torch.randn(3, 16, requires_grad=True), torch.randn(8, requires_grad=True)
    values.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = sk.linear_24(x, values, meta, bias)
        assert y.dtype is dtype
        assert torch.equal(y, sk.linear_24(x.to(dtype), values.to(dtype), meta, bias.to(dtype)))
    y.float().sum().backward()
    assert {t.grad.dtype for t in (x, values, bias)} == {torch.float32}
    assert sk.linear_24(x, values, meta, bias).dtype is torch.float32


FIRST_USE = """
import torch, sparsekern as sk
values, meta = sk.pack_24(torch.randn(64, 64), prune=True)
x = torch.randn(4, 64, requires_grad=True)
values.requires_grad_()
y = sk.linear_24(x, values, meta, None, "gelu")
with torch.autocast("cpu"):  # every kernel of the backward is used for the first time in here
    y.sum().backward()
want = torch.nn.functional.gelu(x.detach().requires_grad_() @ sk.unpack_24(values, meta).T)
gx, gv = torch.autograd.grad(sk.linear_24(x, values, meta, None, "gelu").sum(), (x, values))
assert x.grad.dtype is values.grad.dtype is torch.float32
assert torch.equal(x.grad, gx) and torch.equal(values.grad, gv)
"""


@pytest.mark.parametrize(
    "backend", ["cpu", "reference", pytest.param("triton", marks=pytest.mark.triton)]
)
def test_autocast_does_not_reach_into_kernels_or_their_self_test(backend):
    env = os.environ | {"SPARSEKERN_BACKEND": backend, "PYTHONWARNINGS": "error::RuntimeWarning"}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_autocast_leaves_float64_alone():
    values, meta = packed_weight(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            sk.linear_24(torch.randn(2, 8, dtype=torch.float64), values, meta).dtype
            is torch.float64
        )


def test_every_op_compiles_without_a_graph_break():
    weight = torch.randn(8, 16)

    def everything(w, x):
        values, meta = _ops.pack_24(w)
        y = _ops.linear_24(x, values, meta, None, "relu")
        z = _ops.linear_24_prepacked(x, _ops.prepack_24(values, meta), w.shape[0])
        back = _ops.unpack_24(*_ops.unprepack_24(_ops.prepack_24(values, meta), 8, 16, w.dtype))
        return y, z, back, _ops.prune_24(w), _ops.prune_24_transposable(w)

    x = torch.randn(3, 16)
    got = torch.compile(everything, fullgraph=True, backend="aot_eager")(weight, x)
    for g, want in zip(got, everything(weight, x), strict=True):
        assert torch.equal(g, want)


def test_zvc_compiles_with_a_size_that_depends_on_the_data():
    def round_trip(x):
        return _ops.unpack_zvc(*_ops.pack_zvc(x), list(x.shape))

    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 5000):
        x = torch.relu(torch.randn(n))
        assert torch.equal(compiled(x), x)


def test_an_op_without_kernel_for_a_dtype_says_so():
    with pytest.raises(
        TypeError, match=r"linear_24: values has dtype torch.int8; it takes bfloat16"
    ):
        sk.linear_24(
            torch.zeros(1, 4, dtype=torch.int8),
            torch.zeros(1, 2, dtype=torch.int8),
            torch.full((1, 1), 68, dtype=torch.uint8),
        )


def test_devices_that_the_table_does_not_name_get_the_reference():
    assert backends.order("xpu") == ("reference",)


def test_the_backend_variable_is_checked(monkeypatch):
    monkeypatch.setenv("SPARSEKERN_BACKEND", "reference")
    assert backends.order("cpu") == ("reference",)
    monkeypatch.setenv("SPARSEKERN_BACKEND", "abacus")
    with pytest.raises(
        ValueError,
        match="SPARSEKERN_BACKEND is 'abacus'; it takes one of cpu, cuda, reference, triton",
    ):
        backends.order("cpu")


# ---- what is written, and where ----


def test_autograd_notices_what_pack_zvc_out_overwrites():
    x = torch.relu(torch.randn(100))
    mask, offsets = torch.empty(13, dtype=torch.uint8), torch.empty(1, dtype=torch.int64)
    count, room = torch.empty(1, dtype=torch.int64), torch.ones(100)
    weight = torch.ones(100, requires_grad=True)
    y = (weight * room).sum()
    _ops.pack_zvc_out(x, mask, room, offsets, count)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with pytest.raises(ValueError, match="pack_zvc_out: values requires grad"):
        _ops.pack_zvc_out(x, mask, weight, offsets, count)
    with torch.inference_mode():
        _ops.pack_zvc_out(x, mask, torch.empty(100), offsets, count)


def test_an_argument_on_another_device_is_named():
    meta = torch.full((4, 1), 68, dtype=torch.uint8, device="meta")
    with pytest.raises(
        ValueError, match="gather_24: meta is on meta; it takes the device of dense"
    ):
        _ops.gather_24(torch.randn(4, 8), meta)
    with pytest.raises(
        ValueError, match="linear_24: meta is on meta; it takes the device of values"
    ):
        _ops.linear_24(torch.randn(2, 8), torch.randn(4, 4), meta)
    with pytest.raises(
        ValueError, match="linear_24_dvalues: meta is on meta; it takes the device of x"
    ):
        _ops.linear_24_dvalues(torch.randn(2, 4), torch.randn(2, 8), meta)
    empty = {"dtype": torch.int64, "device": "cpu"}
    mask = torch.empty(1, dtype=torch.uint8, device="meta")
    x, offsets, count = torch.randn(4), torch.empty(1, **empty), torch.empty(1, **empty)
    with pytest.raises(ValueError, match="pack_zvc_out: mask is on meta; it takes the device of x"):
        _ops.pack_zvc_out(x, mask, torch.empty(4), offsets, count)


def test_sparse_layouts_are_refused_by_name():
    values, meta = sk.pack_24(torch.randn(4, 8), prune=True)
    with pytest.raises(TypeError, match=r"linear_24: x has layout torch\.sparse_coo"):
        sk.linear_24(torch.eye(8).to_sparse(), values, meta)
    with pytest.raises(TypeError, match=r"prune_24: weight has layout torch\.sparse_coo"):
        sk.prune_24(torch.eye(8).to_sparse())


def test_a_weight_without_columns_is_packed():
    assert sk.is_24(torch.zeros(3, 0))
    values, meta = sk.pack_24(torch.zeros(3, 0))
    assert (values.shape, meta.shape) == ((3, 0), (3, 0))
    assert sk.unpack_24(values, meta).shape == (3, 0)
    assert sk.prune_24(torch.zeros(3, 0)).shape == (3, 0)
