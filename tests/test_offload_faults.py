"""What goes wrong around offload_activations: a clear error or the declared retreat, nothing lost, nothing kept."""

from __future__ import annotations

import gc
import re
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekern as sk
from sparsekern.offload import codec, context, names, policy
from sparsekern.offload.host import SLAB, HostPool
from sparsekern.offload.streams import Immediate
from sparsekern.offload.transfer import Room, Transfer

FULL = "host bytes are at max_host_bytes: what comes stays on the device"
NO_MEMORY = "the host has no memory left: what comes stays on the device"


class Model(nn.Module):
    """Saves something for each codec: sparse and dense floats, max-pool's indices, a mask of booleans."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.linear = nn.Linear(8 * 15 * 15, 64)
        self.out = nn.Linear(64, 10)
        self.fail = lambda x: x

    def forward(self, x):
        h = F.max_pool2d(self.conv(x).relu(), 2).flatten(1)
        h = self.linear(h)
        h = self.fail(h)
        h = h.masked_fill(torch.rand(h.shape) < 0.5, 0)
        return self.out(h.sigmoid()).square().sum()


CODECS = {"zvc", "raw", "narrow", "bits"}


def batch() -> torch.Tensor:
    return torch.randn(8, 3, 32, 32)


def gradients(offload=None, model=None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Model() if model is None else model
    model.zero_grad()
    if offload is None:
        loss = model(batch())
    else:
        with offload:
            loss = model(batch())
    loss.backward()
    return [p.grad for p in model.parameters()]


def check(offload) -> None:
    assert all(map(torch.equal, gradients(offload), gradients()))


@pytest.fixture(autouse=True)
def _repeatable(one_thread):
    torch.manual_seed(0)


def test_the_model_needs_every_codec(offloads):
    offload = offloads()
    check(offload)
    assert set(offload.stats.total.packed) == CODECS
    assert not offload.stats.retreats


# ---- no memory on the host ----


@pytest.mark.parametrize("cap", [0, 100, 30_000, 200_000])
def test_max_host_bytes(cap, offloads):
    """What does not fit stays on the device; it is said once and counted."""
    offload = offloads(max_host_bytes=cap)
    with pytest.warns(RuntimeWarning, match=re.escape(f"offload_activations: {FULL}")) as warned:
        list(map(check, [offload, offload]))
    assert len(warned) == 1
    assert set(offload.stats.retreats) == {FULL}
    assert offload.stats.retreats[FULL] >= 2
    peak = offload.stats.peak_bytes
    assert peak["host"] <= cap
    assert peak["device"] + peak["host"] >= offload.stats.total.bytes_after / 2  # of two steps
    assert FULL in " ".join(str(offload.stats).split())


def test_max_host_bytes_is_of_what_is_held_now(offloads):
    """Room that was given back is used again."""
    offload = offloads()
    check(offload)
    enough = offloads(max_host_bytes=offload.stats.peak_bytes["host"])
    for _ in range(3):
        check(enough)
    assert not enough.stats.retreats


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
@pytest.mark.parametrize("granted", [0, 1, 3])
def test_the_machine_has_no_memory(granted, error, offloads):
    """Of the first slabs of all sizes, `granted` are; then it refuses."""
    left = [granted]

    def allocate(nbytes):
        if not left[0] or nbytes == SLAB:
            raise error("no memory")
        left[0] -= 1
        return torch.empty(nbytes, dtype=torch.uint8)

    streams = Immediate()
    pool = HostPool(streams.pin, streams.unpin, allocate)
    with context.transfers(cpu=Transfer(streams, pool)):
        offload = offloads()
        with pytest.warns(RuntimeWarning, match=NO_MEMORY):
            check(offload)
        assert set(offload.stats.retreats) == {NO_MEMORY}
        assert (pool.reserved > 0) == (granted > 0)
        offloads.nothing_left()


# ---- errors of others, on the way ----


class Stop(Exception):
    pass


def stop(*_, **__):
    raise Stop


def test_forward_that_fails(offloads):
    offload = offloads()
    model = Model()
    model.fail = stop
    with pytest.raises(Stop):
        gradients(offload, model)
    offloads.nothing_left()
    assert not names._active
    check(offload)
    assert set(offload.stats.modules) == {"Model", "conv", "linear", "out"}


def test_forward_that_fails_and_goes_on(offloads):
    """Caught inside the context: what was saved before serves, and the names are right after it."""
    offload = offloads()
    model = Model()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.other = model, nn.Linear(3, 5)

        def forward(self, x):
            self.inner.fail = stop
            with pytest.raises(Stop):
                self.inner(x)
            self.inner.fail = lambda x: x
            return self.inner(x) + self.other(x.mean((2, 3))).relu().sum()

    with offload:
        loss = Outer()(batch())
    loss.backward()
    assert set(offload.stats.modules) <= {
        *("Outer", "inner", "inner.conv", "inner.linear", "inner.out", "other")
    }
    assert offload.stats.modules["other"].seen


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise Stop


@pytest.mark.parametrize("to", ["cpu", "device"])
def test_backward_that_fails(to, offloads):
    offload = offloads(to)
    model = Model()
    model.fail = Fails.apply
    with pytest.raises(Stop):
        gradients(offload, model)
    torch.zeros(1, requires_grad=True).sum().backward()  # until then torch holds what was ready
    gc.collect()
    offloads.nothing_left()
    check(offload)


@pytest.mark.parametrize(
    "owner", [codec, policy, Transfer, Room, HostPool, Immediate], ids=lambda o: o.__name__
)
def test_interrupted_anywhere(owner, offloads, monkeypatch):
    """Control-C in each function that packing or unpacking calls, at its first and at a later call."""
    functions = {
        codec: ["begin", "finish", "narrow_type", "density", "decode"],
        policy: ["sites_of"],
        Transfer: ["out", "back", "use", "ask", "now"],
        Room: ["empty", "part"],
        HostPool: ["take", "shrink"],
        Immediate: ["copy", "record"],
    }[owner]
    for name in functions:
        original = getattr(owner, name)
        for after in (0, 2):
            calls = [0]

            def interrupted(*args, original=original, calls=calls, after=after, **kwargs):
                calls[0] += 1
                if calls[0] == after + 1:
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            offload = offloads()
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, interrupted)
                try:
                    gradients(offload)
                except KeyboardInterrupt:
                    pass
                else:
                    assert calls[0] <= after, f"{name} was called {calls[0]} times"
            assert calls[0], name
            torch.zeros(1, requires_grad=True).sum().backward()
            gc.collect()
            offloads.nothing_left()
            check(offload)


# ---- packed objects that were tampered with ----


def tampered(change, to: str, offloads, saved: torch.Tensor) -> None:
    """Saves one tensor, changes its parts, and reads it back."""
    offload = offloads(to)
    with offload:
        graph = Save.apply(torch.zeros(1, requires_grad=True), saved)
    del saved
    (packed,) = (ref() for ref in offload._by_index.values())
    change([part.here() for part in packed.parts], packed)
    graph.grad_fn.saved_tensors  # noqa: B018


class Save(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, saved):
        ctx.save_for_backward(saved)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def flip(i: int, index: int = 0):
    def change(parts, packed):
        parts[i].view(torch.uint8)[index] ^= 0xFF

    return change


def shorten(i: int):
    def change(parts, packed):
        part = packed.parts[i]
        part._placed = replace(part._placed, tensor=part._placed.tensor[:-1])

    return change


def sparse() -> torch.Tensor:
    return torch.randn(10_000) * (torch.arange(10_000) % 3 == 0)


@pytest.mark.parametrize("to", ["cpu", "device"])
@pytest.mark.parametrize(
    ("saved", "change", "message"),
    [
        (sparse, flip(0), "mask marks"),
        (sparse, flip(1, 8), "offsets"),
        (sparse, flip(1, 23), "offsets"),
        (lambda: sparse() != 0, flip(0), "mask marks"),
        (lambda: sparse() != 0, flip(1, 8), "offsets"),
    ],
    ids=["zvc's mask", "zvc's offset", "zvc's offset, negative", "bits' mask", "bits' offset"],
)
def test_corrupt_parts_are_found_out(saved, change, message, to, offloads):
    with pytest.raises(ValueError, match=message):
        tampered(change, to, offloads, saved())


@pytest.mark.parametrize(
    ("saved", "part", "message"),
    [
        (sparse, 0, "mask"),
        (sparse, 1, "offsets"),
        (sparse, 2, "values"),
        (lambda: sparse() != 0, 0, "mask"),
        (lambda: torch.arange(1000) % 200, 0, "codec narrow holds 999 elements; it takes 1000"),
    ],
    ids=["zvc's mask", "zvc's offsets", "zvc's values", "bits' mask", "narrow"],
)
def test_parts_of_another_size_are_found_out(saved, part, message, offloads):
    with pytest.raises(ValueError, match=message):
        tampered(shorten(part), "device", offloads, saved())


# ---- arguments ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "gpu"}, "to is 'gpu'; it takes one of auto, cpu, device"),
        ({"to": None}, "to is None"),
        ({"min_bytes": -1}, "min_bytes is -1; it takes an int of at least 0"),
        ({"min_bytes": 1.5}, "min_bytes is 1.5"),
        ({"min_bytes": "1 MB"}, "min_bytes is '1 MB'"),
        ({"max_host_bytes": -1}, "max_host_bytes is -1; it takes an int of at least 0"),
        ({"max_host_bytes": 1e9}, "max_host_bytes is 1000000000.0"),
        ({"min_ratio": 1}, "min_ratio is 1; it takes a number above 1"),
        ({"min_ratio": float("nan")}, "min_ratio is nan"),
        ({"min_ratio": "2"}, "min_ratio is '2'"),
        ({"prefetch": -2}, "prefetch is -2; it takes an int of at least 0"),
        ({"keep": [3]}, "keep holds 3; it takes tensors and modules"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(f"offload_activations: {message}")):
        sk.offload_activations(**arguments)


# ---- nothing is kept ----


def activations(model: nn.Module) -> list[weakref.ref]:
    """Fills up, in forward, with the outputs of the model's modules."""
    alive: list[weakref.ref] = []
    for module in model.modules():
        module.register_forward_hook(lambda _, __, output: alive.append(weakref.ref(output)))
    return alive


