"""The search for an order of columns, and its way through a model's graph."""

import copy
import itertools
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.pruning import permutation as benchmark
from sparsekern import pruning
from sparsekern.pruning import channels, kept_magnitude, permutation, permute, search_permutation
from sparsekern.pruning.channels import Axis, Channels, freeze, leaves, unify
from sparsekern.pruning.permute import _Moves

# ---- the search ----


def partitions(columns, m):
    """All ways to put columns into groups of m, once each."""
    if not columns:
        yield []
        return
    first, *rest = columns
    for others in itertools.combinations(rest, m - 1):
        for more in partitions([c for c in rest if c not in others], m):
            yield [first, *others, *more]


def best_of_all(weight, n, m):
    orders = torch.tensor(list(partitions(list(range(weight.shape[1])), m)))
    groups = weight.abs().double()[:, orders].unflatten(-1, (-1, m))
    return groups.topk(n).values.sum((0, 2, 3)).max().item()


@pytest.mark.parametrize(
    ("K", "pattern"),
    [(8, "2:4"), (12, "2:4"), (8, "1:4"), (12, "3:4"), (8, "1:2"), (12, "2:6"), (16, "4:8")],
)
def test_small_matrices_get_the_best_order_there_is(K, pattern):
    n, m = map(int, pattern.split(":"))
    for seed in range(3):
        weight = torch.randn(6, K, generator=torch.Generator().manual_seed(seed))
        found = search_permutation(weight, pattern, steps=300)
        best = best_of_all(weight, n, m)
        assert kept_magnitude(weight[:, found], pattern) == pytest.approx(best, rel=1e-6)


def test_an_exchange_gains_what_the_window_says():
    columns = torch.rand(24, 50)
    window = permutation._Window(columns.clone(), 2, 4)
    for i, j in ((0, 4), (5, 23), (9, 2), (0, 20)):
        before = kept_magnitude(window.columns.T)
        said = (window.gain[i, j] + window.gain[j, i]).item()
        window._exchange(i, j)
        assert kept_magnitude(window.columns.T) - before == pytest.approx(said, abs=1e-4)
        fresh = permutation._Window(window.columns.clone(), 2, 4)
        torch.testing.assert_close(window.gain, fresh.gain)
        torch.testing.assert_close(window.kept, fresh.kept)


@pytest.mark.parametrize(
    "budget", [{"budget_s": 0}, {"budget_s": 0.02}, {"steps": 0}, {"steps": 3}]
)
@pytest.mark.parametrize("shape", [(8, 16), (64, 400), (3, 4), (5, 520), (0, 8), (4, 0)])
def test_any_budget_gives_an_order_that_is_no_worse(budget, shape):
    weight = torch.randn(shape)
    found = search_permutation(weight, **budget)
    assert found.dtype is torch.int64
    assert found.sort().values.tolist() == list(range(shape[1]))
    assert kept_magnitude(weight[:, found]) >= kept_magnitude(weight)
    groups = found.view(-1, 4)
    assert torch.equal(groups, groups.sort(1).values)
    assert torch.equal(groups[:, 0], groups[:, 0].sort().values)


def test_columns_in_the_best_order_stay():
    weight = torch.zeros(6, 16)
    weight[:, ::4], weight[:, 1::4] = 2, 1
    assert search_permutation(weight, steps=50).tolist() == list(range(16))
    assert search_permutation(torch.zeros(6, 16), steps=50).tolist() == list(range(16))


def test_wide_matrices_in_windows_come_close_to_what_can_be_kept():
    # Half of the columns are large and come first: at best each group has two of them.
    weight = torch.rand(8, 1024) + torch.arange(1024).lt(512) * 10
    found = search_permutation(weight, budget_s=60, steps=600)
    assert kept_magnitude(weight) < 0.6 * weight.sum()
    assert kept_magnitude(weight[:, found]) > 0.9 * weight[:, :512].sum()


