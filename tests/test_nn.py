"""SparseLinear does what nn.Linear does, and sparsify_ swaps it in."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import sparsekern as sk

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=[False, True], ids=["packed", "prepacked"])
def layer(request) -> sk.SparseLinear:
    layer = sk.SparseLinear(20, 12).eval()
    return layer.prepack() if request.param else layer


def assert_same_layer(a: nn.Module, b: nn.Module, in_features: int = 20) -> None:
    x = torch.randn(3, in_features)
    torch.testing.assert_close(a(x), b(x))  # a prepacked layer may sum in another order
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, t in a.state_dict().items():
        assert torch.equal(t, b.state_dict()[name]), name


# ---- the product ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("in_features", [1, 3, 4, 13, 64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (2, 3), (2, 0, 3)])
@pytest.mark.parametrize("prepack", [False, True])
def test_forward_is_a_dense_layer_with_the_pruned_weight(dtype, bias, in_features, shape, prepack):
    layer = sk.SparseLinear(in_features, 7, bias=bias, dtype=dtype)
    dense = layer.to_linear()
    if prepack:
        layer.prepack()
    x = torch.randn(*shape, in_features, dtype=dtype)
    got, want = layer(x), dense(x)
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
    torch.testing.assert_close(got, want)


def test_wrong_input_is_named():
    layer = sk.SparseLinear(8, 4)
    with pytest.raises(
        ValueError, match=r"linear_24: x has shape \(3, 9\); .* takes \[\.\.\., 8\]"
    ):
        layer(torch.zeros(3, 9))
    with pytest.raises(TypeError, match=r"linear_24: x has dtype torch.float16; it takes that of"):
        layer(torch.zeros(3, 8, dtype=torch.float16))


def test_wrong_input_to_a_padded_layer_is_named_as_the_user_knows_it():
    with pytest.raises(ValueError, match=r"input has shape \(3, 7\); it takes \[\.\.\., 6\]"):
        sk.SparseLinear(6, 2)(torch.zeros(3, 7))


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_layer_without_inputs_gives_its_bias():
    layer = sk.SparseLinear.from_linear(nn.Linear(0, 3), prune=False)
    assert torch.equal(layer(torch.zeros(2, 0)), layer.bias.expand(2, 3))


def test_the_initialisation_is_that_of_nn_linear_pruned():
    torch.manual_seed(1)
    layer = sk.SparseLinear(30, 8)
    torch.manual_seed(1)
    dense = nn.Linear(30, 8)
    assert torch.equal(layer.weight, sk.prune_24(F.pad(dense.weight, (0, 2)))[:, :30])
    assert torch.equal(layer.bias, dense.bias)


def test_construction_takes_device_and_dtype():
    layer = sk.SparseLinear(8, 4, device="meta", dtype=torch.bfloat16)
    assert layer.values.is_meta
    assert layer(torch.zeros(2, 8, device="meta", dtype=torch.bfloat16)).shape == (2, 4)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    sk.check_24(layer.values.detach(), layer.meta)


# ---- to and from nn.Linear ----


@pytest.mark.parametrize("in_features", [8, 10])
def test_from_linear_and_back(in_features):
    linear = nn.Linear(in_features, 6).eval()
    linear.weight.requires_grad_(False)
    before = linear.weight.clone()
    layer = sk.SparseLinear.from_linear(linear)
    assert torch.equal(linear.weight, before)
    assert not layer.values.requires_grad
    assert layer.bias.requires_grad
    assert not layer.training
    back = layer.to_linear()
    assert sk.is_24(F.pad(back.weight, (0, -in_features % 4)))
    assert torch.equal(back.bias, linear.bias)
    assert not back.weight.requires_grad
    again = sk.SparseLinear.from_linear(back, prune=False)
    assert_same_layer(layer, again, in_features)


def test_from_linear_without_pruning_wants_a_24_weight():
    linear = nn.Linear(8, 4)
    linear.weight.data[:] = sk.prune_24(linear.weight)
    linear.weight.data[2, 4:7] = 1.0
    with pytest.raises(ValueError, match=r"row 2, group 1"):
        sk.SparseLinear.from_linear(linear, prune=False)


def test_an_fp8_layer_is_refused_by_name():
    linear = nn.Linear(8, 4)
    linear.weight = nn.Parameter(linear.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        TypeError, match=r"from_linear: linear.weight has dtype torch.float8_e4m3fn"
    ):
        sk.SparseLinear.from_linear(linear)


def test_bytes_at_rest_keep_the_promise():
    for dtype, most in ((torch.bfloat16, 0.57), (torch.float16, 0.57), (torch.float32, 0.54)):
        layer = sk.SparseLinear(1024, 256, bias=False, dtype=dtype)
        dense = 1024 * 256 * dtype.itemsize
        for form in (layer, layer.prepack()):
            tensors = [*form.parameters(), *form.buffers()]
            storages = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors
            }
            assert sum(storages.values()) <= most * dense


# ---- training ----


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop]
)
def test_optimiser_steps_train_and_keep_the_pattern(optimizer):
    model = nn.Sequential(sk.SparseLinear(10, 32), nn.ReLU(), sk.SparseLinear(32, 1))
    patterns = [layer.weight != 0 for layer in (model[0], model[2])]
    x = torch.randn(64, 10)
    y = x.sum(1, keepdim=True)
    opt = optimizer(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for pattern, layer in zip(patterns, (model[0], model[2]), strict=True):
        assert not (layer.weight != 0)[~pattern].any()
        assert sk.is_24(F.pad(layer.weight, (0, -layer.in_features % 4)))


def test_one_step_equals_that_of_a_masked_dense_layer():
    layer = sk.SparseLinear(16, 8)
    dense = layer.to_linear()
    mask = dense.weight != 0
    x = torch.randn(5, 16)
    for model in (layer, dense):
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        model(x).square().sum().backward()
        opt.step()
    torch.testing.assert_close(layer.weight, dense.weight * mask)
    torch.testing.assert_close(layer.bias, dense.bias)


def test_a_frozen_prepacked_layer_passes_gradients_through():
    layer = sk.SparseLinear(16, 8)
    x = torch.randn(3, 16, requires_grad=True)
    (want,) = torch.autograd.grad(layer(x).sum(), x)
    (got,) = torch.autograd.grad(layer.prepack()(x).sum(), x)
    torch.testing.assert_close(got, want)


def test_training_a_prepacked_layer_unpacks_it_and_the_optimiser_still_holds_it():
    layer = sk.SparseLinear(16, 8)
    opt = torch.optim.SGD(layer.parameters(), lr=0.5)
    before = layer.weight.detach().clone()
    layer.prepack()
    assert layer.prepacked
    assert not layer.training
    assert layer.values is None
    assert torch.equal(layer.weight, before)
    layer.train()
    assert not layer.prepacked
    layer(torch.ones(2, 16)).sum().backward()
    opt.step()
    assert not torch.equal(layer.weight, before)


def test_prepacking_keeps_the_order_of_parameters_so_that_optimiser_states_fit():
    layer = sk.SparseLinear(4, 2).prepack().train()
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias"]
    opt = torch.optim.Adam(layer.parameters())
    layer(torch.randn(2, 4)).sum().backward()
    opt.step()
    other = sk.SparseLinear(4, 2)
    opt2 = torch.optim.Adam(other.parameters())
    opt2.load_state_dict(opt.state_dict())
    other(torch.randn(2, 4)).sum().backward()
    opt2.step()


def test_prepacking_one_layer_leaves_those_it_shares_with_alone():
    a, b = sk.SparseLinear(8, 8), sk.SparseLinear(8, 8)
    b.values, b.meta = a.values, a.meta
    c = copy.copy(a)
    x = torch.randn(2, 8)
    want = a(x)
    a.prepack()
    torch.testing.assert_close(b(x) - b.bias, want - a.bias)
    assert torch.equal(c(x), want)
    d = sk.SparseLinear(8, 8)
    d.load_state_dict(b.state_dict(keep_vars=True), assign=True)
    d.prepack()
    torch.testing.assert_close(b(x), d(x))


def test_prepacking_between_forward_and_backward_keeps_the_gradient():
    layer = sk.SparseLinear(8, 4)
    x = torch.randn(2, 8, requires_grad=True)
    y = layer(x).sum()
    layer.prepack()
    y.backward()
    assert torch.allclose(x.grad, layer.weight.detach().sum(0).expand(2, 8))


def test_prepacking_in_inference_mode_can_be_trained_later():
    layer = sk.SparseLinear(8, 4, bias=False)
    with torch.inference_mode():
        layer.prepack()
        layer(torch.randn(2, 8))
    layer.train()
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.values.grad is not None
    with torch.inference_mode():
        layer.prepack().train()
    layer(torch.randn(2, 8)).sum().backward()


def test_a_frozen_layer_saves_no_activation():
    layer = sk.SparseLinear(8, 4).requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert {t.shape for t in saved} == {layer.values.shape, layer.meta.shape}


# ---- saving and moving ----


def test_deepcopy_pickle_and_torch_save(layer):
    assert_same_layer(layer, copy.deepcopy(layer))
    assert_same_layer(layer, pickle.loads(pickle.dumps(layer)))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_same_layer(layer, loaded)
    assert loaded.prepacked == layer.prepacked


def test_state_dict_is_plain_tensors_in_the_documented_format(layer):
    state = layer.state_dict()
    assert set(state) == {"values", "meta", "bias"}
    assert state["values"].shape == (12, 10)
    assert state["meta"].shape == (12, 3)
    assert state["meta"].dtype is torch.uint8
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = sk.SparseLinear(20, 12)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_layer(layer, other.eval())
    third = sk.SparseLinear(20, 12).prepack()
    third.load_state_dict(safetensors.torch.load(safetensors.torch.save(state)))
    assert third.prepacked
    assert_same_layer(layer, third)


def test_loading_with_assign_onto_meta(layer):
    other = sk.SparseLinear(20, 12, device="meta").eval()
    other.load_state_dict(layer.state_dict(), assign=True)
    assert_same_layer(layer, other)


@pytest.mark.parametrize("in_features", [20, 18])
def test_a_dense_24_state_dict_loads_and_a_dense_one_is_refused(in_features):
    model = nn.Sequential(nn.Linear(in_features, 12))
    sparse = nn.Sequential(sk.SparseLinear(in_features, 12))
    with pytest.raises(RuntimeError, match=r"0\.pack_24: weight is not 2:4: row 0, group 0"):
        sparse.load_state_dict(model.state_dict())
    padded = sk.prune_24(F.pad(model[0].weight.data, (0, -in_features % 4)))
    model[0].weight.data = padded[:, :in_features].contiguous()
    sparse.load_state_dict(model.state_dict())
    assert torch.equal(sparse[0].weight, model[0].weight)
    x = torch.randn(2, in_features)
    torch.testing.assert_close(sparse(x), model(x))
    model.load_state_dict(nn.Sequential(sparse[0].to_linear()).state_dict())


def test_loading_checks_what_it_reads():
    layer = sk.SparseLinear(20, 12)
    good = layer.state_dict()
    bad = good | {"meta": good["meta"].clone()}
    bad["meta"][3, 1] = 0
    with pytest.raises(RuntimeError, match="meta row 3, group 2 is the nibble 0; it takes 4, 8, 9"):
        layer.load_state_dict(bad)
    with pytest.raises(RuntimeError, match=r"meta has shape \(12, 2\)"):
        layer.load_state_dict(good | {"meta": good["meta"][:, :2]})
    with pytest.raises(RuntimeError, match=r"weight has shape \(12, 21\); it takes \(12, 20\)"):
        layer.load_state_dict({"weight": torch.zeros(12, 21), "bias": good["bias"]})
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"bias": good["bias"]})
    assert torch.equal(layer.state_dict()["meta"], good["meta"])


def test_no_way_of_loading_gets_past_the_check():
    layer = sk.SparseLinear(8, 8)
    illegal = torch.zeros_like(layer.meta)
    with pytest.raises(RuntimeError, match="nibble 0"):
        layer.load_state_dict({"meta": illegal}, strict=False)
    layer = sk.SparseLinear(8, 8)
    state = layer.state_dict() | {"renamed": illegal}
    del state["meta"]

    def rename(module, state_dict, prefix, *_):
        state_dict[prefix + "meta"] = state_dict.pop(prefix + "renamed")

    layer.register_load_state_dict_pre_hook(rename)
    with pytest.raises(RuntimeError, match="nibble 0"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("name", ["values", "meta", "weight"])
def test_a_state_dict_of_something_else_than_tensors_is_an_error(name):
    layer = sk.SparseLinear(8, 4)
    state = layer.state_dict()
    if name == "weight":
        del state["values"]
    with pytest.raises(RuntimeError, match=r"Missing key|expected torch\.Tensor"):
        layer.load_state_dict(state | {name: 3})


def test_a_prepacked_layer_can_be_initialised_again():
    layer = sk.SparseLinear(8, 4).prepack()
    before = layer.weight
    layer.reset_parameters()
    assert layer.prepacked
    assert not torch.equal(layer.weight, before)


def test_a_dense_state_dict_on_meta_can_be_assigned():
    layer = sk.SparseLinear(8, 4)
    layer.load_state_dict(nn.Linear(8, 4, device="meta").state_dict(), assign=True)
    assert layer.values.is_meta


def test_a_copy_of_a_prepacked_layer_keeps_what_the_user_registered():
    layer = sk.SparseLinear(8, 4)
    layer.register_buffer("scale", torch.ones(1))
    layer.register_buffer("cache", torch.ones(1), persistent=False)
    other = copy.deepcopy(layer.prepack())
    assert other.prepacked
    assert torch.equal(other.scale, layer.scale)
    assert "cache" not in other.state_dict()
    assert set(other.state_dict()) == {"values", "meta", "bias", "scale"}
    assert set(copy.deepcopy(layer).train().state_dict()) == {"values", "meta", "bias", "scale"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_moves(layer, dtype):
    weight = layer.weight.detach()
    moved = layer.to(dtype)
    assert moved is layer
    assert layer.weight.dtype is dtype
    assert layer.state_dict()["meta"].dtype is torch.uint8
    assert torch.equal(layer.weight, weight.to(dtype))
    assert layer(torch.randn(2, 20, dtype=dtype)).dtype is dtype


def test_half_bfloat16_float_and_double(layer):
    for move, dtype in (
        ("half", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("float", torch.float32),
    ):
        assert getattr(layer, move)()(torch.randn(2, 20).to(dtype)).dtype is dtype
    assert layer.double()(torch.randn(2, 20).double()).dtype is torch.float64


def test_device_moves_keep_the_form(layer):
    prepacked = layer.prepacked
    layer.to("meta")
    assert next(iter(layer.state_dict().values())).is_meta or prepacked


def test_repr():
    layer = sk.SparseLinear(20, 12, bias=False)
    assert repr(layer) == "SparseLinear(in_features=20, out_features=12, bias=False)"
    assert repr(layer.prepack()).endswith("bias=False, prepacked=True)")


# ---- compile, export, autocast ----


@pytest.mark.parametrize("in_features", [20, 18])
@pytest.mark.parametrize("prepack", [False, True])
def test_compile_with_inductor(in_features, prepack):
    layer = sk.SparseLinear(in_features, 12)
    if prepack:
        layer.prepack()
    compiled = torch.compile(lambda x: torch.relu(layer(x)) + 1, fullgraph=True)
    x = torch.randn(3, in_features)
    torch.testing.assert_close(compiled(x), torch.relu(layer(x)) + 1)


def test_compiled_training_gives_the_eager_gradients():
    layer = sk.SparseLinear(20, 12)
    x = torch.randn(3, 20, requires_grad=True)
    inputs = (x, layer.values, layer.bias)
    want = torch.autograd.grad(layer(x).square().sum(), inputs)
    got = torch.autograd.grad(torch.compile(layer, fullgraph=True)(x).square().sum(), inputs)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("prepack", [False, True])
def test_export_with_a_dynamic_batch(prepack):
    model = nn.Sequential(sk.SparseLinear(18, 12), nn.ReLU(), sk.SparseLinear(12, 4))
    if prepack:
        model[0].prepack(), model[2].prepack()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.randn(3, 18),), dynamic_shapes=({0: batch},))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("sparsekern.linear_24" in target for target in targets) == 2
    x = torch.randn(7, 18)
    torch.testing.assert_close(program.module()(x), model(x))


def test_autocast_like_nn_linear(layer):
    x = torch.randn(2, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype is torch.bfloat16
        # an input that an earlier layer made bf16 is taken by both forms
        assert layer(x.bfloat16()).dtype is y.dtype


@pytest.mark.parametrize("prepack", [False, True])
def test_compiled_under_autocast(prepack):
    layer = sk.SparseLinear(8, 8).eval()
    if prepack:
        layer.prepack()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = compiled(x), layer(x)
    assert got.dtype is want.dtype is torch.bfloat16
    assert torch.equal(got, want)


def test_inference_mode_and_vectors(layer):
    with torch.inference_mode():
        assert layer(torch.randn(20)).shape == (12,)


# ---- sparsify_ ----


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def pruned_copy(model: nn.Module) -> nn.Module:
    """The same model with dense layers that hold the weights sparsify_ will choose."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight.data = sk.SparseLinear.from_linear(module).weight.detach()
    return model


