"""Training with masks that follow the weights: gradients by hand, every pattern, every way a model is used."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import sparsekern as sk
from sparsekern import pruning
from sparsekern.pruning import Transposable
from sparsekern.pruning.patterns import matrix

PATTERNS = ["2:4", "1:4", "4:8", "2:4-transposable", "density=0.25", "quality=0.8"]


pytestmark = pytest.mark.usefixtures("module_on_one_thread")


def net():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def steps(model, optimizer, n=3):
    for _ in range(n):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()


def original(layer):
    return layer.parametrizations.weight.original


# ---- the gradient ----


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_gradient_by_hand(decay):
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -4, 3, 2]]))
    pruning.straight_through(model, "2:4", decay)
    x = torch.tensor([[10.0, 20, 30, 40]])
    y = model(x)
    assert y.item() == -4 * 20 + 3 * 30
    y.sum().backward()
    # Of the dropped, 1 and 2, the decay is added; the loss reaches all.
    assert original(model[0]).grad.tolist() == [[10 + decay * 1, 20, 30, 40 + decay * 2]]


def test_what_is_dropped_comes_back_when_it_grows():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 4, 3, 2]]))
    pruning.straight_through(model, "2:4")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.tensor([[-5.0, 0, 0, 0]])).sum().backward()
    optimizer.step()
    assert model[0].weight.tolist() == [[6, 4, 0, 0]]
    assert original(model[0]).tolist() == [[6, 4, 3, 2]]


def test_the_decay_draws_what_is_dropped_to_zero_and_nothing_else():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 4, 3, 2]]))
    pruning.straight_through(model, "2:4", decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.zeros(1, 4)).sum().backward()
        optimizer.step()
    assert original(model[0]).tolist() == [[0.25, 4, 3, 0.5]]


def test_infinities_that_are_dropped_stay_away():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[float("inf"), float("inf"), float("inf"), 1.0]]))
    pruning.straight_through(model, "2:4")
    assert model[0].weight.tolist() == [[float("inf"), float("inf"), 0, 0]]


# ---- patterns and layers ----


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_step_has_the_pattern_of_the_weight_as_it_is_then(pattern, dtype):
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).to(dtype)
    report = pruning.straight_through(model, pattern, decay=2e-4)
    assert [layer.pattern for layer in report] == [pattern] * 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    seen = []
    for _ in range(3):
        dense = original(model[0]).detach().clone()
        want = pruning.parse(pattern).mask(dense.abs())
        assert torch.equal(model[0].weight.detach(), torch.where(want, dense, 0))
        seen.append(want)
        optimizer.zero_grad()
        model(torch.randn(8, 16, dtype=dtype)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(seen[0], seen[-1])


def test_a_convolution_is_two_of_four_along_its_input_channels():
    model = nn.Sequential(nn.Conv2d(8, 16, 3))
    pruning.straight_through(model)
    model(torch.randn(2, 8, 6, 6)).sum().backward()
    assert sk.is_24(matrix(model[0].weight.detach()).contiguous())
    assert original(model[0]).grad.count_nonzero() == original(model[0]).numel()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_made_before_goes_on(name):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer)
    weight = model[0].weight
    pruning.straight_through(model, decay=2e-4)
    assert original(model[0]) is weight
    before = weight.detach().clone()
    steps(model, optimizer)
    assert not torch.equal(before, weight)
    assert sk.is_24(model[0].weight.detach())


def test_layers_that_stay_as_they_are_say_why():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    pruning.hold(model[1], torch.ones(8, 8, dtype=torch.bool))
    nn.utils.parametrizations.weight_norm(model[2])
    report = pruning.straight_through(model, "2:4", filter_fn=lambda layer, name: name != "3")
    assert [layer.skipped for layer in report] == [
        "6 input features are no multiple of 4",
        "holds a mask",
        "has another parametrization",
        "filter_fn said no",
    ]


def test_another_call_changes_the_pattern():
    model = net()
    pruning.straight_through(model, "2:4", decay=1.0)
    report = pruning.straight_through(model, "1:4")
    assert [layer.density for layer in report] == [0.25, 0.25]
    assert len(model[0].parametrizations.weight) == 1
    assert model[0].weight.count_nonzero() == 16 * 32 // 4
    assert model[0].parametrizations.weight[0].decay == 0


@pytest.mark.parametrize("decay", [-1e-4, float("nan"), float("inf")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=r"straight_through: decay takes a finite number from 0"):
        pruning.straight_through(net(), "2:4", decay)


# ---- the ways a model is used ----


def test_the_state_dict_holds_the_dense_weight():
    model, other = net(), net()
    keys = [k.replace("weight", "parametrizations.weight.original") for k in model.state_dict()]
    dense = model[0].weight.detach().clone()
    pruning.straight_through(model)
    assert sorted(model.state_dict()) == sorted(keys)
    assert torch.equal(model.state_dict()["0.parametrizations.weight.original"], dense)
    pruning.straight_through(other)
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 16)
    assert torch.equal(other(x), model(x))


def test_copies_are_copies():
    model = net()
    pruning.straight_through(model, decay=2e-4)
    x = torch.randn(4, 16)
    want = model(x)
    copied = copy.deepcopy(model)
    steps(copied, torch.optim.SGD(copied.parameters(), lr=0.5))
    assert torch.equal(model(x), want)
    pruning.finalize(pruning.freeze_masks(copied))
    assert torch.equal(model(x), want)
    assert type(copied[0]) is nn.Linear
    # The class that has a parametrized bias is its copies' too, until one of them gets more.
    biased = net()
    pruning.hold(biased[0], torch.ones(32, dtype=torch.bool), "bias")
    want = biased(x)
    pruning.straight_through(copy.deepcopy(biased))
    assert torch.equal(biased(x), want)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "2:4-transposable", "density=0.25"])
def test_a_compiled_model_trains_as_the_plain_one(pattern):
    model = net()
    pruning.straight_through(model, pattern, decay=0.1)
    x, grads = torch.randn(4, 16), []
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for m in (model, compiled):
        model.zero_grad()
        y = m(x)
        y.square().mean().backward()
        grads.append((y.detach(), original(model[0]).grad.clone()))
    torch.testing.assert_close(grads[0], grads[1])


def test_distributed_data_parallel_trains_it(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = net()
        pruning.straight_through(model, decay=2e-4)
        alone = copy.deepcopy(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        x = torch.randn(8, 16)
        for m in (parallel, alone):
            optimizer = torch.optim.AdamW(m.parameters(), lr=0.1)
            m(x).square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(original(model[0]), original(alone[0]))
        assert sk.is_24(model[0].weight.detach())
    finally:
        dist.destroy_process_group()


# ---- masks that stay ----


@pytest.mark.parametrize("pattern", PATTERNS)
def test_frozen_masks_are_those_of_now_and_stay(pattern):
    model = net()
    pruning.straight_through(model, pattern, decay=2e-4)
    steps(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    x = torch.randn(4, 16)
    want, parameters = model(x), list(map(id, model.parameters()))
    assert pruning.freeze_masks(model) is model
    assert torch.equal(model(x), want)
    assert [id(p) for p in model.parameters()] == parameters
    before = [held.mask.clone() for held in pruning.masks(model)]
    assert len(before) == 2
    steps(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    for mask, held in zip(before, pruning.masks(model), strict=True):
        assert torch.equal(mask, held.mask)
        assert not original(held.module).grad[~mask].any()


def test_frozen_models_are_finalized_and_packed():
    model = net()
    keys = list(model.state_dict())
    pruning.straight_through(model)
    steps(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    x = torch.randn(4, 16)
    want = model(x)
    pruning.freeze_masks(model)
    packed, _ = pruning.sparsify(model)
    assert [type(m).__name__ for m in packed] == ["SparseLinear", "ReLU", "SparseLinear"]
    torch.testing.assert_close(packed(x), want)
    pruning.finalize(model)
    assert sorted(model.state_dict()) == sorted(keys)
    assert not parametrize.is_parametrized(model[0])
    assert torch.equal(model(x), want)


# ---- the transposable optimum ----

TILES = [
    torch.tensor(rows)
    for rows in itertools.product(
        [[int(i in kept) for i in range(4)] for kept in itertools.combinations(range(4), 2)],
        repeat=4,
    )
]
TILES = torch.stack([t for t in TILES if (t.sum(0) == 2).all()]).bool()


def best(tile):
    """The largest sum that one of the 90 masks keeps, every mask tried."""
    return (TILES * tile.double()).sum((1, 2)).max().item()


def test_ninety_masks_are_two_of_four_both_ways():
    assert len(TILES) == 90


@pytest.mark.parametrize("draw", ["random", "tied"])
def test_transposable_is_the_optimum_of_every_tile(draw):
    torch.manual_seed(0)
    scores = torch.rand(32, 48) if draw == "random" else torch.randint(0, 3, (32, 48)).float()
    mask = Transposable().mask(scores)
    for row, column in itertools.product(range(0, 32, 4), range(0, 48, 4)):
        tile = scores[row : row + 4, column : column + 4]
        kept = mask[row : row + 4, column : column + 4]
        assert (kept == TILES).all((1, 2)).any()
        assert tile.double()[kept].sum().item() == pytest.approx(best(tile), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=16, max_size=16))
def test_transposable_is_the_optimum_of_any_tile(values):
    tile = torch.tensor(values).view(4, 4).float()
    kept = Transposable().mask(tile)
    assert (kept == TILES).all((1, 2)).any()
    assert tile[kept].sum().item() == best(tile)