def test_the_same_seed_gives_the_same_order():
    weight = torch.randn(16, 160)  # two windows, drawn at random
    first = search_permutation(weight, steps=60, budget_s=600)
    assert torch.equal(first, search_permutation(weight, steps=60, budget_s=600))
    assert not torch.equal(first, search_permutation(weight, steps=60, budget_s=600, seed=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_and_scale(dtype):
    weight = torch.randn(16, 32).to(dtype)
    weight = weight * (torch.finfo(dtype).max / weight.abs().max() * 0.9)  # sums would overflow
    before = kept_magnitude(weight.double() / weight.abs().max())
    found = search_permutation(weight, steps=50)
    assert kept_magnitude(weight.double()[:, found] / weight.abs().max()) > before


def test_groups_of_a_convolution_run_along_its_input_channels():
    weight = torch.randn(6, 8, 3, 3)
    found = search_permutation(weight, steps=100)
    rows = weight.permute(0, 2, 3, 1).reshape(-1, 8)
    assert torch.equal(found, search_permutation(rows, steps=100))
    assert kept_magnitude(weight[:, found]) == pytest.approx(best_of_all(rows, 2, 4), rel=1e-6)


def test_the_matrix_of_the_published_table():
    """Magnitudes as apex's permutation test prints them; 36.6 is what its best search reaches."""
    weight = torch.from_numpy(np.random.RandomState(1).rand(128, 64))
    default, rows = kept_magnitude(weight), weight.topk(32).values.sum().item()
    assert (round(weight.sum().item(), 3), round(default, 3)) == (4083.169, 2852.377)
    assert round(rows, 3) == 3042.332
    found = search_permutation(weight, steps=300, budget_s=60)
    assert 100 * (kept_magnitude(weight[:, found]) - default) / (rows - default) > 36.6


@pytest.mark.parametrize(
    ("weight", "settings", "error", "words"),
    [
        (torch.randn(4, 6), {}, ValueError, r"weight has shape \(4, 6\)"),
        (torch.randn(8), {}, ValueError, r"weight has shape \(8,\)"),
        (torch.ones(4, 8, dtype=torch.int32), {}, TypeError, "torch.int32"),
        (torch.full((4, 8), math.nan), {}, ValueError, "NaNs or infinities"),
        (torch.full((4, 8), -math.inf), {}, ValueError, "NaNs or infinities"),
        (torch.randn(4, 8), {"pattern": "density=0.5"}, ValueError, "density=0.5"),
        (torch.randn(4, 8), {"pattern": "2:4-transposable"}, ValueError, "takes N:M"),
        (torch.randn(4, 8), {"budget_s": -1}, ValueError, "budget_s is -1"),
        (torch.randn(4, 8), {"budget_s": math.nan}, ValueError, "budget_s is nan"),
        (torch.randn(4, 8), {"steps": -1}, ValueError, "steps is -1"),
    ],
)
def test_what_the_search_refuses(weight, settings, error, words):
    with pytest.raises(error, match=words):
        search_permutation(weight, **settings)


def test_progress_is_shown_where_it_is_asked_for(capsys):
    search_permutation(torch.randn(4, 8), steps=2)
    assert capsys.readouterr().err == ""
    search_permutation(torch.randn(4, 8), steps=2, progress=True)
    assert "of the magnitude gained" in capsys.readouterr().err


# ---- nets ----


class Net(nn.Module):
    """Modules by name, and what to do with them."""

    def __init__(self, forward, **modules):
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args):
        return self._forward(self, *args)


def mlp():
    return nn.Sequential(
        nn.Linear(12, 16),
        nn.GELU(),
        nn.Dropout(),
        nn.Linear(16, 24),
        nn.LayerNorm(24),
        nn.Linear(24, 4),
    )


def convs():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.PReLU(12),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


def residual():
    def forward(net, x):
        x = F.relu(net.bn(net.stem(x)))
        y = F.relu(net.bn1(net.conv1(x)))
        y = net.bn2(net.conv2(y)) + net.bnd(net.down(x))
        y = y + net.conv4(F.relu(net.conv3(y)))
        return net.fc(y.mean((2, 3)))

    return Net(
        forward,
        stem=nn.Conv2d(3, 8, 3, padding=1), bn=nn.BatchNorm2d(8),
        conv1=nn.Conv2d(8, 12, 3, 2, 1), bn1=nn.BatchNorm2d(12),
        conv2=nn.Conv2d(12, 16, 3, padding=1), bn2=nn.BatchNorm2d(16),
        down=nn.Conv2d(8, 16, 1, 2), bnd=nn.BatchNorm2d(16),
        conv3=nn.Conv2d(16, 20, 1), conv4=nn.Conv2d(20, 16, 1),
        fc=nn.Linear(16, 5),
    )  # fmt: skip


def depthwise():
    """An inverted residual of MobileNetV2 with a gate on its channels, as in V3."""

    def forward(net, x):
        x = net.stem(x)
        y = F.relu6(net.bn(net.deep(F.hardswish(net.expand(x)))))
        y = y * F.hardsigmoid(net.gate(F.relu(net.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return net.head(x + net.project(y)).flatten(2).mean(-1)

    return Net(
        forward,
        stem=nn.Conv2d(3, 8, 3), expand=nn.Conv2d(8, 16, 1),
        deep=nn.Conv2d(16, 16, 3, padding=1, groups=16), bn=nn.BatchNorm2d(16),
        squeeze=nn.Conv2d(16, 4, 1), gate=nn.Conv2d(4, 16, 1),
        project=nn.Conv2d(16, 8, 1), head=nn.Conv2d(8, 6, 1),
    )  # fmt: skip


def transformer():
    block = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    return Net(
        lambda net, x: net.head(net.block(net.embed(x)).mean(1)),
        embed=nn.Linear(6, 16), block=block, head=nn.Linear(16, 3),
    )  # fmt: skip


def language():
    """A causal block with tied embeddings, written out."""

    def forward(net, tokens):
        x = net.embed(tokens) + net.place(torch.arange(tokens.shape[1]))
        q, k, v = (
            t.unflatten(-1, (2, 8)).transpose(1, 2) for t in net.qkv(net.norm(x)).chunk(3, -1)
        )
        scores = (q @ k.transpose(-2, -1) / 8**0.5).masked_fill(~net.causal, -math.inf)
        x = x + net.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))
        gate, up = net.gate(x), net.up(x)
        x = x + net.down(F.silu(gate) * up)
        return F.linear(net.last(x), net.embed.weight)

    net = Net(
        forward,
        embed=nn.Embedding(11, 16), place=nn.Embedding(5, 16), norm=nn.LayerNorm(16),
        qkv=nn.Linear(16, 48), out=nn.Linear(16, 16),
        gate=nn.Linear(16, 24), up=nn.Linear(16, 24), down=nn.Linear(24, 16), last=nn.RMSNorm(16),
    )  # fmt: skip
    net.register_buffer("causal", torch.ones(5, 5, dtype=torch.bool).tril())
    return net


def flattened():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip


def grouped():
    return nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=2), nn.GroupNorm(2, 16), nn.ReLU(),
        nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def parts():
    """Channels concatenated, split, stacked, gated, cut, padded, upsampled and shuffled."""

    def forward(net, x):
        x = torch.cat([net.a(x), net.b(x)], 1)  # of one size
        x = F.glu(net.c(F.pad(x, (1, 1))), 1)
        x = F.interpolate(torch.cat([net.d(x), net.e(x)], 1), scale_factor=2)  # of different sizes
        first, second = net.f(x).split([8, 8], 1)
        x = net.g(torch.stack([first, second], 0).amax(0))
        x = x.view(x.shape[0], 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)  # as ShuffleNet
        x = net.h(x)
        return torch.einsum("bchw,oc->bo", x[:, :4], net.i.weight) + x.sum((1, 2, 3))[:, None]

    conv = nn.Conv2d
    return Net(
        forward,
        a=conv(3, 8, 1), b=conv(3, 8, 1), c=conv(16, 16, 1), d=conv(8, 8, 1), e=conv(8, 4, 1),
        f=conv(12, 16, 1), g=conv(8, 8, 1), h=conv(8, 8, 1), i=nn.Linear(4, 5, bias=False),
    )  # fmt: skip


def recurrent():
    def forward(net, x):
        y, _ = net.lstm(net.before(x))
        return net.head(F.relu(net.after(y)))

    return Net(
        forward,
        before=nn.Linear(6, 8), lstm=nn.LSTM(8, 8, batch_first=True),
        after=nn.Linear(8, 12), head=nn.Linear(12, 3),
    )  # fmt: skip


def images(size=8):
    return lambda: (torch.randn(2, 3, size, size),)


NETS = {
    "mlp": (mlp, lambda: (torch.randn(3, 12),)),
    "convs": (convs, images()),
    "residual": (residual, images()),
    "depthwise": (depthwise, images()),
    "transformer": (transformer, lambda: (torch.randn(2, 5, 6),)),
    "language": (language, lambda: (torch.randint(11, (2, 5)),)),
    "flattened": (flattened, images()),
    "grouped": (grouped, images()),
    "parts": (parts, images(4)),
    "recurrent": (recurrent, lambda: (torch.randn(2, 5, 6),)),
}

# Layers that get another order; all others say why not.
PERMUTED = {
    "mlp": {"3", "5"},
    "convs": {"4", "9"},
    "residual": {"conv1", "conv2", "conv3", "conv4", "down", "fc"},
    "depthwise": {"expand", "squeeze", "project", "head"},
    "transformer": {"block.self_attn.out_proj", "block.linear1", "block.linear2", "head"},
    "language": {"qkv", "out", "gate", "up", "down"},
    "flattened": {"2", "8"},
    "grouped": {"1", "4", "7"},
    "parts": {"c", "d", "e", "g"},
    "recurrent": {"head"},
}


def filled(build, seed=0):
    """In evaluation mode and fp64, no parameter at a value that would hide a mistake."""
    torch.manual_seed(seed)
    model = build().double().eval()
    for state in (*model.parameters(), *model.buffers()):
        if state.is_floating_point():
            state.data.uniform_(0.1, 1).mul_(
                torch.randn_like(state).sign() if state.dim() > 1 else 1
            )
    return model


def inputs_of(make):
    return tuple(x.double() if x.is_floating_point() else x for x in make())


@pytest.mark.parametrize("name", NETS)
def test_every_axis_that_is_not_frozen_may_have_any_order(name):
    build, make = NETS[name]
    model, inputs = filled(build), inputs_of(make)
    before = model(*inputs)
    channels = Channels(model, inputs, {})
    states = list(channels.states.values())
    axes = {a for s in states for dim in s.layout for a in leaves(dim) if not a.frozen}
    assert axes
    for axis in axes:
        _Moves().make(axis, states, torch.randperm(axis.size).roll(1))
    torch.testing.assert_close(model(*inputs), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NETS)
def test_a_net_keeps_more_and_computes_the_same(name):
    build, make = NETS[name]
    model, inputs = filled(build), inputs_of(make)
    model.train()
    was = copy.deepcopy(model)
    report = permute(model, inputs, steps=60)
    assert {layer.name for layer in report if not layer.skipped} == PERMUTED[name]
    # Together; one of two layers that share an order may keep less.
    gains = {
        r.name: (r.after - r.before) * was.get_submodule(r.name).weight.abs().sum() for r in report
    }
    assert sum(gains.values()) > 0
    assert all(abs(gains[layer.name]) < 1e-9 for layer in report if layer.skipped)
    assert all(m.training for m in model.modules())
    assert model.state_dict().keys() == was.state_dict().keys()
    for a, b in zip(model.parameters(), was.parameters(), strict=True):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)
    fresh = tuple(torch.randn_like(x) if x.is_floating_point() else x.flip(0) for x in inputs)
    model.eval(), was.eval()
    torch.testing.assert_close(model(*fresh), was(*fresh), rtol=1e-9, atol=1e-9)
    # The report says what prune() then keeps.
    for layer, pruned in zip(report, pruning.prune(model), strict=True):
        if not layer.skipped:
            assert layer.after == pytest.approx(pruned.kept)
    for layer, pruned in zip(report, pruning.prune(was), strict=True):
        if not layer.skipped:
            assert layer.before == pytest.approx(pruned.kept)


