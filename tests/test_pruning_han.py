"""Han et al. 2015: rounds, dropout, sensitivity, dead neurons, storage, and trainings that a kill does not cost."""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsekern import pruning
from sparsekern.pruning import CONV, FC, Density, Quality

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # the benchmarks are never installed
nets, training, run, tables, report = (
    importlib.import_module(f"benchmarks.pruning.han.{name}")
    for name in ("nets", "train", "run", "tables", "report")
)


pytestmark = pytest.mark.usefixtures("module_on_one_thread")


def dense_net():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10)
    )


# ---- rounds ----


def test_geometric_densities_by_hand():
    assert pruning.geometric(0.125, 3) == [0.5, 0.25, 0.125]
    assert pruning.geometric(1.0, 2) == [1.0, 1.0]
    found = pruning.geometric(0.08, 4)
    assert found[-1] == 0.08
    assert [b / a for a, b in itertools.pairwise([1.0, *found])] == pytest.approx([0.08**0.25] * 4)


def test_a_plan_takes_what_is_given_and_divides_what_is_not():
    found = pruning.plan(
        {"0": "density=0.25", "2": ["density=0.9", Quality(1.0)], "4": "quality=0.5"}, 2
    )
    assert found == [
        {"0": Density(0.5), "2": Density(0.9), "4": Quality(0.5)},
        {"0": Density(0.25), "2": Quality(1.0), "4": Quality(0.5)},
    ]
    assert pruning.plan("2:4", 1) == [pruning.NM(2, 4)]
    assert pruning.plan("density=0", 1) == [Density(0)]


@pytest.mark.parametrize(
    ("target", "n", "message"),
    [
        ("density=0.5", 0, r"plan: n takes 1 round or more, got 0"),
        ("density=0", 2, r"geometric: density takes more than 0 to 1, got 0"),
        (["density=0.5"], 2, r"plan: 1 patterns for 2 rounds"),
        ({"0": ["density=0.2", "density=0.5"]}, 2, r"plan: 0: densities rise"),
        ("half", 2, r"pattern is 'half'"),
    ],
)
def test_what_is_no_plan_is_refused_before_anything_is_pruned(target, n, message):
    model = dense_net()
    with pytest.raises(ValueError, match=message):
        pruning.rounds(model, target, n)
    assert list(pruning.masks(model)) == []


def test_rounds_go_around_anyones_loop_and_survivors_keep_their_values():
    torch.manual_seed(0)
    model = dense_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    seen = []
    for r in pruning.rounds(model, {"0": "density=0.25", "2": "density=0.5"}, n=2):
        before = model[0].weight.detach().clone()
        seen.append((r.index, r.of, [layer.density for layer in r.report]))
        kept = pruning.mask_of(model[0]).mask
        stored = model[0].parametrizations.weight.original.detach()
        assert torch.equal(before[kept], stored[kept])
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 16)).square().mean().backward()
            optimizer.step()
        assert "round" in str(r)
    assert seen == [(0, 2, [0.5, round(0.5**0.5 * 320) / 320]), (1, 2, [0.25, 0.5])]
    # Gone on from a checkpoint, only the second round is left.
    left = list(pruning.rounds(copy.deepcopy(model), "density=0.25", n=2, start=1))
    assert [r.index for r in left] == [1]
    with pytest.raises(ValueError, match=r"rounds: start takes 0 to n, which is 2, got 3"):
        pruning.rounds(model, "density=0.25", n=2, start=3)


def test_quality_rounds_take_the_deviation_of_what_is_left():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 100))
    densities = [r.report[0].density for r in pruning.rounds(model, "quality=0.5", n=3)]
    assert densities == sorted(set(densities), reverse=True)


# ---- retraining ----


@pytest.mark.parametrize("zeros", [False, True])
def test_a_frozen_kind_stands_still_though_it_has_momentum(zeros):
    torch.manual_seed(0)
    model = conv_net()
    model[4].bias.requires_grad_(False)
    pruning.prune(model, "density=0.5")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)

    def step():
        optimizer.zero_grad(set_to_none=not zeros)
        model(torch.randn(4, 1, 8, 8)).square().mean().backward()
        optimizer.step()

    step()
    wanted = [p.requires_grad for p in model.parameters()]
    for still, moving in ((CONV, FC), (FC, CONV)):
        before = copy.deepcopy(model.state_dict())
        with contextlib.suppress(KeyboardInterrupt), pruning.frozen(model, still):
            step()
            raise KeyboardInterrupt
        assert [p.requires_grad for p in model.parameters()] == wanted
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert {k[0] for k in changed} == {"4" if moving is FC else "0"}
    assert not model[4].bias.requires_grad


