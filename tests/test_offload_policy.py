"""What offload_activations does with each tensor, what it remembers of it, and what it says it did."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekern.offload import Stats, codec, policy, stats
from sparsekern.offload.policy import RECHECK, Rates
from sparsekern.offload.streams import Immediate


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Save(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *saved):
        ctx.save_for_backward(*saved)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return (gradient, *[None] * len(ctx.saved_tensors))


class Saver(nn.Module):
    """A module whose forward saves tensors as they are."""

    def forward(self, *saved: Tensor) -> Tensor:
        return Save.apply(torch.zeros(1, requires_grad=True), *saved)


def with_nonzeros(count: int, of: int = 4096, dtype=torch.float32) -> Tensor:
    t = torch.zeros(of, dtype=dtype)
    t[torch.randperm(of)[:count]] = 1.5
    return t


def packed_of(offload) -> list:
    return [ref() for ref in offload._by_index.values()]


# ---- zvc, raw or left alone ----

# Of 4096 floats with n non-zero ones, 512 bytes are the mask, 8 the offset and 4 n the values.


def test_the_numbers_of_one_tensor(offloads):
    offload = offloads("device")
    with offload:
        graph = Saver()(with_nonzeros(1024))
    total = offload.stats.total
    assert total.packed == {"zvc": 1}
    assert (total.seen, total.shared, total.kept) == (1, 0, {})
    assert (total.bytes_before, total.bytes_after) == (16384, 512 + 8 + 4096)
    assert (total.elements, total.nonzeros) == (4096, 1024)
    assert total.ratio == 16384 / 4616
    assert total.density == 0.25
    assert offload.stats.ledger.now == {"plain": 16384, "device": 4616, "host": 0}
    assert offload.stats.modules["Saver"] == total
    del graph


# A ratio of 1.25, 16384 / 13107.2, leaves room for 3146 values.
@pytest.mark.parametrize(
    ("nonzeros", "to", "packed", "kept"),
    [
        (3146, "device", {"zvc": 1}, {}),
        (3147, "device", {}, {"no gain": 1}),
        (3200, "device", {}, {"dense": 1}),
        (3146, "auto", {"zvc": 1}, {}),
        (3200, "auto", {}, {"dense": 1}),
        (3146, "cpu", {"zvc": 1}, {}),
        (3147, "cpu", {"raw": 1}, {}),
        (3200, "cpu", {"raw": 1}, {}),
    ],
)
def test_compressing_has_to_pay(nonzeros, to, packed, kept, offloads):
    offload = offloads(to)
    with offload:
        graph = Saver()(with_nonzeros(nonzeros))
    assert offload.stats.total.packed == packed
    assert offload.stats.total.kept == kept
    del graph


def test_min_ratio(offloads):
    for min_ratio, expected in ((3.5, {"zvc": 1}), (3.6, {"raw": 1})):
        offload = offloads("cpu", min_ratio=min_ratio)
        with offload:
            graph = Saver()(with_nonzeros(1024))  # ratio 3.55
        assert offload.stats.total.packed == expected
    del graph


def test_min_bytes(offloads):
    offload = offloads(min_bytes=400)
    with offload:
        graph = Saver()(torch.rand(99), torch.rand(100), torch.rand(400, dtype=torch.float64)[::8])
    assert offload.stats.total.kept == {"small": 1}
    assert offload.stats.total.packed == {"raw": 2}
    assert offload.stats.ledger.now == {"plain": 396 + 400 + 400, "device": 396, "host": 800}
    del graph


@pytest.mark.parametrize(
    ("low", "high", "dtype", "narrow"),
    [
        (0, 255, torch.int64, torch.uint8),
        (0, 256, torch.int64, torch.int16),
        (-1, 5, torch.int64, torch.int16),
        (-(2**15), 2**15 - 1, torch.int64, torch.int16),
        (0, 2**15, torch.int64, torch.int32),
        (-(2**31), 2**31 - 1, torch.int64, torch.int32),
        (1, 2**31, torch.int64, None),
        (-(2**31) - 1, -1, torch.int64, None),
        (0, 255, torch.int32, torch.uint8),
        (1, 2**15, torch.int32, None),
        (0, 255, torch.int16, torch.uint8),
        (-2, -1, torch.int16, None),
    ],
)
def test_integers_of_small_range_take_fewer_bytes(low, high, dtype, narrow, offloads):
    offload = offloads()
    saved = torch.randint(low, high + 1, (4096,)).to(dtype)
    saved[5], saved[77] = low, high
    want = saved.clone()
    with offload:
        graph = Saver()(saved)
    del saved
    total = offload.stats.total
    assert total.packed == ({"raw": 1} if narrow is None else {"narrow": 1})
    assert total.bytes_after == 4096 * (dtype if narrow is None else narrow).itemsize
    (got,) = graph.grad_fn.saved_tensors
    assert got.dtype is dtype
    assert torch.equal(got, want)


def test_indices_of_max_pooling(offloads):
    """int64 to torch, up to 30 · 30 - 1 here; then 400 · 400, past two bytes."""
    for size, bytes_each in ((30, 2), (400, 4)):
        offload = offloads()
        x = torch.rand(1, 1, size, size, requires_grad=True)
        with offload:
            loss = F.max_pool2d(x * 1, 2).sum()
        total = offload.stats.total
        assert total.packed == {"raw": 1, "narrow": 1}
        pooled = (size // 2) ** 2
        assert total.bytes_after == 4 * size * size + bytes_each * pooled
        loss.backward()


def test_a_range_that_grows_between_steps(offloads):
    """Nothing is lost where a site's memory says that fewer bytes do."""
    offload, saver = offloads(), Saver()
    for high in (100, 1000, 100_000, 2**40, 7):
        saved = torch.arange(1000) * high // 999
        want = saved.clone()
        with offload:
            graph = saver(saved)
        del saved
        assert torch.equal(graph.grad_fn.saved_tensors[0], want)
    assert offload.stats.total.packed == {"narrow": 4, "raw": 1}


