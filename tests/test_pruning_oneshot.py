"""One-shot pruning: small answers by hand, SparseGPT against least squares, blocks one by one, nothing left behind."""

from __future__ import annotations

import copy
import types
import weakref

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern import pruning
from sparsekern.offload.nets import transformer
from sparsekern.pruning import oneshot, prune_oneshot
from sparsekern.pruning.patterns import matrix

METHODS = ["magnitude", "wanda", "sparsegpt"]


pytestmark = pytest.mark.usefixtures("module_on_one_thread")


def linear(weight, dtype=torch.float32):
    weight = torch.as_tensor(weight, dtype=dtype)
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    return model


def correlated(rows, K, dtype=torch.float32):
    """Inputs that share a few directions, with features of very different size."""
    common = torch.randn(rows, 4, dtype=dtype) @ torch.randn(4, K, dtype=dtype)
    return (common + 0.3 * torch.randn(rows, K, dtype=dtype)) * torch.rand(K, dtype=dtype)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---- wanda ----

# Norms of the inputs: 1, 2, 3, 4, 5, 6, 0, 1.
TWO_ROWS = torch.tensor([[1.0, 0, 3, 0, 5, 6, 0, 1], [0, 2, 0, 4, 0, 0, 0, 0]])


def test_wanda_by_hand():
    model = linear([[5, 2, 1, 1, 1, 1, 9, 7], [1, 1, -1, -1, 4, -3, 2, 1]])
    report = prune_oneshot(model, [TWO_ROWS], "wanda", "2:4")
    # Scores: 5 4 3 4 | 5 6 0 7 and 1 2 3 4 | 20 18 0 1. A tie keeps the lower index.
    assert model[0].weight.tolist() == [[5, 2, 0, 0, 0, 1, 0, 7], [0, 0, -1, -1, 4, -3, 0, 0]]
    assert report[0].density == 0.5
    assert report[0].kept == pytest.approx((15 + 9) / (27 + 14))


def test_wanda_counts_batches_together():
    model = linear([[5, 2, 1, 1, 1, 1, 9, 7]])
    together = copy.deepcopy(model)
    prune_oneshot(model, TWO_ROWS.split(1))
    prune_oneshot(together, [TWO_ROWS])
    assert torch.equal(model[0].weight, together[0].weight)
    one = linear([[5, 2, 1, 1, 1, 1, 9, 7]])
    prune_oneshot(one, TWO_ROWS[:1])  # features 1 and 3 are zero there
    assert one[0].weight.tolist() == [[5, 0, 1, 0, 0, 1, 0, 7]]


def test_wanda_compares_within_a_row():
    weight = torch.rand(6, 8) + 0.1
    weight[0] *= 100
    model = linear(weight)
    prune_oneshot(model, [torch.eye(8)], "wanda", "density=0.25")
    assert (model[0].weight != 0).sum(1).tolist() == [2] * 6
    by_layer = linear(weight)
    prune_oneshot(by_layer, [torch.eye(8)], "magnitude", "density=0.25")
    assert (by_layer[0].weight[0] != 0).all()
    for density, kept in ((0.0, 0), (1.0, 48)):
        model = linear(weight)
        prune_oneshot(model, [torch.eye(8)], "wanda", f"density={density}")
        assert model[0].weight.count_nonzero() == kept