def test_l1_is_of_the_survivors_and_of_each_weight_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2], [3, -4]]))
    model[1].weight = model[0].weight
    assert pruning.l1_penalty(model) == 10
    pruning.prune(model[:1], "density=0.5")
    assert pruning.l1_penalty(model[:1]) == 7
    pruning.l1_penalty(model[:1]).backward()
    grad = model[0].parametrizations.weight.original.grad
    assert grad.tolist() == [[0, 0], [1, -1]]
    with pytest.raises(ValueError, match="no linear or convolution layer"):
        pruning.l1_penalty(nn.Sequential(nn.ReLU()))


# ---- dropout ----


def test_equation_2_by_hand():
    # AlexNet's first dense layer, 9 % of 38 M: from 0.5 to 0.15.
    assert pruning.retrain_rate(0.5, 38_000_000, 3_420_000) == pytest.approx(0.15)
    assert pruning.retrain_rate(0.5, 100, 25) == 0.25
    assert pruning.retrain_rate(0.8, 100, 100) == 0.8
    assert pruning.retrain_rate(0.8, 100, 0) == 0
    for wrong in ((1.5, 10, 1), (-0.1, 10, 1), (0.5, 0, 0), (0.5, 10, 11), (math.nan, 10, 1)):
        with pytest.raises(ValueError, match="retrain_rate: takes"):
            pruning.retrain_rate(*wrong)