def test_booleans_take_a_bit(offloads):
    offload = offloads("device")
    with offload:
        graph = Saver()(torch.rand(64, 64) < 0.9)
    assert offload.stats.total.packed == {"bits": 1}
    assert offload.stats.total.bytes_after == 512 + 8
    del graph


# ---- x and x·x ----


def relu_and_square(offload, scale: float = 1.0):
    x = torch.randn(4096)
    with offload:
        h = x.relu() * scale
        graph = Saver()(h, h * h)
    return graph, packed_of(offload)


@pytest.mark.parametrize("to", ["cpu", "device"])
def test_a_tensor_and_its_square_share_a_mask(to, offloads):
    offload = offloads(to)
    graph, (h, square) = relu_and_square(offload)
    nonzeros = h.nonzeros
    assert square.parts[:2] == h.parts[:2]
    assert offload.stats.total.bytes_after == 512 + 8 + 2 * 4 * nonzeros
    assert offload.stats.ledger.now["plain"] == 2 * 16384
    assert sum(offload.stats.ledger.now.values()) == 2 * 16384 + 512 + 8 + 2 * 4 * nonzeros
    first, second = graph.grad_fn.saved_tensors
    assert torch.equal(second, first * first)
    assert first.count_nonzero() == nonzeros


def test_a_square_that_underflows_has_a_mask_of_its_own(offloads):
    offload = offloads()
    graph, (h, square) = relu_and_square(offload, 1e-22)
    assert 0 < square.nonzeros < h.nonzeros
    assert not set(square.parts) & set(h.parts)
    first, second = graph.grad_fn.saved_tensors
    assert torch.equal(second, first * first)


def test_as_many_zeros_elsewhere_is_another_mask(offloads):
    offload = offloads()
    saved = with_nonzeros(1000), with_nonzeros(1000)
    with offload:
        graph = Saver()(*saved)
    want = [t.clone() for t in saved]
    del saved
    first, second = packed_of(offload)
    assert not set(first.parts) & set(second.parts)
    assert all(map(torch.equal, graph.grad_fn.saved_tensors, want))
    del first, second


def test_the_shared_mask_lives_as_long_as_either(offloads):
    offload = offloads()
    h = torch.randn(4096).relu()
    square = h * h
    with offload:
        first, second = Saver()(h), Saver()(square)
    want = square.clone()
    nonzeros = packed_of(offload)[0].nonzeros
    del h, square, first
    assert offload.stats.ledger.now["host"] == 512 + 8 + 4 * nonzeros
    assert torch.equal(second.grad_fn.saved_tensors[0], want)


# ---- what a site remembers ----


@pytest.fixture
def looks(monkeypatch):
    """How often densities were sampled."""
    counted = Counter()
    density = codec.density

    def counting(*arguments):
        counted["density"] += 1
        return density(*arguments)

    monkeypatch.setattr(codec, "density", counting)
    return counted


