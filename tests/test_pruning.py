"""Patterns, masks that hold, and prune()."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekern as sk
from sparsekern import pruning
from sparsekern.pruning import NM, Density, Quality, Transposable, parse
from sparsekern.pruning.patterns import matrix, unmatrix

# ---- patterns ----


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", NM(2, 4)),
        ("1:4", NM(1, 4)),
        ("4:8", NM(4, 8)),
        ("2:4-transposable", Transposable()),
        ("density=0.08", Density(0.08)),
        ("quality=1.2", Quality(1.2)),
    ],
)
def test_a_pattern_is_written_as_it_is_read(text, pattern):
    assert parse(text) == pattern
    assert str(pattern) == text
    assert parse(pattern) is pattern


@pytest.mark.parametrize(
    "text",
    ["", "4:2", "4:4", "0:4", "2-4", "2:4 ", "density", "density=2", "density=x", "density=nan",
     "quality=-1", "quality=inf"],
)  # fmt: skip
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(ValueError, match=r"pattern"):
        parse(text)


def test_two_of_four_by_hand():
    scores = torch.tensor([[1.0, 3, 2, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 5]])
    want = [[0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1]]
    assert NM(2, 4).mask(scores).int().tolist() == want


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (3, 4), (2, 8), (4, 8), (2, 4)])
def test_every_group_keeps_its_n_best(n, m):
    scores = torch.rand(8, 4 * m)
    mask = NM(n, m).mask(scores)
    groups, kept = scores.view(-1, m), mask.view(-1, m)
    assert (kept.sum(1) == n).all()
    worst = torch.where(kept, groups, 2.0).min(1).values
    best_dropped = torch.where(kept, -1.0, groups).max(1).values
    assert (worst >= best_dropped).all()


def test_nan_counts_as_largest_and_ties_go_to_the_lower_index():
    scores = torch.tensor([[1.0, float("nan"), 2, 3, 0, 0, 0, 0]])
    assert NM(1, 4).mask(scores).int().tolist() == [[0, 1, 0, 0, 1, 0, 0, 0]]
    assert NM(3, 8).mask(scores).int().tolist() == [[0, 1, 1, 1, 0, 0, 0, 0]]
    assert Density(0.5).mask(scores).int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]


def test_the_general_pattern_and_the_op_agree_on_two_of_four():
    scores = torch.randint(0, 3, (64, 64)).float()  # full of ties
    groups = scores.view(64, 16, 4)
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., :2]
    general = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).view(64, 64)
    op = NM(2, 4).mask(scores)
    assert torch.equal(general & (scores > 0), op & (scores > 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_transposable_is_two_of_four_both_ways_whatever_is_zero(dtype):
    scores = torch.randint(0, 2, (16, 24)).to(dtype)
    mask = Transposable().mask(scores)
    assert (mask.view(16, 6, 4).sum(2) == 2).all()
    assert (mask.T.reshape(24, 4, 4).sum(2) == 2).all()


def test_density_keeps_that_share():
    scores = torch.rand(37, 53)
    for density in (0.0, 0.08, 0.5, 1.0):
        mask = Density(density).mask(scores)
        assert mask.sum() == round(density * scores.numel())
        if 0 < density < 1:
            assert scores[mask].min() > scores[~mask].max()


def test_quality_is_a_threshold_in_standard_deviations():
    weight = torch.randn(200, 200)
    mask = Quality(1.0).mask(weight.abs())
    threshold = weight.square().mean().sqrt()
    assert torch.equal(mask, weight.abs() > threshold)
    assert abs(mask.float().mean() - 0.3173) < 0.02  # of a normal distribution
    # What is zero already has no say in the deviation.
    sparse = torch.where(mask, weight, 0)
    alive = sparse[sparse != 0].square().mean().sqrt()
    assert Quality(1.0).threshold(sparse.abs()) == pytest.approx(alive.item(), rel=1e-6)
    assert not Quality(3.0).mask(torch.zeros(4, 4)).any()


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3), (6, 8, 3, 5), (2, 4, 2, 3, 2)])
def test_groups_of_a_convolution_run_along_its_input_channels(shape):
    weight = torch.randn(shape)
    rows = matrix(weight)
    assert rows.shape == (weight.numel() // shape[1], shape[1])
    assert torch.equal(unmatrix(rows, weight.shape), weight)
    column = weight.movedim(1, 0).reshape(shape[1], -1)[:, 0]
    assert torch.equal(rows[0], column)


# ---- masks ----


def net():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10))


def steps(model, optimizer, n=3):
    for _ in range(n):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_pattern_holds_under_any_optimizer_made_at_any_time(name, made):
    model = net()
    if made == "before":
        optimizer = OPTIMIZERS[name](model.parameters())
        steps(model, optimizer)  # momentum from dense steps
    pruning.prune(model)
    if made == "after":
        optimizer = OPTIMIZERS[name](model.parameters())
    before = model[0].weight.detach().clone()
    steps(model, optimizer)
    after = model[0].weight.detach()
    assert torch.equal(after != 0, before != 0)
    assert not torch.equal(after, before)
    assert sk.is_24(after)


def test_gradients_reach_only_what_is_kept():
    model = net()
    pruning.prune(model)
    model(torch.randn(8, 16)).square().mean().backward()
    held = pruning.mask_of(model[0])
    grad = model[0].parametrizations.weight.original.grad
    assert not grad[~held.mask].any()
    assert grad[held.mask].any()


def test_infinities_that_are_dropped_do_not_become_nans():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2, 3, 4]]))
    pruning.hold(model[0], torch.tensor([[True, True, False, False]]))
    with torch.no_grad():
        model[0].parametrizations.weight.original[0, 3] = float("inf")
    assert model(torch.ones(1, 4)).item() == 3.0


def test_masks_are_in_the_state_dict_and_in_copies():
    model = net()
    pruning.prune(model)
    x = torch.randn(4, 16)
    other = net()
    pruning.prune(other)
    other.load_state_dict(model.state_dict())
    for copied in (copy.deepcopy(model), other):
        assert torch.equal(copied(x), model(x))
        for a, b in zip(pruning.masks(copied), pruning.masks(model), strict=True):
            assert (a.name, a.parameter) == (b.name, b.parameter)
            assert torch.equal(a.mask, b.mask)
    # A copy is a copy, although torch gives both the class that has the property.
    second = copy.deepcopy(model)
    pruning.hold(second[0], torch.zeros(32, dtype=torch.bool), "bias")
    assert not second[0].bias.any()
    pruning.finalize(second)
    assert torch.equal(copied(x), model(x))
    pruning.hold(other[0], torch.zeros(32, 16, dtype=torch.bool))
    assert pruning.mask_of(model[0]).mask.any()


def test_masks_move_and_change_dtype_with_the_model():
    model = net()
    pruning.prune(model)
    model.to(torch.bfloat16)
    assert model[0].weight.dtype is torch.bfloat16
    assert pruning.mask_of(model[0]).mask.dtype is torch.bool
    model.to("meta")
    assert pruning.mask_of(model[0]).mask.is_meta


def test_compiled_models_keep_the_pattern():
    model = net()
    pruning.prune(model)
    x = torch.randn(4, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


def test_distributed_data_parallel_trains_a_pruned_model(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = net()
        pruning.prune(model)
        before = [h.mask.clone() for h in pruning.masks(model)]
        parallel = nn.parallel.DistributedDataParallel(model)
        steps(parallel, torch.optim.AdamW(parallel.parameters(), lr=0.1))
        assert all(
            torch.equal(a, h.mask) for a, h in zip(before, pruning.masks(model), strict=True)
        )
        assert sk.is_24(model[0].weight.detach())
    finally:
        dist.destroy_process_group()


def test_finalize_leaves_zeros_and_the_keys_of_before():
    model = net()
    keys = list(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    pruning.prune(model)
    x = torch.randn(4, 16)
    want = model(x)
    assert pruning.finalize(model) is model
    assert sorted(model.state_dict()) == sorted(keys)
    assert sorted(id(p) for p in model.parameters()) == sorted(parameters)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(x), want)
    assert sk.is_24(model[0].weight.detach())
    assert pickle.loads(pickle.dumps(model)).state_dict().keys() == model.state_dict().keys()
    assert list(pruning.masks(model)) == []


def test_sparsify_packs_what_is_two_of_four_and_leaves_the_model():
    model = nn.Sequential(nn.Linear(18, 32), nn.ReLU(), nn.Linear(32, 10), nn.Linear(10, 3))
    pruning.prune(model, {"2": "2:4", "0": "density=0.9"})
    x = torch.randn(4, 18)
    packed, _ = pruning.sparsify(model)
    assert [type(m).__name__ for m in packed] == ["Linear", "ReLU", "SparseLinear", "Linear"]
    assert torch.allclose(packed(x), model(x), atol=1e-5)
    assert len(list(pruning.masks(model))) == 2


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(32, 16), TypeError, "hold: mask must be torch.bool, got torch.float32"),
        (torch.ones(16, 32, dtype=torch.bool), ValueError, r"hold: mask must have the shape of weight, \(32, 16\)"),
    ],
)  # fmt: skip
def test_hold_refuses_what_is_no_mask(mask, error, message):
    with pytest.raises(error, match=message):
        pruning.hold(net()[0], mask)


def test_other_parametrizations_are_not_dropped_with_the_mask():
    model = net()
    nn.utils.parametrizations.weight_norm(model[0])
    pruning.prune(model)
    assert sk.is_24(model[0].weight.detach())
    with pytest.raises(ValueError, match=r"finalize: 0.weight has other parametrizations"):
        pruning.finalize(model)


# ---- prune ----


class Digits(nn.Module):
    """Every kind of layer the rule meets."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.conv2 = nn.Conv2d(8, 16, 3)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.fc1 = nn.Linear(30, 20)
        self.fc2 = nn.Linear(20, 12)
        self.tied = nn.Linear(20, 12)
        self.tied.weight = self.fc2.weight