def test_reasons():
    def why(name):
        build, make = NETS[name]
        report = permute(filled(build), inputs_of(make), budget_s=0)
        return {layer.name: layer.skipped for layer in report}

    assert why("mlp")["0"] == "its input channels stay: they are the model's input"
    assert why("mlp")["3"] == "no better order was found in 0.0 s"
    assert why("flattened")["6"] == "its input is flattened: channels are blocks of 4 columns"
    assert why("flattened")["0"] == "3 input features are no multiple of 4"
    assert why("recurrent")["after"].endswith("they pass an op that may mix them (lstm)")
    assert why("depthwise")["deep"] == "1 input features are no multiple of 4"
    parts = why("parts")
    assert parts["h"] == "its input channels are runs of 2, no multiple of 4"
    assert parts["f"].endswith("they are concatenated (cat)")
    assert parts["i"].endswith("a part of them is taken (slice)")


def test_layers_that_read_the_same_channels_are_searched_together():
    model = filled(lambda: Net(
        lambda net, x: (net.a(net.shared(x)), net.b(net.shared(x)) + net.c(F.relu(net.shared(x)))),
        shared=nn.Linear(8, 16), a=nn.Linear(16, 8), b=nn.Linear(16, 4), c=nn.Linear(16, 4),
    ))  # fmt: skip
    together = torch.cat([model.a.weight, model.b.weight, model.c.weight]).detach()
    order = search_permutation(together, steps=100)
    want = model.shared.weight[order].clone()
    permute(model, torch.randn(2, 8).double(), steps=100)
    assert torch.equal(model.shared.weight, want)
    assert torch.equal(
        torch.cat([model.a.weight, model.b.weight, model.c.weight]), together[:, order]
    )