class Net(nn.Module):
    """Sequences joined by code, and dropouts of every kind of place."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Dropout2d(0.1), nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.2)
        )
        self.classifier = nn.Sequential(
            nn.Dropout(0.3),
            nn.Sequential(nn.Linear(8, 10), nn.ReLU()),
            nn.Dropout(0.5),
            nn.Linear(10, 10),
            nn.Dropout(0.4),
            nn.MultiheadAttention(10, 2),
            nn.Dropout(0.6),
        )


def test_dropouts_find_their_layer_in_sequences_and_say_where_they_do_not():
    model = Net()
    dropouts = pruning.Dropouts(model, {"classifier.0": "features.1"})
    pruning.prune(model, {"features.1": "density=0.25", "classifier.1.0": "density=0.25"})
    for _ in range(2):  # again changes nothing: the rate of before is remembered
        found = {d.name: d for d in dropouts.adjust()}
    rates = {name: (d.follows, pytest.approx(d.rate), d.reason) for name, d in found.items()}
    nothing = "no layer found before it; name it in `follows`"
    assert rates == {
        "features.0": ("", 0.1, nothing),
        "features.4": ("features.1", 0.1, ""),
        "classifier.0": ("features.1", 0.15, ""),
        "classifier.2": ("classifier.1.0", 0.25, ""),
        "classifier.4": ("classifier.3", 0.4, "classifier.3 is not pruned"),
        "classifier.6": ("", 0.6, nothing),
    }
    assert model.classifier[2].p == 0.25
    assert "classifier.2             follows classifier.1.0: 0.5 to 0.25" in str(dropouts.adjust())
    dropouts.restore()
    assert model.classifier[2].p == 0.5


@pytest.mark.parametrize(
    ("follows", "message"),
    [
        ({"classifier.1": "features.1"}, r"follows names 'classifier.1'; the model's dropouts are features.0"),
        ({"classifier.0": "features.2"}, r"follows 'features.2', which is no linear or conv"),
        ({"classifier.0": "nowhere"}, r"follows 'nowhere', which is no linear or conv"),
    ],
)  # fmt: skip
def test_a_mapping_of_what_is_not_there_is_refused(follows, message):
    with pytest.raises(ValueError, match=message):
        pruning.Dropouts(Net(), follows)


# ---- sensitivity ----


@pytest.mark.parametrize("pruned", [False, True])
def test_sensitivity_prunes_one_layer_at_a_time_and_restores_every_bit(pruned):
    torch.manual_seed(0)
    model = nn.Sequential(conv_net(), nn.ReLU(), nn.Linear(10, 4))
    nn.utils.parametrizations.weight_norm(model[2])
    if pruned:
        pruning.prune(model, {"0.4": "density=0.5"})
        with torch.no_grad():  # what is dropped moves unseen, and is restored too
            model[0][4].parametrizations.weight.original.add_(1.0)
    before = copy.deepcopy(model.state_dict())
    counts = []

    def evaluate(m):
        counts.append([int(m[0][0].weight.count_nonzero()), int(m[0][4].weight.count_nonzero())])
        return len(counts)

    result = pruning.sensitivity(model, evaluate, [0.5, 0.25])
    full = 180 if pruned else 360
    assert counts == [[36, full], [18, full], [9, full], [36, 180], [36, 90]]
    assert result.layers == {"0.0": [2, 3], "0.4": [4, 5]}
    assert result.baseline == 1
    assert result.skipped == {"2": "has other parametrizations than its mask"}
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert "left out" in str(result)


def test_sensitivity_restores_when_evaluate_fails():
    model = dense_net()
    before = copy.deepcopy(model.state_dict())

    def evaluate(m):
        if not m[0].weight.all():
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        pruning.sensitivity(model, evaluate, progress=True)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="densities is empty"):
        pruning.sensitivity(model, evaluate, [])
    with pytest.raises(ValueError, match="density takes 0 to 1"):
        pruning.sensitivity(model, evaluate, [2])


def test_sensitivity_plots_a_curve_per_layer():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = pruning.sensitivity(dense_net(), lambda m: 1.0, [1.0, 0.5]).plot()
    assert [line.get_label() for line in axes.lines] == ["0", "2", "none pruned"]


def test_missing_packages_are_named(monkeypatch, tmp_path):
    for package in ("matplotlib.pyplot", "safetensors"):
        monkeypatch.setitem(sys.modules, package, None)
    result = pruning.sensitivity(dense_net(), lambda m: 1.0, [0.5])
    with pytest.raises(ImportError, match="plot needs matplotlib: pip install matplotlib"):
        result.plot()
    with pytest.raises(ImportError, match="save_relative needs safetensors: pip install"):
        pruning.save_relative(dense_net(), tmp_path / "a")
    with pytest.raises(ImportError, match="load_relative needs safetensors: pip install"):
        pruning.load_relative(tmp_path / "a")


# ---- dead neurons ----


def same(model, smaller, *shape):
    """In fp64, equal to rounding."""
    x = torch.randn(5, *shape, dtype=torch.float64)
    want, got = model.eval()(x), smaller.eval()(x)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)


def kill(model, layer, inputs=(), outputs=(), reader=None):
    """Zero the weights into neurons `inputs` of a layer, and what reads neurons `outputs`."""
    with torch.no_grad():
        model[layer].weight[list(inputs)] = 0
        weight = model[reader if reader is not None else layer + 2].weight
        columns = weight.view(weight.shape[0], model[layer].weight.shape[0], -1)
        columns[:, list(outputs)] = 0


def test_dead_neurons_by_hand():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2], [0, 0], [3, 4]]))
        model[0].bias.copy_(torch.tensor([1.0, 5, 1]))
        model[2].weight.copy_(torch.tensor([[1.0, 2, 0], [0, 3, 0]]))
    smaller, report = pruning.remove_dead_neurons(model)
    assert [(d.no_input, d.no_output, d.kept) for d in report] == [([1], [2], []), ([], [], [1])]
    assert smaller[0].weight.tolist() == [[1, 2]]
    assert smaller[0].bias.tolist() == [1]
    assert smaller[2].weight.tolist() == [[1], [0]]
    assert smaller[2].bias.tolist() == [10, 15]
    assert (smaller[2].in_features, model[2].in_features) == (1, 3)
    assert report[1].reason == "nothing is known of what reads the last layer of a sequence"


def test_what_dies_of_a_death_goes_as_well():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid(), nn.Dropout(0.5), nn.Linear(8, 3)
    ).double()
    kill(model, 0, inputs=[1])
    with torch.no_grad():
        model[2].weight[4] = 0
        model[2].weight[4, 1] = 2.0  # its only input is a constant
        model[2].weight[:, 5] = 0
        model[2].weight[6, 5] = 1.0  # what alone reads neuron 5
    kill(model, 2, outputs=[6], reader=5)
    smaller, report = pruning.remove_dead_neurons(model)
    assert [(d.no_input, d.no_output) for d in report] == [([1], [5]), ([4], [6]), ([], [])]
    same(model, smaller, 6)
    assert [(d.no_input, d.no_output) for d in pruning.dead_neurons(model)][:2] == [([1], [5]), ([4], [6])]  # fmt: skip
    again, rest = pruning.remove_dead_neurons(smaller)
    assert sum(d.removed for d in rest) == 0
    assert again[0].out_features == 6


ACTIVATIONS = {"relu": nn.ReLU(inplace=True), "tanh": nn.Tanh(), "gelu": nn.GELU()}


@pytest.mark.parametrize("pool_first", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_convolutions_lose_channels_and_the_flattened_rest_fits(activation, pool_first):
    torch.manual_seed(0)
    act = ACTIVATIONS[activation]
    middle = [nn.BatchNorm2d(6), act, nn.AvgPool2d(2)]
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        *([nn.MaxPool2d(2), act] if pool_first else [act, nn.MaxPool2d(2)]),
        nn.Conv2d(5, 6, 3, bias=False),
        *(reversed(middle[1:]) if pool_first else middle),
        nn.Flatten(),
        nn.Linear(6 * 4, 7),
        nn.BatchNorm1d(7),
        act,
        nn.Linear(7, 3),
    ).double()
    linears = [i for i, m in enumerate(model) if isinstance(m, nn.Linear)]
    for m in model:
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for t in (m.running_mean, m.bias.data):
                t.normal_()
            m.running_var.uniform_(0.5, 2)
    kill(model, 0, inputs=[0, 3], outputs=[2], reader=3)
    kill(model, 3, inputs=[1], outputs=[4], reader=linears[0])
    kill(model, linears[0], inputs=[6], outputs=[0], reader=linears[1])
    smaller, report = pruning.remove_dead_neurons(model)
    assert [(d.no_input, d.no_output) for d in report] == [([0, 3], [2]), ([1], [4]), ([6], [0]), ([], [])]  # fmt: skip
    assert smaller[3].weight.shape == (4, 2, 3, 3)
    same(model, smaller, 2, 12, 12)


@pytest.mark.parametrize("padding_mode", ["zeros", "replicate"])
@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_a_constant_in_front_of_zero_padding_stays(padding_mode, bias):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1, padding_mode=padding_mode)
    ).double()
    kill(model, 0, inputs=[1])
    with torch.no_grad():
        model[0].bias.fill_(bias)
    smaller, report = pruning.remove_dead_neurons(model)
    stays = padding_mode == "zeros" and bias > 0
    assert (report[0].no_input, report[0].kept) == (([], [1]) if stays else ([1], []))
    assert ("pads with zeros" in report[0].reason) == stays
    assert ("1 dead ones stay" in str(report)) == stays
    same(model, smaller, 1, 8, 8)
    kill(model, 0, outputs=[1])  # but if nothing reads it, it goes
    smaller, report = pruning.remove_dead_neurons(model)
    assert report[0].removed == 1
    assert report[0].kept == []
    same(model, smaller, 1, 8, 8)


def test_an_average_over_padding_is_no_constant_even_if_a_shift_makes_it_zero():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.AvgPool2d(3, 1, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)
    ).double()
    kill(model, 0, inputs=[1], reader=3)
    with torch.no_grad():
        model[0].bias.fill_(1.0)
        model[2].running_mean.fill_(1.0)
    smaller, report = pruning.remove_dead_neurons(model)
    assert report[0].kept == [1]
    assert "border" in report[0].reason
    same(model, smaller, 1, 8, 8)
    model[1].count_include_pad = False
    smaller, report = pruning.remove_dead_neurons(model)
    assert report[0].no_input == [1]
    same(model, smaller, 1, 8, 8)


REFUSED = {
    "softmax": (nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 2)), (4,), "not known"),
    "layer norm": (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (4,), "not known"),
    "pool": (
        nn.Sequential(nn.Linear(4, 4), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 2)),
        (4, 4),
        "not known",
    ),
    "groups": (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2)), (4, 3, 3), "groups"),
    "no flatten": (nn.Sequential(nn.Conv2d(1, 4, 1), nn.Linear(4, 2)), (1, 4, 4), "nn.Flatten"),
    "tokens": (nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(12, 2)), (3, 4), "do not make"),
    "last": (nn.Sequential(nn.Linear(4, 4)), (4,), "last layer of a sequence"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_neurons_that_something_mixes_stay_with_the_reason(name):
    model, shape, reason = REFUSED[name]
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        model[0].weight[2] = 0
    smaller, report = pruning.remove_dead_neurons(model)
    assert report[0].kept == [2]
    assert reason in report[0].reason
    same(model, smaller, *shape)


def test_layers_that_stand_in_two_places_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[2] = 0
    smaller, report = pruning.remove_dead_neurons(model)
    assert "two places" in report[0].reason
    same(model, smaller, 4)


def test_a_layer_that_is_all_dead_keeps_one_neuron():
    model = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].weight.zero_()
    smaller, report = pruning.remove_dead_neurons(model)
    assert (report[0].no_input, report[0].kept) == ([1, 2], [0])
    assert "takes one neuron" in report[0].reason
    same(model, smaller, 4)


def test_masks_are_applied_before_the_dead_are_counted():
    torch.manual_seed(0)
    model = dense_net().double()
    mask = torch.ones(32, 16, dtype=torch.bool)
    mask[[3, 30]] = False
    pruning.hold(model[0], mask)
    smaller, report = pruning.remove_dead_neurons(model)
    assert report[0].no_input == [3, 30]
    assert smaller[0].out_features == 30
    assert list(pruning.masks(smaller)) == []
    assert len(list(pruning.masks(model))) == 1
    same(model, smaller, 16)


# ---- storage ----


@pytest.mark.parametrize(
    ("zeros", "gaps"),
    [(0, [0]), (7, [7]), (8, [7, 0]), (9, [7, 1]), (15, [7, 7]), (16, [7, 7, 0]), (20, [7, 7, 4])],
)
def test_a_gap_that_is_too_large_is_bridged_by_fillers(zeros, gaps):
    weight = torch.zeros(zeros + 2)
    weight[zeros] = 5.0
    encoded = pruning.encode_relative(weight, 3)
    number = sum(gap << 3 * i for i, gap in enumerate(gaps))
    assert encoded.gaps.tolist() == list(number.to_bytes(-(-3 * len(gaps) // 8), "little"))
    assert encoded.values.tolist() == [0.0] * (len(gaps) - 1) + [5.0]
    assert torch.equal(pruning.decode_relative(encoded), weight)


@given(
    st.lists(st.sampled_from([0.0, 0.0, 0.0, 1.5, -0.0, math.nan, math.inf]), max_size=80),
    st.integers(1, 8),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_every_bit_comes_back(elements, bits, dtype):
    weight = torch.tensor(elements, dtype=dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]
    again = pruning.decode_relative(pruning.encode_relative(weight, bits))
    assert torch.equal(again.view(integer), weight.view(integer))
    assert again.dtype == dtype


@pytest.mark.parametrize("shape", [(0,), (0, 3), (1, 1), (7, 3), (4, 3, 3, 3)])
def test_every_shape_comes_back(shape):
    for density in (0.0, 0.02, 0.5, 1.0):
        weight = torch.randn(shape) * (torch.rand(shape) < density)
        encoded = pruning.encode_relative(weight, 2)
        assert torch.equal(pruning.decode_relative(encoded), weight)
        strided = weight.flip(0).transpose(0, -1)
        assert torch.equal(pruning.decode_relative(pruning.encode_relative(strided, 5)), strided)


def test_the_encoder_refuses_what_it_cannot_hold():
    with pytest.raises(TypeError, match=r"encode_relative: weight is torch.int8"):
        pruning.encode_relative(torch.zeros(3, dtype=torch.int8), 5)
    for bits in (0, 9):
        with pytest.raises(ValueError, match="bits takes 1 to 8"):
            pruning.encode_relative(torch.zeros(3), bits)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gaps": torch.zeros(2, dtype=torch.uint8)}, ValueError, r"take gaps \(1,\), got \(2,\)"),
        ({"values": torch.ones(1, 1)}, ValueError, r"values \(1, 1\)"),
        ({"values": torch.ones(1, dtype=torch.int32)}, TypeError, "values are torch.int32"),
        ({"gaps": torch.zeros(1, dtype=torch.int8)}, TypeError, "gaps torch.int8"),
        ({"bits": 9}, ValueError, "bits takes 1 to 8, got 9"),
        ({"shape": (5,)}, ValueError, "the last entry is at 5, the weight has 5 elements"),
        ({"gaps": torch.tensor([0xE5], dtype=torch.uint8)}, ValueError, "bits after the last gap"),
        ({"values": torch.zeros(1)}, ValueError, "a zero is stored where no gap is too large"),
        ({"shape": (1 << 60,)}, ValueError, "no room for the shape"),
    ],
)
def test_the_decoder_trusts_nothing(change, error, message):
    encoded = pruning.Relative(torch.ones(1), torch.tensor([5], dtype=torch.uint8), 5, (6,))
    assert pruning.decode_relative(encoded).tolist() == [0, 0, 0, 0, 0, 1]
    with pytest.raises(error, match=message):
        pruning.decode_relative(replace(encoded, **change))


def unpruned_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(200, 50), nn.Linear(50, 4)
    )


def stored_net():
    torch.manual_seed(0)
    model = unpruned_net()
    pruning.prune(model, {"0": "density=0.3", "3": "density=0.05"})
    return model


@pytest.mark.parametrize("finalized", [False, True])
def test_a_file_gives_the_state_back_bit_for_bit(tmp_path, finalized):
    model = stored_net()
    want = pruning.finalize(copy.deepcopy(model))
    path = tmp_path / "pruned.safetensors"
    report = pruning.save_relative(want if finalized else model, path)
    state = pruning.load_relative(path)
    assert {k: v.dtype for k, v in state.items()} == {
        k: v.dtype for k, v in want.state_dict().items()
    }
    assert all(torch.equal(state[k], v) for k, v in want.state_dict().items())
    found = {t.name: t for t in report.tensors}
    weight = found["3.weight"]
    assert (weight.elements, weight.kept, weight.dense_bytes) == (10_000, 500, 40_000)
    assert weight.index_bytes == -(-weight.entries * 5 // 8)
    assert weight.value_bytes == 4 * weight.entries >= 4 * 500
    assert weight.rate == 40_000 / weight.bytes
    conv = found["0.weight"]
    assert (conv.entries, conv.index_bytes) == (conv.kept, conv.kept) == (65, 65)
    assert found["4.weight"].index_bytes == 0
    assert report.file_bytes == path.stat().st_size > sum(t.bytes for t in report.tensors)
    assert "file" in str(report)
    # Retraining goes on where it was.
    again = unpruned_net()
    again.load_state_dict(state)
    pruning.hold(again[3], again[3].weight != 0)
    assert torch.equal(pruning.mask_of(again[3]).mask, pruning.mask_of(model[3]).mask)


def test_bits_can_be_chosen_and_ties_are_stored(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(64, 64) < 0.1)
    report = pruning.save_relative(model, tmp_path / "a", {"linear": 8})
    assert report.tensors[0].index_bytes == report.tensors[0].entries
    assert torch.equal(pruning.load_relative(tmp_path / "a")["1.weight"], model[0].weight)
    with pytest.raises(ValueError, match="bits names fc; it takes linear, conv"):
        pruning.save_relative(model, tmp_path / "a", {"fc": 8})


def rewritten(path, out, tensors=None, metadata=None):
    """The file with some tensors (None takes one out) and metadata replaced."""
    safetensors = importlib.import_module("safetensors")
    save_file = importlib.import_module("safetensors.torch").save_file
    with safetensors.safe_open(path, "pt") as file:
        all_tensors = {k: file.get_tensor(k) for k in file.keys()} | (tensors or {})  # noqa: SIM118
        all_metadata = file.metadata() | (metadata or {})
    save_file({k: v for k, v in all_tensors.items() if v is not None}, out, all_metadata)
    return out


def encodings(**change):
    entry = {"bits": 5, "shape": [50, 200]} | change
    return {"relative": json.dumps({"3.weight": entry})}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {"format": "other"}, "the format of .* is 'other'"),
        ({}, {"relative": "{"}, "metadata"),
        ({}, {"relative": "[1]"}, "metadata"),
        ({}, {"relative": "[" * 100_000}, "metadata"),
        ({}, encodings(shape="x"), "metadata"),
        ({}, encodings(shape=[-1, -10_000]), "metadata"),
        ({}, encodings(shape=[True, 10_000]), "metadata"),
        ({}, encodings(shape=[1 << 40, 1 << 40]), "metadata"),
        ({}, encodings(bits="5"), "metadata"),
        ({}, encodings(bits=4), "3.weight .* take gaps"),
        ({}, encodings(bits=-5), "3.weight .* bits takes 1 to 8"),
        ({}, encodings(shape=[50, 2]), "3.weight .* the weight has 100 elements"),
        ({"3.weight.gaps": None}, {}, "has no '3.weight.gaps'"),
        ({"3.weight.values": None}, {}, "has no '3.weight.values'"),
        ({"3.weight.values": torch.ones(3)}, {}, "take gaps"),
        ({"3.weight": torch.ones(3)}, {}, "has 3.weight twice"),
    ],
)
def test_a_changed_file_is_refused(tmp_path, tensors, metadata, message):
    pruning.save_relative(stored_net(), tmp_path / "a")
    changed = rewritten(tmp_path / "a", tmp_path / "b", tensors, metadata)
    with pytest.raises(ValueError, match=message):
        pruning.load_relative(changed)


def test_a_broken_file_is_refused_wherever_it_breaks(tmp_path):
    path = tmp_path / "a"
    pruning.save_relative(stored_net(), path)
    whole = path.read_bytes()
    for length in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is no safetensors file"):
            pruning.load_relative(path)
    want = sum(v.numel() for v in stored_net().state_dict().values())
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(whole), (300,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 0x41
        path.write_bytes(damaged)
        try:  # a damaged value is a value: nothing else may come of it than a state or a ValueError
            state = pruning.load_relative(path)
        except ValueError:
            continue
        assert sum(v.numel() for v in state.values()) <= want
    with pytest.raises(FileNotFoundError):
        pruning.load_relative(tmp_path / "none")


# ---- the trainings ----


def tiny_net():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(108, 10)
    )


def tiny_images(n=24):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(n, 1, 8, 8, generator=generator), torch.arange(n) % 10
    return training.Images(x, y, x, y)


TINY = training.Plan(
    "tiny",
    3,
    (
        training.Stage("dense", 2, 0.1, l1=1e-3),
        training.Stage("round 1, fc", 2, 0.05, {"4": "density=0.3"}, "conv"),
        training.Stage("round 1, conv", 1, 0.05, {"0": "density=0.5"}, "fc"),
    ),
    batch=8,
)


def trained(path, plan=TINY, start=None):
    return list(training.train(plan, tiny_net, tiny_images(), path, start))[-1]


def equal(a, b):
    """Bit for bit, whatever they hold; what a clock says apart."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_a_killed_training_ends_in_the_same_bits(tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole.pt")
    assert [r["stage"] for r in whole.records] == ["dense", "round 1, fc", "round 1, conv"]
    step, left = training.F.cross_entropy, [0]

    def counted(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(training.F, "cross_entropy", counted)
    for killed_at in range(1, 16):  # five epochs of three steps
        path = tmp_path / f"{killed_at}.pt"
        left[0] = killed_at
        with pytest.raises(KeyboardInterrupt):
            trained(path)
        path.with_suffix(".part").write_bytes(b"cut off")
        torch.manual_seed(killed_at)  # another process, another state
        assert equal(vars(trained(path)), vars(whole))
    assert equal(vars(training.State.load(tmp_path / "7.pt", TINY)), vars(whole))
    # One that is done is only read.
    left[0] = 1
    assert equal(vars(trained(tmp_path / "whole.pt")), vars(whole))


def test_the_order_of_images_and_the_seed_decide(tmp_path):
    other = trained(tmp_path / "a.pt", replace(TINY, seed=4))
    assert not equal(other.model, trained(tmp_path / "b.pt").model)


def test_a_curve_begins_with_the_net_of_another_training(tmp_path):
    dense = trained(tmp_path / "a.pt").models["dense"]
    plan = training.Plan("curve", 0, (training.Stage("0.1", 1, 0.0, {"4": "density=0.1"}),))
    state = trained(tmp_path / "b.pt", plan, dense)
    mask = state.model["4.parametrizations.weight.0.mask"]
    assert torch.equal(mask, Density(0.1).mask(dense["4.weight"].abs()))
    assert torch.equal(state.model["4.parametrizations.weight.original"], dense["4.weight"])
    assert state.records[0]["density"] == pytest.approx((27 + 108) / (27 + 1080))


def test_frozen_kinds_and_pruned_weights_stand_still(tmp_path):
    state = trained(tmp_path / "a.pt")
    dense, fc, conv = (state.models[s.name] for s in TINY.stages)
    assert torch.equal(fc["0.weight"], dense["0.weight"])
    original = "4.parametrizations.weight.original"
    assert not torch.equal(fc[original], dense["4.weight"])
    assert torch.equal(conv[original], fc[original])
    assert not torch.equal(conv["0.parametrizations.weight.original"], fc["0.weight"])
    assert [round(r["density"], 2) for r in state.records] == [1.0, 0.32, 0.31]


def test_other_settings_and_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    trained(path)
    with pytest.raises(ValueError, match="is of other settings"):
        training.State.load(path, replace(TINY, batch=4))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is no checkpoint of this"):
        training.State.load(path, TINY)


# ---- the nets and the tables ----


def test_both_nets_reach_a_twelfth_with_the_papers_sizes():
    for net in nets.NETS.values():
        model = net.build()
        weights = [model.get_submodule(layer.module).weight.numel() for layer in net.layers]
        alive = sum(round(n * layer.density) for n, layer in zip(weights, net.layers, strict=True))
        biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
        assert (sum(weights) + biases) / (alive + biases) >= 12.0
        for n, layer in zip(weights, net.layers, strict=True):
            assert layer.density <= (layer.paper.kept + 0.5) / 100
            assert 2 * n * layer.places == pytest.approx(layer.paper.flop, rel=0.02)
        assert model(net.inputs(torch.rand(2, 784))).shape == (2, 10)


def test_the_papers_tables_add_up_as_ours_do():
    """Act% of a total is by outputs after pooling, FLOP% by FLOP; a layer's is its Weights% by the Act% before."""
    outputs = {"lenet-300-100": (300, 100, 10), "lenet-5": (20 * 144, 50 * 16, 500, 10)}
    for net in nets.NETS.values():
        papers, counts = [layer.paper for layer in net.layers], outputs[net.name]
        act = sum(p.act * n for p, n in zip(papers, counts, strict=True)) / sum(counts)
        assert act == pytest.approx(net.total.act, abs=0.5)
        flop = sum(p.flop for p in papers)
        kept = sum(p.flop_kept * p.flop for p in papers) / flop
        assert kept == pytest.approx(net.total.flop_kept, abs=0.5)
        for before, layer in itertools.pairwise(papers):
            assert layer.kept * before.act / 100 == pytest.approx(layer.flop_kept, abs=2.5)


def test_rows_of_a_table_by_hand():
    layer = nets.NETS["lenet-300-100"].layers[0]
    net = replace(
        nets.NETS["lenet-300-100"],
        layers=(replace(layer, module="0", output="1"), replace(layer, module="2", output="2")),
    )
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, 0]]))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[1.0, 0, 0, 0]]))
        model[2].bias.fill_(1.0)
    first, second, total = tables.rows(net, model, torch.tensor([[1.0, 2], [1, 0]]))
    assert (first.weights, first.flop, first.kept, first.flop_kept) == (8, 16, 3 / 8, 3 / 8)
    assert first.act == 3 / 8  # of the eight outputs 1, 0, 2, 0 and 1, 0, 0, 0
    assert (second.act, second.kept, second.flop_kept) == (1.0, 1 / 4, 3 / 32)
    assert (total.weights, total.flop, total.kept) == (12, 24, 4 / 12)
    assert total.act == pytest.approx((3 / 8 * 4 + 1) / 5)
    assert total.flop_kept == pytest.approx((16 * 3 / 8 + 8 * 3 / 32) / 24)