@pytest.mark.parametrize("prepack", [False, True])
def test_sparsify_an_mlp(prepack):
    model = Mlp()
    dense = pruned_copy(model)
    report = sk.sparsify_(model, prepack=prepack)
    assert [(r.name, r.swapped, r.reason) for r in report] == [("up", True, ""), ("down", True, "")]
    assert all(r.bytes_after <= 0.54 * r.bytes_before for r in report)
    assert isinstance(model.up, sk.SparseLinear)
    assert model.up.prepacked == prepack
    x = torch.randn(3, 16)
    torch.testing.assert_close(model(x), dense(x))
    assert "2 of 2 layers swapped" in str(report)


@pytest.mark.parametrize("training", [True, False])
def test_sparsify_a_transformer(training):
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).train(training)
    dense = pruned_copy(model)
    report = sk.sparsify_(model)
    reasons = {r.name: r.reason for r in report if not r.swapped}
    assert set(reasons) == {f"layers.{i}.self_attn.out_proj" for i in (0, 1)}
    assert "reads its weight directly" in reasons["layers.0.self_attn.out_proj"]
    assert {r.name for r in report.swapped} == {
        f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)
    }
    x = torch.randn(2, 5, 32)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
    if training:
        model(x).sum().backward()
        assert model.layers[0].linear1.values.grad is not None