def test_a_layer_with_no_say_moves_along():
    model, inputs = filled(residual), inputs_of(images())
    was, before = copy.deepcopy(model), model(*inputs)
    report = permute(model, inputs, steps=60, filter_fn=lambda layer, name: name == "fc")
    assert {layer.name for layer in report if not layer.skipped} == {"fc"}
    assert report[1].skipped == "filter_fn said no"
    order = search_permutation(was.fc.weight, steps=60)
    assert torch.equal(model.fc.weight, was.fc.weight[:, order])
    # Both sides of the additions.
    for name in ("conv2", "down", "conv4", "bn2"):
        moved, still = model.get_submodule(name).weight, was.get_submodule(name).weight
        assert torch.equal(moved, still[order])
    torch.testing.assert_close(model(*inputs), before)


def test_channels_stay_where_a_flattened_reader_would_lose():
    """Blocks of 2 columns: two channels make a group, so that their order counts twice."""

    def forward(net, x):
        y = net.conv(x)
        return net.read(y).sum((2, 3)) + net.flat(y.flatten(1))

    model = filled(lambda: Net(
        forward, conv=nn.Conv2d(3, 8, (3, 2)), read=nn.Conv2d(8, 4, 1), flat=nn.Linear(16, 4)
    ))  # fmt: skip
    with torch.no_grad():
        model.read.weight.mul_(1e-6)
        # The best partners are neighbours as it is.
        large = torch.tensor([1.0, 1, 0, 0]).repeat(4)
        model.flat.weight.copy_(torch.where(large.bool(), 1.0, 0.001))
    report = permute(model, torch.randn(2, 3, 4, 2).double(), steps=60)
    assert report[1].skipped == "a layer that reads the same channels flattened would keep less"
    assert report[1].before == report[1].after
    assert report[2].before == report[2].after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_memory_formats_and_gradients(dtype):
    model, inputs = filled(convs).to(dtype), inputs_of(images())
    inputs = tuple(x.to(dtype) for x in inputs)
    model.to(memory_format=torch.channels_last)
    for p in model.parameters():
        p.grad = p.detach().clone()
    report = permute(model, inputs, steps=30)
    assert sum(not layer.skipped for layer in report) == 2
    for p in model.parameters():
        assert torch.equal(p.grad, p)
    assert model[4].weight.is_contiguous(memory_format=torch.channels_last)