@pytest.mark.parametrize("groups", [1, 2])
def test_wanda_takes_the_norm_of_an_input_channel(groups):
    model = nn.Sequential(nn.Conv2d(8, 4, 3, groups=groups))
    x = torch.randn(2, 8, 5, 5) * torch.arange(8.0).view(8, 1, 1)
    dense = model[0].weight.detach().clone()
    prune_oneshot(model, [x], "wanda", "2:4")
    norms = [x[:, c].norm().item() for c in range(8)]
    for o in range(4):
        first = o // (4 // groups) * (8 // groups)
        for c in range(0, 8 // groups, 4):
            scores = torch.stack(
                [dense[o, c + i].abs() * norms[first + c + i] for i in range(4)]
            )  # [4, 3, 3]
            kept = torch.zeros(4, 3, 3, dtype=torch.bool).scatter_(0, scores.topk(2, 0).indices, 1)
            assert torch.equal(model[0].weight[o, c : c + 4] != 0, kept)
    assert sk.is_24(matrix(model[0].weight.detach()).contiguous())


# ---- sparsegpt ----


def test_one_dropped_column_moves_the_others_to_the_least_squares_solution():
    torch.manual_seed(0)
    X = correlated(64, 8, torch.float64)
    weight = torch.randn(3, 8, dtype=torch.float64)
    weight[:, 0] = 1e-3  # what goes
    model = linear(weight, torch.float64)
    prune_oneshot(model, [X], "sparsegpt", "7:8", percdamp=1e-12)
    want = torch.linalg.lstsq(X[:, 1:], X @ weight.T).solution.T
    assert not model[0].weight[:, 0].any()
    torch.testing.assert_close(model[0].weight[:, 1:].detach(), want, rtol=1e-7, atol=1e-9)


def obs(weight, X, n, m, percdamp):
    """Optimal brain surgery as it is written, an inverse per column."""
    W, H = weight.clone(), 2 * X.T @ X
    H = H + percdamp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    K = len(H)
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(K)]
    mask = torch.ones_like(W, dtype=torch.bool)
    for j in range(K):
        if j % m == 0:
            size = torch.stack([inverses[i][0, 0] for i in range(j, j + m)])
            scores = W[:, j : j + m].square() / size
            mask[:, j : j + m].scatter_(1, scores.topk(m - n, 1, largest=False).indices, False)
        for r in range(len(W)):
            if not mask[r, j]:
                W[r, j:] -= W[r, j] / inverses[j][0, 0] * inverses[j][0]
                W[r, j] = 0
    return W


@pytest.mark.parametrize("blocksize", [4, 8, 16, 128])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4)])
def test_sparsegpt_is_optimal_brain_surgery_column_by_column(n, m, blocksize):
    torch.manual_seed(1)
    X, weight = correlated(80, 20, torch.float64), torch.randn(6, 20, dtype=torch.float64)
    model = linear(weight, torch.float64)
    prune_oneshot(model, [X], "sparsegpt", f"{n}:{m}", blocksize=blocksize)
    torch.testing.assert_close(model[0].weight.detach(), obs(weight, X, n, m, 0.01))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "density=0.5", "2:4-transposable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparsegpt_leaves_the_smallest_error(pattern, dtype):
    torch.manual_seed(2)
    X, weight = correlated(256, 64).to(dtype), torch.randn(32, 64).to(dtype)
    errors = {}
    for method in METHODS:
        model = linear(weight, dtype)
        report = prune_oneshot(model, [X], method, pattern)
        assert (report[0].pattern, report[0].density) == (pattern, 0.5)
        assert model[0].weight.dtype is dtype
        off = X.double() @ (model[0].weight.double() - weight.double()).T
        errors[method] = off.norm().item()
    assert errors["sparsegpt"] < 0.8 * errors["wanda"]
    assert errors["wanda"] < errors["magnitude"]


def test_inputs_that_are_always_zero_go_first_and_what_stays_of_them_is_zero():
    X = torch.randn(32, 8)
    X[:, [1, 4, 5, 6]] = 0
    weight = torch.full((2, 8), 1.0)
    weight[:, 1] = 100
    model = linear(weight)
    prune_oneshot(model, [X], "sparsegpt", "2:4")
    W = model[0].weight.detach()
    assert W.isfinite().all()
    assert not W[:, [1, 4, 5, 6]].any()
    assert W[:, 7].all()
    silent = linear(weight)
    prune_oneshot(silent, [torch.zeros(4, 8)], "sparsegpt", "2:4")
    assert not silent[0].weight.any()


def test_fewer_rows_than_features_are_enough():
    model = linear(torch.randn(8, 64))
    prune_oneshot(model, [torch.randn(3, 64)], "sparsegpt", percdamp=1e-10)
    assert model[0].weight.isfinite().all()
    assert sk.is_24(model[0].weight.detach())