@pytest.mark.parametrize("to", ["cpu", "device"])
@pytest.mark.parametrize("backward", [False, True])
def test_activations_die_with_the_graph(to, backward, offloads):
    """By reference count, without the garbage collector."""
    offload = offloads(to)
    model = Model()
    alive = activations(model)
    gc.collect()
    gc.disable()
    try:
        with offload:
            loss = model(batch())
        assert offload.stats.ledger.now["plain"] > 0
        if to == "cpu":
            assert all(ref() is None for ref in alive[:-1])  # of the last, the loss is the output
        if backward:
            loss.backward()
        else:
            del loss
        offloads.nothing_left()
        assert all(ref() is None for ref in alive[:-1])
    finally:
        gc.enable()


def test_graphs_in_cycles_are_collected(offloads):
    offload = offloads()
    model = Model()
    with offload:
        cycle = [model(batch())]
    cycle.append(cycle)
    del cycle
    gc.collect()
    offloads.nothing_left()


def test_a_branch_that_backward_never_visits(offloads):
    """Its tensors go with the graph, and do not confuse the next step."""
    offload = offloads()
    model, other = Model(), Model()
    for _ in range(3):
        with offload:
            loss, unused = model(batch()), other(batch())
        loss.backward()
        assert offload.stats.ledger.now["plain"] > 0
        del unused
        offloads.nothing_left()