def test_layers_that_do_not_fit_stay_dense_with_the_reason():
    report = {
        layer.name: layer
        for layer in pruning.prune(Digits(), "2:4", lambda layer, name: name != "x")
    }
    assert {name: layer.skipped for name, layer in report.items()} == {
        "conv1": "1 input features are no multiple of 4",
        "conv2": "",
        "depthwise": "1 input features are no multiple of 4",
        "fc1": "30 input features are no multiple of 4",
        "fc2": "",
        "tied": "shares its weight with fc2",
    }
    assert report["conv2"].density == 0.5
    assert 0.65 < report["fc2"].kept < 0.85
    assert report["fc1"].density == 1.0
    assert "fc1" in str(pruning.prune(Digits()))


def test_a_layer_tied_to_an_embedding_stays_dense_whichever_comes_first():
    for names in (("embedding", "head"), ("head", "embedding")):
        made = {"embedding": nn.Embedding(16, 8), "head": nn.Linear(8, 16, bias=False)}
        made["head"].weight = made["embedding"].weight
        model = nn.ModuleDict({name: made[name] for name in names})
        (layer,) = pruning.prune(model)
        assert layer.skipped == "shares its weight with embedding"
        assert list(pruning.masks(model)) == []


def test_a_convolution_is_two_of_four_along_its_input_channels():
    conv = nn.Sequential(nn.Conv2d(8, 16, 3))
    dense = conv[0].weight.detach().clone()
    pruning.prune(conv)
    rows = matrix(conv[0].weight.detach())
    assert sk.is_24(rows.contiguous())
    assert torch.equal(rows, sk.prune_24(matrix(dense).contiguous()))
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(conv(x), F.conv2d(x, conv[0].weight, conv[0].bias))