@pytest.mark.parametrize("only", [None, "layers.0", "layers.1"])
def test_a_sparsified_encoder_takes_a_padding_mask_in_eval_mode(only):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    dense = pruned_copy(model)
    if only:
        keep = model.layers[1 if only == "layers.0" else 0].state_dict()
        dense.layers[1 if only == "layers.0" else 0].load_state_dict(keep)
    sk.sparsify_(model, filter_fn=lambda _, name: only is None or name.startswith(only))
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[:, 4] = True
    x = torch.randn(3, 5, 32)
    with torch.no_grad():
        got, want = (m(x, src_key_padding_mask=mask) for m in (model, dense))
    torch.testing.assert_close(got[:, :4], want[:, :4], rtol=1e-4, atol=1e-5)


def test_in_eval_mode_a_transformer_uses_the_sparse_product(monkeypatch):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1).eval()
    sk.sparsify_(model)
    calls = []
    forward = sk.SparseLinear.forward
    monkeypatch.setattr(
        sk.SparseLinear, "forward", lambda self, x: calls.append(1) or forward(self, x)
    )
    with torch.no_grad():
        model(torch.randn(2, 5, 32))
    assert len(calls) == 2


def test_sparsify_leaves_alone_what_a_swap_would_break():
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(10, 16),
            "head": nn.Linear(16, 10),
            "own": Own(16, 4),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(16, 4)),
            "hooked": nn.Linear(16, 4),
            "integer": nn.Linear(16, 4),
            "patched": nn.Linear(16, 4),
            "holder": nn.Linear(16, 4),
            "watched": nn.Linear(16, 4),
            "saved": nn.Linear(16, 4),
            "lazy": nn.LazyLinear(4),
            "tied": nn.Linear(16, 4),
            "knot": nn.Linear(16, 4),
            "unwanted": nn.Linear(16, 4),
            "plain": nn.Linear(16, 4),
        }
    )
    model["head"].weight = model["embedding"].weight
    model["hooked"].register_forward_hook(lambda *_: None)
    model["patched"].forward = lambda x: x
    model["holder"].register_buffer("scale", torch.ones(1))
    model["watched"].weight.register_hook(lambda g: g)
    model["saved"].register_state_dict_post_hook(lambda *_: None)
    model["knot"].weight = nn.Parameter(model["tied"].weight.data)
    model["integer"].weight = nn.Parameter(
        torch.zeros(4, 16, dtype=torch.int8), requires_grad=False
    )
    report = sk.sparsify_(model, filter_fn=lambda layer, name: name != "unwanted")
    reasons = {r.name: r.reason for r in report if not r.swapped}
    assert [r.name for r in report.swapped] == ["plain"]
    assert "shared with another module" in reasons["head"]
    assert "subclass of nn.Linear" in reasons["own"]
    assert "parametrized" in reasons["normed"]
    assert all("hooks" in reasons[name] for name in ("hooked", "watched", "saved"))
    assert "forward was replaced" in reasons["patched"]
    assert "lazy" in reasons["lazy"]
    assert "buffers of its own" in reasons["holder"]
    assert all("shared" in reasons[name] for name in ("tied", "knot"))
    assert "int8" in reasons["integer"]
    assert reasons["unwanted"] == "filter_fn said no"
    assert all(r.bytes_after == r.bytes_before for r in report.skipped)