def test_frozen_parameters_do_not_hide_the_layers():
    """Evaluation would take torch's one fast op for the whole block."""
    model, inputs = filled(transformer), inputs_of(NETS["transformer"][1])
    model.requires_grad_(False)
    report = permute(model, inputs, steps=30)
    assert {layer.name for layer in report if not layer.skipped} == PERMUTED["transformer"]
    assert torch.backends.mha.get_fastpath_enabled()


def test_ways_to_give_the_examples_and_the_bar(capsys):
    x = torch.randn(3, 12).double()
    wrapped = Net(lambda net, x, scale: net.body(x) * scale, body=mlp())
    for example in ((x, torch.ones(()).double()), {"x": x, "scale": 2.0}):
        model = filled(lambda: copy.deepcopy(wrapped))
        model.forward = lambda x, scale, net=model: net.body(x) * scale
        report = permute(model, example, steps=20, progress=True)
        assert {layer.name for layer in report if not layer.skipped} == {"body.3", "body.5"}
    assert "permute" in capsys.readouterr().err
    assert len(str(report).splitlines()) == 3
    assert "kept before" in str(report)


def test_layers_that_the_examples_do_not_reach():
    model = filled(lambda: Net(lambda net, x: net.used(x), used=mlp(), spare=nn.Linear(16, 16)))
    report = permute(model, torch.randn(3, 12).double(), steps=20)
    assert report[-1].skipped == "its input channels stay: the examples do not reach them"