def test_survivors_survive_and_iterations_only_take_away():
    model = net()
    dense = model[0].weight.detach().clone()
    pruning.prune(model, "density=0.5")
    half = pruning.mask_of(model[0]).mask.clone()
    assert torch.equal(model[0].weight.detach()[half], dense[half])
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
    pruning.prune(model, "density=0.2")
    fifth = pruning.mask_of(model[0]).mask
    assert not (fifth & ~half).any()
    assert fifth.sum() == round(0.2 * dense.numel())
    report = pruning.prune(model, "density=0.9")  # never brings anything back
    assert torch.equal(pruning.mask_of(model[0]).mask, fifth)
    assert report[0].kept == 1.0


def test_another_score_decides():
    model = net()
    pruning.prune(
        model,
        "2:4",
        score=lambda weight, name: torch.arange(weight.numel()).view_as(weight).float(),
    )
    assert torch.equal(
        pruning.mask_of(model[0]).mask[0, :4], torch.tensor([False, False, True, True])
    )


def test_a_mapping_prunes_what_it_names():
    model = net()
    report = pruning.prune(model, {"2": "1:4"})
    assert [layer.skipped for layer in report] == ["not named by the pattern", ""]
    with pytest.raises(ValueError, match=r"prune: pattern names 7; the model has 0, 2"):
        pruning.prune(model, {"7": "2:4"})


def test_attention_heads_in_packed_projections_keep_working():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    pruning.prune(model)
    x = torch.randn(2, 5, 16)
    model(x).sum().backward()
    with torch.no_grad():
        assert torch.isfinite(model.eval()(x)).all()