def test_mean_and_deviation():
    assert report.spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert report.spread([1.5]) == "1.50"
    assert report.percent([0.01, 0.02], "{:.1f}") == "1.5 ± 0.7"


def test_rounds_of_lenet_5_take_turns():
    found = nets.stages(nets.NETS["lenet-5"])
    assert [(s.name, s.frozen, sorted(s.prune)) for s in found[:3]] == [
        ("dense", "", []),
        ("round 1, fc", "conv", ["7", "9"]),
        ("round 1, conv", "fc", ["0", "3"]),
    ]
    assert found[5].prune["7"] == "density=0.077"
    assert [(s.name, s.frozen, dict(s.prune)) for s in found[7:]] == [
        ("again, fc", "conv", {}),
        ("again, conv", "fc", {}),
        ("last, fc", "conv", {}),
        ("last, conv", "fc", {}),
    ]
    assert {s.rate for s in found[1:7]} == {found[0].rate / 10}


def started(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["", *map(str, arguments)])
    return run.main()


def test_the_command_stops_goes_on_and_writes_its_report(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, work = tmp_path / "table.md", tmp_path / "work"
    arguments = ("--synthetic", "--quick", "--seeds", 1, "--work", work, "--out", out)
    epochs, left = training._epoch, [3]

    def stopped(*given):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        epochs(*given)

    monkeypatch.setattr(training, "_epoch", stopped)
    assert started(monkeypatch, *arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not out.exists()
    assert started(monkeypatch, *arguments) == 0
    assert left[0] == 3 - 3 - (22 - 2)  # of 22 epochs two were done, and the third began again
    text = out.read_text()
    for words in ("made-up images", "Quick", "Table 2: LeNet-300-100", "Table 3: LeNet-5", "12.2x"):
        assert words in text
    for name in ("mask", "curves", "sensitivity"):
        assert f"(table-{name}.png)" in text
        assert 0 < (tmp_path / f"table-{name}.png").stat().st_size < 150_000
    assert len(json.loads(out.with_suffix(".json").read_text())["measured"]) == 2
    assert "nan" not in text


@pytest.mark.data
def test_mnist_in_quick_form(monkeypatch, tmp_path, mnist_path):
    """A thousand real digits, five epochs a stage: pruned to a twelfth and retrained, most are still known."""
    arguments = ["", "--quick", "--data", str(mnist_path.parent), "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    net = nets.NETS["lenet-300-100"]
    images = run.images(net, run.digits(run.parsed()))
    stages = tuple(replace(stage, epochs=5, rate=0.05) for stage in nets.stages(net))
    plan = training.Plan("quick", 0, stages, batch=32)
    *_, state = training.train(plan, net.build, images, tmp_path / "quick.pt")
    dense, last = state.records[0], state.records[-1]
    assert last["density"] == pytest.approx(0.0807, abs=1e-3)
    assert dense["error"] < 0.2
    assert last["error"] < 0.2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere"], "there is no mnist.npz"),
        (["--synthetic", "--seeds", "0"], "--seeds is 0; it takes numbers from 1 on"),
        (["--synthetic", "--threads", "0"], "--threads is 0; it takes numbers from 1 on"),
        (["--synthetic", "--out", "nowhere/table.md"], "there is no such folder"),
    ],
)
def test_what_cannot_be_is_refused(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["", *arguments])
    with pytest.raises(SystemExit) as exit_:
        run.parsed()
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err