def test_dropout_that_is_always_on_keeps_its_places():
    model = filled(lambda: Net(
        lambda net, x: net.b(F.dropout(net.a(x))), a=nn.Linear(12, 16), b=nn.Linear(16, 4)
    ))  # fmt: skip
    report = permute(model, torch.randn(3, 12).double(), steps=20)
    assert report[1].skipped.endswith("they pass an op that may mix them (dropout)")


def test_axes_of_very_deep_nets():
    axes = [Axis(8) for _ in range(5000)]
    for later, earlier in itertools.pairwise(reversed(axes)):
        unify([later], [earlier], "")
    assert axes[0].leaves() == [axes[-1]]
    freeze([axes[2500]], "why")
    assert axes[0].leaves()[0].frozen == "why"


def test_axes_that_are_cut():
    whole = Axis(12)
    unify([whole], [Axis(3), Axis(4)], "")
    halves = whole.leaves()
    assert [half.size for half in halves] == [3, 4]
    assert not any(half.frozen for half in halves)
    # 12 as 3 x 4 is no 4 x 3.
    unify([whole], [Axis(4), Axis(3)], "across")
    assert [half.frozen for half in halves] == ["across", "across"]


def test_memory_that_parameters_share_stays():
    model = filled(mlp)
    model[0].bias = nn.Parameter(model[3].weight.data.view(-1)[:16])
    report = permute(model, torch.randn(3, 12).double(), steps=20)
    assert report[1].skipped.endswith("share memory")


# ---- what is refused, and what is put back ----