def test_one_layer_under_two_names_stays_one_layer():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = sk.sparsify_(model)
    assert len(report.swapped) == 2
    assert model[0] is model[2]


def test_a_no_to_one_name_of_a_layer_leaves_all_its_names_alone():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": shared})
    sk.sparsify_(model, filter_fn=lambda _, name: name != "a")
    assert model["a"] is model["b"] is shared


def test_without_pruning_an_error_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    model[0].weight.data = sk.prune_24(model[0].weight.data)
    with pytest.raises(ValueError, match=r"layer '1': pack_24: weight is not 2:4: row 0, group 0"):
        sk.sparsify_(model, prune=False)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
    model[1].weight.data = sk.prune_24(model[1].weight.data)
    assert len(sk.sparsify_(model, prune=False).swapped) == 2


def test_a_bare_linear_cannot_be_swapped_in_place():
    with pytest.raises(TypeError, match=r"model is an nn.Linear"):
        sk.sparsify_(nn.Linear(4, 4))


def test_a_model_on_meta_is_swapped_and_then_loaded():
    with torch.device("meta"):
        empty = Mlp()
    sk.sparsify_(empty)
    full = Mlp()
    sk.sparsify_(full)
    empty.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(2, 16)
    assert torch.equal(empty(x), full(x))