def test_a_context_that_stays_entered_does_not_grow(offloads, monkeypatch):
    """Outside modules, every saved tensor would be a site of its own."""
    monkeypatch.setattr(names, "SITES", 50)
    offload = offloads()
    x = torch.randn(100, requires_grad=True)
    with offload:
        for _ in range(100):
            (x * 1).relu().square().sum().backward()
    assert offload.stats.total.seen >= 200
    assert len(offload._policy.sites) <= 50


def test_a_storage_that_is_resized(offloads):
    """As those who free activations by hand do."""
    offload = offloads(min_bytes=1 << 30)
    h = torch.randn(1000, requires_grad=True) * 1
    with offload:
        loss = h.square().sum()
    assert offload.stats.ledger.now["plain"] == 4000
    h.untyped_storage().resize_(0)
    del h, loss
    offloads.nothing_left()


def test_warnings_are_shown_as_often_as_ever(offloads):
    """Once for a place in the code. Whoever adds a filter makes Python forget what it has shown."""
    offload = offloads()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for _ in range(5):
            with offload:
                warnings.warn("as ever", UserWarning, stacklevel=1)
    assert len(shown) == 1


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("anew", [False, True], ids=["one context", "a context a step"])
def test_two_hundred_steps_take_no_more_memory(anew, backward, offloads):
    """What twelve of these steps save would show."""
    model = Model()
    offload = offloads()

    def step():
        with sk.offload_activations("cpu", min_bytes=0) if anew else offload:
            loss = model(batch())
        if backward:
            loss.backward()
            model.zero_grad()

    for _ in range(50):
        step()
    assert anew or offload.stats.peak_bytes["plain"] > 400_000
    gc.collect()
    before = resident_bytes()
    for _ in range(200):
        step()
    gc.collect()
    assert resident_bytes() - before < 5_000_000


def test_the_default_cap_does_not_shrink_by_what_the_pool_keeps(monkeypatch):
    """A context made anew every step finds the slabs of the last one in the pool, not in the system."""
    monkeypatch.setattr("sparsekern.offload.available_bytes", lambda: 8 << 20)
    transfer = Transfer(Immediate())
    with context.transfers(cpu=transfer):
        assert sk.offload_activations().stats.ledger.max_host_bytes == 6 << 20
        block = transfer.pool.take(4 << 20)
        used = transfer.pool.used
        got = sk.offload_activations().stats.ledger.max_host_bytes
        assert got == ((8 << 20) + transfer.pool.reserved - used) // 4 * 3
        transfer.pool.give(block)