def test_a_model_that_holds_masks_is_refused():
    model = filled(mlp)
    pruning.prune(model)
    with pytest.raises(
        ValueError, match=r"0\.weight holds a mask already; permute the dense model"
    ):
        permute(model, torch.randn(3, 12).double())


def test_patterns_that_no_order_helps_and_budgets_that_are_none_are_refused():
    with pytest.raises(ValueError, match="takes N:M"):
        permute(mlp(), torch.randn(3, 12), "density=0.5")
    with pytest.raises(ValueError, match="budget_s is -1"):
        permute(mlp(), torch.randn(3, 12), budget_s=-1)


def unchanged(model, was):
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), was.parameters(), strict=True))
    assert all(m.training for m in model.modules())


def test_a_model_that_cannot_be_followed_is_refused_and_stays():
    model = Net(lambda net, x: net.a(x) if x.sum() > 0 else net.b(x), a=mlp(), b=mlp())
    was = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"torch\.export cannot follow the model"):
        permute(model, torch.randn(3, 12))
    unchanged(model, was)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_and_all_is_put_back(value):
    model = filled(mlp).train()
    with torch.no_grad():
        model[5].weight[0, 0] = value
    was = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"5\.weight has NaNs or infinities"):
        permute(model, torch.randn(3, 12).double(), steps=20)
    for a, b in zip(model.parameters(), was.parameters(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_outputs_that_change_put_everything_back(monkeypatch):
    """A planted fault: a rule that lets the order through where it matters."""
    model = filled(lambda: Net(
        lambda net, x: net.b(net.a(x).cumsum(-1)), a=nn.Linear(12, 16), b=nn.Linear(16, 8)
    )).train()  # fmt: skip
    was = copy.deepcopy(model)
    x = torch.randn(3, 12).double()
    report = permute(model, x, steps=20)
    assert report[1].skipped.endswith("they pass an op that may mix them (cumsum)")
    monkeypatch.setitem(channels.RULES, "cumsum", channels.same)
    with pytest.raises(RuntimeError, match="output 0 of 1 is not what it was: it differs by up to"):
        permute(model, x, steps=20)
    unchanged(model, was)


def test_an_interrupted_search_puts_everything_back(monkeypatch):
    model = filled(mlp).train()
    was = copy.deepcopy(model)
    searches = iter([search_permutation])

    def interrupted(*args, **kwargs):
        return next(searches, stop)(*args, **kwargs)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[permute.__module__], "search_permutation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        permute(model, torch.randn(3, 12).double(), steps=20)
    unchanged(model, was)


def test_random_outputs_are_compared_at_one_seed():
    model = filled(lambda: Net(
        lambda net, x: net.b(F.relu(net.a(x))) + torch.rand(4).double(),
        a=nn.Linear(12, 16), b=nn.Linear(16, 4),
    ))  # fmt: skip
    x = torch.randn(3, 12).double()
    state = torch.get_rng_state()
    report = permute(model, x, steps=20)
    assert not report[1].skipped
    assert torch.equal(state, torch.get_rng_state())


# ---- the benchmark ----


def test_the_benchmark_writes_its_table(tmp_path, monkeypatch):
    path = tmp_path / "table.md"
    options = ["--budgets", "0.2", "--seeds", "2", "--scale-budgets", "--out", str(path)]
    monkeypatch.setattr(sys, "argv", ["permutation", *options])
    threads = torch.get_num_threads()
    try:
        assert benchmark.main() == 0
    finally:
        torch.set_num_threads(threads)
    text = path.read_text()
    for cell in (
        "| 4083.169 |",
        "| 2852.377 | 0.0 |",
        "| sparsekern, 0.2 s |",
        "| 35.5 | 0.013 s |",
    ):
        assert cell in text


def test_the_benchmark_insists_on_the_matrix(monkeypatch):
    monkeypatch.setattr(benchmark, "the_matrix", lambda: torch.rand(128, 64))
    with pytest.raises(RuntimeError, match="not the matrix"):
        benchmark.anchor([0.1], 1)