def test_more_damping_is_tried_and_then_refused():
    alive = torch.zeros(4, dtype=torch.bool)
    H = torch.diag(torch.tensor([1.0, 1, 1, -0.05]))  # needs more than 0.01 of its mean
    U = oneshot._factor(H, alive, 0.01, "fc")
    damped = H + 0.1 * H.diagonal().mean() * torch.eye(4)
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(damped))
    with pytest.raises(ValueError, match=r"the Hessian of fc has no Cholesky factor at percdamp"):
        oneshot._factor(-torch.eye(4), alive, 0.01, "fc")


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_inputs_that_are_not_finite_are_refused(method):
    with pytest.raises(ValueError, match=r"the inputs of 0 have infinities or NaNs"):
        prune_oneshot(linear(torch.ones(2, 4)), [torch.tensor([[1.0, 2, float("nan"), 4]])], method)


# ---- blocks ----


def language_model():
    torch.manual_seed(3)
    return transformer(size=16, symbols=20, width=16, layers=3, heads=2)


def tokens(n=3):
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(20, (2, 16), generator=generator) for _ in range(n)]


class Skips(nn.Module):
    """Blocks that do not only feed one another: the second gets what the first got, too."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        a = self.layers[0](x)
        return self.layers[2](self.layers[1](a + x))


def test_each_block_is_fed_by_the_pruned_ones_before():
    model = language_model()
    want, inputs = copy.deepcopy(model), tokens()
    prune_oneshot(model, inputs, "wanda")
    blocks, x = want.blocks, []
    with torch.no_grad():
        for batch in inputs:
            x.append(want.symbol(batch) + want.place(torch.arange(16)))
        for block in blocks:
            dense = copy.deepcopy(block)
            seen = {}
            for name, layer in dense.named_modules():
                if isinstance(layer, nn.Linear):
                    layer.register_forward_pre_hook(
                        lambda _, args, into=seen, name=name: into.setdefault(name, []).append(
                            args[0]
                        )
                    )
            for batch in x:
                dense(batch)
            for name, fed in seen.items():
                layer = block.get_submodule(name)
                norms = torch.cat(fed).flatten(0, 1).norm(dim=0)
                mask = pruning.NM(2, 4).mask(layer.weight.abs() * norms)
                layer.weight.mul_(mask)
            x = [block(batch) for batch in x]
    for layer in ("attention.qkv", "attention.proj", "up", "down"):
        for pruned, by_hand in zip(model.blocks, blocks, strict=True):
            pruned, by_hand = pruned.get_submodule(layer), by_hand.get_submodule(layer)
            assert torch.equal(pruned.weight, by_hand.weight)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("store", [None, "cpu"])
def test_a_chain_gives_what_running_the_whole_model_gives(method, store, monkeypatch):
    chained, whole = language_model(), language_model()
    prune_oneshot(chained, tokens(), method, store=store)
    monkeypatch.setattr(oneshot, "_is_chain", lambda *_: False)
    prune_oneshot(whole, tokens(), method)
    for a, b in zip(chained.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_chain_runs_a_block_twice_per_batch_and_once_to_know():
    model, calls = language_model(), []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    prune_oneshot(model, tokens(3), "wanda")
    # The first three are the probe; the first block is reached three times more, and stops there.
    assert calls[:3] == [0, 1, 2]
    assert calls[3:] == [0] * 3 + [0] * 6 + [1] * 6 + [2] * 3


def test_blocks_that_are_no_chain_are_seen():
    x = torch.randn(2, 8)
    assert not oneshot._is_chain(Skips(), list(Skips().layers), x, oneshot.call)
    chain = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    assert oneshot._is_chain(chain, list(chain), x, oneshot.call)
    twice = nn.Sequential(chain[0], chain[1], chain[0])
    assert not oneshot._is_chain(twice, list(chain)[:2], x, oneshot.call)

    class Told(nn.Linear):
        def forward(self, x, place):
            return super().forward(x)

    told = nn.ModuleList(Told(8, 8) for _ in range(3))

    def places(*which):
        return lambda model, x: [x := b(x, place=p) for b, p in zip(model, which, strict=True)]

    one, other = torch.zeros(1), torch.zeros(1)
    for same in ((0, 0, 0), ("a", "a", "a"), (None,) * 3, (one, one, one)):
        assert oneshot._is_chain(told, list(told), x, places(*same))
    for different in ((0, 1, 2), (0, 0, False), (one, one, other), (None, None, one)):
        assert not oneshot._is_chain(told, list(told), x, places(*different))

    class InPlace(nn.Linear):
        def forward(self, x):
            return super().forward(x.add_(1))

    changing = nn.Sequential(InPlace(8, 8), InPlace(8, 8))
    with torch.no_grad():
        assert not oneshot._is_chain(changing, list(changing), x.clone(), oneshot.call)


def test_blocks_that_are_no_chain_are_pruned_one_by_one():
    model, x = Skips(), torch.randn(16, 8)
    by_hand = copy.deepcopy(model)
    report = prune_oneshot(model, [x], "sparsegpt")
    assert [layer.density for layer in report] == [0.5] * 3
    for layer in by_hand.layers:
        fed = []
        hook = layer.register_forward_pre_hook(lambda _, args, fed=fed: fed.append(args[0]))
        with torch.no_grad():
            by_hand(x)
        hook.remove()
        alone = nn.Sequential(layer)
        prune_oneshot(alone, fed, "sparsegpt")
    for a, b in zip(model.layers, by_hand.layers, strict=True):
        torch.testing.assert_close(a.weight, b.weight)


def test_what_blocks_take_besides_goes_with_them():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x, mask, scale):
            return (self.fc(x * mask) * scale, None)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.h = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x, mask):
            for block in self.h:
                x = block(x, mask, scale=2.0)[0]
            return x

    model = Model()
    batch = {"x": torch.randn(4, 8), "mask": (torch.rand(4, 1) > 0.5).float()}
    assert oneshot._is_chain(model, list(model.h), batch, oneshot.call)
    want = copy.deepcopy(model)
    prune_oneshot(model, [batch], "wanda")
    prune_oneshot(want, [batch], "wanda", blocks="")
    assert torch.equal(model.h[0].fc.weight, want.h[0].fc.weight)
    assert not torch.equal(model(**batch), want(**batch))


def test_blocks_are_found_or_named():
    model = language_model()
    assert oneshot._stacks(model, None) == [list(model.blocks)]
    assert oneshot._stacks(model, "blocks") == [list(model.blocks)]
    assert oneshot._stacks(model, ["blocks.1", "scores"]) == [[model.blocks[1]], [model.scores]]
    mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    assert oneshot._stacks(mlp, None) == [[mlp]]
    heads = nn.ModuleList([nn.Linear(64, 2), nn.Linear(64, 2)])  # a list, but not of most weights
    model_with_heads = nn.ModuleDict({"body": nn.Linear(64, 64), "heads": heads})
    assert oneshot._stacks(model_with_heads, None) == [[model_with_heads]]
    with pytest.raises(ValueError, match=r"prune_oneshot: blocks names h; the model has no such"):
        prune_oneshot(model, tokens(), blocks="h")
    report = {layer.name: layer.skipped for layer in prune_oneshot(model, tokens())}
    assert report["scores"] == "outside the blocks"
    assert report["blocks.2.down"] == ""
    report = {
        layer.name: layer.skipped for layer in prune_oneshot(model, tokens(), blocks="scores")
    }
    assert report["scores"] == ""
    assert report["blocks.2.down"] == "outside the blocks"


def test_a_layer_that_is_called_twice_is_fed_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.fc(self.fc(x))

    model, x = Twice(), torch.randn(6, 8)
    with torch.no_grad():
        fed = torch.cat([x, model.fc(x)])
    alone = linear(model.fc.weight.detach())
    prune_oneshot(model, [x])
    prune_oneshot(alone, [fed])
    assert torch.equal(model.fc.weight, alone[0].weight)


# ---- memory ----


def test_one_block_has_hooks_and_statistics(monkeypatch):
    model = language_model()
    alive, most, active = [], [], set()
    hessian = oneshot._hessian

    def watched(total, x):
        result = hessian(total, x)
        if total is None:
            alive.append(weakref.ref(result))
        most.append(sum(ref() is not None for ref in alive))
        own = [bool(hooks(block)) for block in model.blocks]
        active.add(tuple(own))
        return result

    monkeypatch.setattr(oneshot, "_hessian", watched)
    prune_oneshot(model, tokens(), "sparsegpt")
    assert len(alive) == 12
    assert max(most) == 4  # the linear layers of one block
    assert active == {(True, False, False), (False, True, False), (False, False, True)}
    assert not any(ref() is not None for ref in alive)


def test_activations_of_blocks_that_are_done_are_freed():
    model, seen, most = language_model(), [], []

    def watch(block, args, output):
        seen.append(weakref.ref(output))
        most.append(sum(ref() is not None for ref in seen))

    for block in model.blocks:
        block.register_forward_hook(watch)
    prune_oneshot(model, tokens(6), "wanda")
    assert max(most) <= 6 + 2  # one per batch, and the one at hand


# ---- batches, modes, exceptions ----


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x, scale=None):
        return self.fc(x if scale is None else x * scale)


def test_a_batch_is_a_tensor_a_tuple_or_a_mapping():
    x, scale = torch.randn(4, 8), torch.arange(8.0)
    weights = []
    torch.manual_seed(5)
    start = Scaled()
    for batches in (
        [x * scale],
        [(x, scale)],
        [[x, scale]],
        [{"x": x, "scale": scale}],
        (part for part in ((x, scale),)),
        [types.MappingProxyType({"scale": scale, "x": x})],
    ):
        model = copy.deepcopy(start)
        prune_oneshot(model, batches)
        weights.append(model.fc.weight)
    assert all(torch.equal(weights[0], w) for w in weights)
    model = copy.deepcopy(start)
    labelled = [(x * scale, torch.zeros(4))]
    prune_oneshot(model, labelled, forward=lambda model, batch: model(batch[0]))
    assert torch.equal(weights[0], model.fc.weight)


@pytest.mark.parametrize("method", METHODS)
def test_modes_gradients_and_buffers_stay(method):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8))
    model.train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model(torch.randn(4, 8)).sum().backward()
    grads = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    parameters, mean = set(model.parameters()), model[1].running_mean.clone()
    batches = [torch.randn(4, 8) for _ in range(2)]
    state = torch.get_rng_state()
    prune_oneshot(model, batches, method)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model[1].training
    assert all(m.training for m in model[0].modules())
    assert torch.equal(model[1].running_mean, mean)
    assert set(model.parameters()) == parameters
    assert [p for p in parameters if not p.requires_grad] == [model[0].bias]
    assert len(grads) == 5
    assert all(torch.equal(p.grad, grad) for p, grad in grads.items())
    assert hooks(model) == 0
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 9, 14])
def test_exceptions_leave_nothing(method, at):
    model = language_model().train()
    model.config = types.SimpleNamespace(use_cache=True)
    calls, own = [], model.blocks[1].up

    class Stops(nn.GELU):
        def forward(self, x):
            calls.append(None)
            if len(calls) > at:
                raise KeyError("here")
            return super().forward(x)

    for block in model.blocks:
        block.activation = Stops()
    kept = own.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(KeyError, match="here"):
        prune_oneshot(model, tokens(), method)
    assert hooks(model) == 1
    assert model.config.use_cache is True
    assert all(m.training for m in model.modules())
    assert torch.is_grad_enabled()
    kept.remove()


def test_no_cache_of_keys_and_values_meanwhile():
    model, seen = Scaled(), []
    model.config = types.SimpleNamespace(use_cache=True)
    prune_oneshot(
        model,
        [torch.randn(2, 8)],
        forward=lambda m, x: (seen.append(m.config.use_cache), m(x)),
    )
    assert seen == [False]
    assert model.config.use_cache is True


# ---- layers ----


@pytest.mark.parametrize("method", METHODS)
def test_what_was_pruned_stays_pruned(method):
    torch.manual_seed(6)
    model = linear(torch.randn(16, 32))
    mask = torch.rand(16, 32) < 0.6
    mask[0, :4] = torch.tensor([True, False, False, False])
    pruning.hold(model[0], mask)
    with torch.no_grad():
        model[0].parametrizations.weight.original[~mask] = 100.0  # nobody sees it
    prune_oneshot(model, [correlated(64, 32)], method)
    weight = model[0].weight.detach()
    assert not weight[~mask].any()
    assert sk.is_24(weight)
    assert weight[0, :4].count_nonzero() == 1
    assert weight.abs().max() < 50
    assert len(model[0].parametrizations.weight) == 1


def test_layers_that_stay_dense_say_why():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv1d(4, 4, 1),
            "odd": nn.Linear(6, 4),
            "idle": nn.Linear(4, 4),
            "no": nn.Linear(4, 4),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "yes": nn.Linear(4, 4),
        }
    )

    def forward(model, x):
        for name in ("no", "normed", "yes"):
            x = model[name](x)
        model["conv"](x.view(-1, 4, 1))

    report = prune_oneshot(
        model,
        [torch.randn(8, 4)],
        "sparsegpt",
        filter_fn=lambda layer, name: name != "no",
        forward=forward,
    )
    assert {layer.name: layer.skipped for layer in report} == {
        "conv": "sparsegpt takes linear layers",
        "odd": "6 input features are no multiple of 4",
        "idle": "no batch calls it",
        "no": "filter_fn said no",
        "normed": "has another parametrization, so that its weight cannot be moved",
        "yes": "",
    }
    assert [name for name in model if pruning.mask_of(model[name])] == ["yes"]


@pytest.mark.parametrize("method", METHODS)
def test_pruned_models_train_on_and_pack(method):
    model = language_model()
    prune_oneshot(model, tokens(), method)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(tokens()[0]).square().mean().backward()
    optimizer.step()
    packed, _ = pruning.sparsify(model)
    assert isinstance(packed.blocks[0].up, sk.SparseLinear)
    assert sk.is_24(model.blocks[2].down.weight.detach())
    torch.testing.assert_close(packed(tokens()[0]), model(tokens()[0]), rtol=1e-4, atol=1e-5)


def test_magnitude_runs_nothing():
    model, calls = language_model(), []
    model.register_forward_pre_hook(lambda *_: calls.append(None))
    want = copy.deepcopy(model)
    prune_oneshot(model, [], "magnitude")
    pruning.prune(want, filter_fn=lambda layer, name: name != "scores")
    assert calls == []
    for a, b in zip(model.state_dict().values(), want.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.cuda
def test_activations_are_kept_where_they_are_told():
    model = language_model().cuda()
    prune_oneshot(model, [t.cuda() for t in tokens()], "sparsegpt", store="cpu")
    assert sk.is_24(model.blocks[2].down.weight.detach())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "obs"}, "method is 'obs'; it takes one of wanda, sparsegpt, magnitude"),
        ({"pattern": "quality=1"}, "pattern is quality=1; wanda takes N:M, 2:4-transposable and"),
        ({"pattern": "2-4"}, "pattern is '2-4'"),
        ({"percdamp": 0.0}, "percdamp takes a positive number, got 0.0"),
        ({"percdamp": float("nan")}, "percdamp takes a positive number, got nan"),
        ({"blocksize": 6}, "blocksize is 6; it takes a multiple of 4"),
        ({"blocksize": 0, "pattern": "density=0.5"}, "blocksize is 0; it takes a multiple of 1"),
        ({"batches": []}, "batches is empty; it takes at least one"),
    ],
)
def test_arguments_that_are_none_are_refused(arguments, message):
    model = linear(torch.ones(4, 4))
    with pytest.raises(ValueError, match=message):
        prune_oneshot(model, **{"batches": [torch.ones(1, 4)], **arguments})
    assert list(pruning.masks(model)) == []