@pytest.mark.parametrize("anew", [False, True], ids=["one context", "a context a step"])
def test_density_is_sampled_once_in_a_while(anew, offloads, looks):
    """Also where the context is made anew every step: the model remembers."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Flatten())
    one = offloads("device")
    for step in range(RECHECK + 1):
        with offloads("device") if anew else one:
            loss = model(torch.randn(32, 64)).sum()
        loss.backward()
        # the input and the outputs of both ReLUs
        assert looks["density"] == 3 + 3 * (step == RECHECK)


def test_models_do_not_share_their_memory(offloads, looks):
    for _ in range(2):
        with offloads("device"):
            graph = Saver()(torch.rand(1000))
    assert looks["density"] == 2
    del graph


def test_a_dense_site_is_looked_at_again(offloads):
    offload, saver = offloads("device"), Saver()
    for step in range(2 * RECHECK):
        with offload:
            graph = saver(torch.rand(4096) if step == 0 else with_nonzeros(100))
    assert offload.stats.total.kept == {"dense": RECHECK}
    assert offload.stats.total.packed == {"zvc": RECHECK}
    del graph


def test_a_sparse_site_that_turns_dense(offloads):
    """It is found out by packing, once."""
    offload, saver = offloads("device"), Saver()
    for step in range(6):
        with offload:
            graph = saver(with_nonzeros(100) if step < 3 else torch.rand(4096))
    assert offload.stats.total.packed == {"zvc": 3}
    assert offload.stats.total.kept == {"no gain": 1, "dense": 2}
    del graph


def test_a_site_trusts_the_higher_density():
    site = policy.Site()
    seen = []
    for density in (0.5, 0.1, 0.9, 0.5):
        site.saw(density)
        seen.append(site.density)
    assert seen == pytest.approx([0.5, 0.3, 0.9, 0.7])


def test_sites_are_told_apart(offloads):
    """Two tensors of one module, one of each kind, in turn."""
    offload, saver = offloads("device"), Saver()
    for _ in range(5):
        with offload:
            graph = saver(with_nonzeros(100), torch.rand(4096))
    assert offload.stats.total.packed == {"zvc": 5}
    assert offload.stats.total.kept == {"dense": 5}
    del graph


def test_the_sample_meets_every_part():
    """Zeros in the first half, and not in the second."""
    t = torch.zeros(10_000_000)
    t[5_000_000:] = 1
    assert abs(float(codec.density(t)) - 0.5) < 0.01
    rows = torch.zeros(1000, 4096)
    rows[:, :1024] = 1
    assert abs(float(codec.density(rows.view(-1))) - 0.25) < 0.02


# ---- what a link and a codec cost ----


@pytest.mark.parametrize(
    ("link", "speed", "ratio"),
    [(50, 500, 10 / 9), (50, 100, 2), (50, 50, float("inf")), (50, 40, float("inf"))],
)
def test_the_ratio_from_which_in_place_is_better(link, speed, ratio):
    """A ratio r frees 1 - 1/r of the bytes for 2 / speed, the link frees all for 2 / link."""
    assert Rates(link, speed).in_place_from == pytest.approx(ratio)
    if ratio < float("inf"):
        assert (2 / speed) / (1 - 1 / ratio) == pytest.approx(2 / link)


def test_rates_are_measured():
    rates = policy.measure(Immediate(), torch.device("cpu"), 1 << 20)
    assert 0 < rates.link < 1e13
    assert 0 < rates.codec < 1e13


# ---- statistics ----


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.sparse, self.dense = Saver(), Saver()
        self.weight = nn.Parameter(torch.rand(3, 3))

    def forward(self):
        a = self.sparse(with_nonzeros(1024), torch.arange(512) % 200)
        b = self.dense(torch.rand(4096), torch.ones(3, dtype=torch.bool))
        return a + b + Save.apply(torch.zeros(1, requires_grad=True), self.weight)


@pytest.fixture
def offload(offloads):
    """Two steps of one module that compresses, one that does not, and code outside."""
    offload = offloads("cpu", min_bytes=10)
    model = TwoLayers()
    for _ in range(2):
        with offload:
            loss = model()
            kept = Save.apply(torch.zeros(1, requires_grad=True), torch.rand(2))
        loss.backward()
        del loss, kept
    return offload


def test_numbers_by_module_and_step(offload):
    modules = offload.stats.modules
    assert list(modules) == ["sparse", "dense", "TwoLayers", ""]
    assert modules["sparse"].packed == {"zvc": 2, "narrow": 2}
    assert modules["sparse"].bytes_before == 2 * (16384 + 4096)
    assert modules["sparse"].bytes_after == 2 * (4616 + 512)
    assert modules["sparse"].density == 0.25
    assert modules["dense"].packed == {"raw": 2}
    assert modules["dense"].kept == {"small": 2}
    assert (modules["dense"].ratio, modules["dense"].density) == (1, None)
    assert modules["TwoLayers"].kept == {"param": 2}
    assert modules[""].kept == {"small": 2}
    assert len(offload.stats.steps) == 2
    for step in offload.stats.steps:
        assert list(step) == list(modules)
        assert step["sparse"].bytes_after == 4616 + 512
    total = offload.stats.total
    assert (total.seen, total.shared) == (12, 0)
    assert total.bytes_before == 2 * (16384 + 4096 + 16384)
    # The parameter is not counted; the three booleans and the two floats stay on the device.
    assert offload.stats.peak_bytes["plain"] == 16384 + 4096 + 16384 + 3 + 8
    assert offload.stats.peak_bytes["host"] == 4616 + 512 + 16384
    assert offload.stats.pack_seconds > 0
    assert offload.stats.unpack_seconds > 0
    assert offload.stats.wait_seconds == 0


def test_as_dict(offload):
    found = json.loads(json.dumps(offload.stats.as_dict()))
    assert found["modules"]["sparse"] == {
        "seen": 4,
        "shared": 0,
        "packed": {"zvc": 2, "narrow": 2},
        "kept": {},
        "bytes_before": 40960,
        "bytes_after": 10256,
        "elements": 8192,
        "nonzeros": 2048,
        "ratio": 40960 / 10256,
        "density": 0.25,
    }
    assert found["steps"] == 2
    assert found["peak_bytes"]["plain"] == 36875


def test_table(offload):
    lines = str(offload.stats).splitlines()
    (sparse,) = (line for line in lines if line.strip().startswith("sparse"))
    # Means of the two steps.
    assert " ".join(sparse.split()) == "sparse 2 1 zvc, 1 narrow 0.0 0.0 3.99 25.0%"
    assert any(line.strip().startswith("(no module)") for line in lines)
    (total,) = (line for line in lines if line.strip().startswith("total"))
    assert total.split()[1] == "6"
    assert "Saved at the peak: 0.0 MB without" in " ".join(str(offload.stats).split())


def test_table_of_modules_with_brackets_in_their_names(offloads):
    offload = offloads()
    model = nn.Sequential()
    model.add_module("[bold]a", Saver())
    model.add_module("b[/]", nn.Identity())
    with offload:
        graph = model(torch.rand(100))
    assert "[bold]a" in str(offload.stats)
    del graph


def test_plot(offload, tmp_path):
    figure = offload.stats.plot(tmp_path / "density.png")
    assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")
    density, ratio = figure.axes
    (line,) = density.lines  # of the one module whose density is known
    assert line.get_label() == "sparse"
    assert list(line.get_xdata()) == [1, 2]
    assert list(line.get_ydata()) == [0.25, 0.25]
    assert list(ratio.lines[0].get_ydata()) == pytest.approx([20480 / 5128] * 2)


def test_more_steps_than_are_kept(offloads, monkeypatch):
    """Means are over all, the picture shows the last."""
    monkeypatch.setattr(stats, "STEPS", 5)
    offload, saver = offloads("device"), Saver()
    for _ in range(20):
        with offload:
            graph = saver(with_nonzeros(1024))
    del graph
    (total,) = (
        line for line in str(offload.stats).splitlines() if line.strip().startswith("total")
    )
    assert total.split()[:4] == ["total", "1", "1", "zvc"]
    assert offload.stats.as_dict()["steps"] == 20
    density, _ = offload.stats.plot().axes
    assert list(density.lines[0].get_xdata()) == [16, 17, 18, 19, 20]


def test_nothing_to_show():
    empty = Stats()
    assert empty.total.ratio == 1
    assert empty.total.density is None
    assert "total" in str(empty)
    assert not empty.plot().axes[0].lines


def test_the_curve_of_memory(offloads):
    offload = offloads("device")
    curve = offload.stats.ledger.record()
    with offload:
        graph = Saver()(with_nonzeros(1024))
    del graph
    times = [row[0] for row in curve]
    assert times == sorted(times)
    held = [row[1:] for row in curve]  # plain, device, host
    assert held[0] == held[-1] == (0, 0, 0)
    assert max(plain for plain, _, _ in held) == 16384
    assert (16384, 4616, 0) in held
