"""Offloading on a device with streams: the same gradients whatever order its copies come in, and no races.

The device is that of ``late_streams``. Scenarios are run on it over many seeds; then mistakes are planted in
the ordering, and each has to be found.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
import threading
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from late_streams import LateStreams, late
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import sparsekern as sk
from sparsekern.offload import host, policy
from sparsekern.offload.context import WARM, Packed
from sparsekern.offload.host import Block as HostBlock
from sparsekern.offload.host import HostPool
from sparsekern.offload.streams import Accelerator
from sparsekern.offload.transfer import Answer, Part, Transfer

TO = ("cpu", "device", "auto")
SEEDS = (0, 1, 2, 3, 4, 6)


def ahead(seed: int) -> int:
    """Bytes that may wait for their copies: with some seeds half a step of `mlp`, with some none."""
    return (4096, 0)[seed // 4 % 2]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """Such that `auto` compresses in place from a ratio of 2 on."""
    monkeypatch.setattr(policy, "_rates", lambda streams, device: policy.Rates(1e9, 2e9))


class Block(nn.Module):
    """A transformer block with squared ReLU, and a mask and dropout in it."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = (q @ k.mT).masked_fill(
            torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), -1e9
        )
        x = x + self.out(scores.softmax(-1) @ v)
        h = F.relu(self.up(x) - 1)
        return x + F.dropout(self.down(h * h), 0.2)


def mlp():
    return (
        nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)),
        torch.randn(16, 32),
    )


def conv():
    return (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 36, 10),
        ),
        torch.randn(4, 3, 12, 12),
    )


def block():
    return nn.Sequential(Block(16), nn.Linear(16, 8)), torch.randn(2, 12, 16)


NETS = {f.__name__: f for f in (mlp, conv, block)}


class Run:
    """A net, its input, what to do around its forward passes, and the streams it runs on."""

    def __init__(self, net, streams: LateStreams, offload=None):
        torch.manual_seed(1)
        self.model, self.x = NETS[net]()
        self.streams = streams
        self.offload = contextlib.nullcontext() if offload is None else offload

    def forward(self, x=None, **outside):
        torch.manual_seed(2)  # for dropout
        with self.offload:
            return self.model(self.x if x is None else x).square().mean()

    def grads(self):
        grads = []
        for p in self.model.parameters():
            if p.grad is not None:
                self.streams.used_on(p.grad, self.streams.current())
                grads.append(p.grad.clone())
        self.model.zero_grad()
        return grads


# ---- scenarios: each gives tensors that must not depend on the offload ----


def training(run: Run):
    sgd = torch.optim.SGD(run.model.parameters(), lr=0.1)
    grads = []
    for _ in range(3):
        run.forward().backward()
        sgd.step()
        grads += run.grads()
    return grads + list(run.model.parameters())


def retain_graph(run: Run):
    loss = run.forward()
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    first = run.grads()
    loss.backward()
    return first + run.grads()


def double_backward(run: Run):
    x = run.x.clone().requires_grad_()
    with run.offload:
        (g,) = torch.autograd.grad(run.model(x).square().mean(), x, create_graph=True)
        g.square().sum().backward()
    return [x.grad, *run.grads()]


def two_forwards(run: Run):
    first = run.forward()
    second = run.forward(run.x * 0.5)
    (first + second).backward()
    third, fourth = run.forward(), run.forward(run.x - 1)
    third.backward()
    fourth.backward()
    return run.grads()


def dropped(run: Run):
    for _ in range(2):
        loss = run.forward()
        del loss
    return training(run)


def forward_error(run: Run):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    for _ in range(2):
        handle = run.model[-1].register_forward_pre_hook(stop)
        with contextlib.suppress(Stop):
            run.forward()
        handle.remove()
    return training(run)


def backward_error(run: Run):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    handle = run.model[0].register_full_backward_hook(stop)
    with contextlib.suppress(Stop):
        run.forward().backward()
    handle.remove()
    run.model.zero_grad()
    return training(run)


def other_stream(run: Run):
    """Forward on one stream, backward on another, and the other way round."""
    s = run.streams
    a, b = s.stream("a"), s.stream("b")
    grads = []
    for forward, backward in ((a, b), (b, a), (a, s.main)):
        s.order(forward, s.main)
        with s.on(forward):
            loss = run.forward()
        s.order(backward, forward)
        with s.on(backward):
            loss.backward(retain_graph=True)
            grads += run.grads()
        s.order(forward, backward)
        s.order(s.main, backward)
        del loss
    return grads


def called_from_another_stream(run: Run):
    """As torch does it on a device: backward of what ran on a stream runs there, whoever calls it."""
    s = run.streams
    a, b = s.stream("a"), s.stream("b")
    grads = []
    for _ in range(2):
        s.order(a, s.main)
        with s.on(a):
            loss = run.forward()
            s.made_here(loss)
        s.order(b, a)
        with s.on(b):
            s.backward(loss)
            s.order(s.main, b)
        grads += run.grads()
        del loss
    return grads


def weights_from_another_stream(run: Run):
    """The last that is saved goes back to the stream that made it, once that is behind all that used it."""
    s = run.streams
    a = s.stream("a")
    for _ in range(3):
        weights = torch.linspace(-1, 1, 128).view(16, 8)
        s.order(a, s.main)
        with s.on(a), run.offload:
            loss = (run.model(run.x) * weights).sum()
            s.made_here(loss)
        s.order(s.main, a)
        s.backward(loss)
        del weights, loss
    return run.grads()


def pipeline(run: Run):
    """Each half of the layers on a stream of its own: backward of the later prefetches for the earlier."""
    s = run.streams
    a, b = s.stream("a"), s.stream("b")
    layers = list(run.model)
    for _ in range(3):
        s.order(a, s.main)
        with run.offload:
            with s.on(a):
                middle = nn.Sequential(*layers[:2])(run.x)
                s.made_here(middle)
            s.order(b, a)
            s.used_on(middle, b)
            with s.on(b):
                loss = nn.Sequential(*layers[2:])(middle).square().mean()
                s.made_here(loss)
        del middle
        s.order(s.main, b)
        s.backward(loss)
    return run.grads()


class Hoard(torch.autograd.Function):
    """The product of x and a parameter, whose backward keeps what it unpacks."""

    @staticmethod
    def forward(ctx, x, p, hoard):
        ctx.save_for_backward(x, p)
        ctx.hoard = hoard
        return x * p

    @staticmethod
    def backward(ctx, g):
        x, p = ctx.saved_tensors
        ctx.hoard.append(x)
        return g * p, (g * x).sum_to_size(p.shape), None


def branches(run: Run):
    """Two streams save the same memory; backward of either comes first, and what it unpacked lives on."""
    s = run.streams
    a, b = s.stream("a"), s.stream("b")
    scale = nn.Parameter(torch.ones(run.x.shape[-1]))
    for order in ((a, b), (b, a)):
        losses, hoard = {}, []
        x = F.relu(run.x)
        for stream in (a, b):
            s.order(stream, s.main)
            s.used_on(x, stream)
            with s.on(stream), run.offload:
                losses[stream] = run.model(x).square().mean() + Hoard.apply(x, scale, hoard).sum()
                s.made_here(losses[stream])
        del x
        for stream in order:  # not ordered among themselves
            with s.on(stream):
                s.backward(losses.pop(stream))
        for stream in (a, b):
            s.order(s.main, stream)
        for stream in (a, b):
            s.order(stream, s.main)
        hoard.clear()
    return [scale.grad, *run.grads()]


def other_thread(run: Run):
    s = run.streams
    b = s.stream("b")

    def backward(loss, on):
        torch.set_num_threads(1)
        with s.watch(), s.on(on):
            s.order(on, s.main)
            s.backward(loss)
            s.order(s.main, on)

    for on in (s.main, b):
        loss = run.forward()
        s.made_here(loss)
        thread = threading.Thread(target=backward, args=(loss, on))
        thread.start()
        thread.join()
        del loss
    return run.grads()


def several_threads(run: Run):
    """One net and one context in several threads at a time, each on a stream of its own."""
    s = run.streams
    streams = [s.stream(f"thread {i}") for i in range(3)]
    grads: dict = {}

    def work(stream):
        torch.set_num_threads(1)
        with s.watch(), s.on(stream):
            for _ in range(3):
                with run.offload:
                    loss = run.model(run.x).square().mean()
                grads[stream] = torch.autograd.grad(loss, list(run.model.parameters()))

    threads = [threading.Thread(target=work, args=(stream,)) for stream in streams]
    for stream in streams:
        s.order(stream, s.main)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for stream in streams:
        s.order(s.main, stream)
    for g in itertools.chain(*grads.values()):
        s.used_on(g, s.main)
    return [g.clone() for stream in streams for g in grads[stream]]


def prefetched_in_vain(run: Run):
    """Backward of the second graph prefetches from the first, which is then dropped."""
    for _ in range(2):
        first = run.forward()
        second = run.forward(run.x + 1)
        second.backward()
        del first
    return run.grads()


def nested(run: Run):
    with run.offload:
        outer = run.model(run.x).sum()
        inner = run.forward()
        outer = outer + run.model(run.x * 2).sum()
    (outer + inner).backward()
    return run.grads()


def checkpointed(run: Run):
    for reentrant in (True, False):
        x = run.x.clone().requires_grad_()
        with run.offload:
            loss = checkpoint(run.model, x, use_reentrant=reentrant).square().mean()
            loss = loss + run.model(x).sum()
        loss.backward()
    return [x.grad, *run.grads()]


CASES = [
    *(("mlp", scenario) for scenario in (
        training, retain_graph, double_backward, two_forwards, dropped, forward_error, backward_error,
        other_stream, called_from_another_stream, weights_from_another_stream, pipeline, branches,
        other_thread, several_threads, prefetched_in_vain, nested, checkpointed,
    )),
    *(("conv", scenario) for scenario in (training, retain_graph)),
    *(("block", scenario) for scenario in (training, double_backward, two_forwards, checkpointed)),
]  # fmt: skip
EXPECTED: dict[tuple, list] = {}


def expected(net, scenario):
    """Without the offload. The scenario itself must be free of races."""
    if (net, scenario) not in EXPECTED:
        with late(0) as transfer:
            EXPECTED[net, scenario] = scenario(Run(net, transfer.streams))
            transfer.streams.drain()
            assert transfer.streams.violations == []
    return EXPECTED[net, scenario]


def differences(got, want) -> int:
    assert len(got) == len(want)
    return sum(not torch.equal(a, b) for a, b in zip(got, want, strict=True))


def settled(transfer: Transfer) -> None:
    """Everything has happened and nothing is left of it, nor has it to be found by the collector."""
    transfer.streams.drain()
    transfer.sweep()
    assert (transfer.pool.used, transfer.in_flight) == (0, 0)


@pytest.mark.parametrize("to", TO)
@pytest.mark.parametrize(("net", "scenario"), CASES, ids=[f"{n}-{s.__name__}" for n, s in CASES])
def test_gradients_do_not_depend_on_when_copies_run(net, scenario, to):
    want = expected(net, scenario)
    packed = 0
    for seed in SEEDS:
        with late(seed, ahead=ahead(seed)) as transfer:
            offload = sk.offload_activations(to, min_bytes=64)
            run = Run(net, transfer.streams, offload)
            got = scenario(run)
            packed += sum(offload.stats.total.packed.values())
            ledger = offload.stats.ledger
            del run, offload
            assert differences(got, want) == 0
            assert transfer.streams.violations == []
            del got
            settled(transfer)
            assert ledger.now == {"plain": 0, "device": 0, "host": 0}
    assert packed > 0


# ---- planted mistakes ----
#
# The numbers are those of eight mistakes that others shipped, each a silent wrong gradient:
#   1 torchtune#1867     an unpacked tensor freed while compute still reads it
#   2 torchtune#2683     other compute streams than expected
#   3 Megatron-LM#7398   a reload reads the host buffer while the copy out is still writing it
#   4 trl#7195           the compute stream cached; a source made after the event that its copy waits for
#   5 ms-swift#10157     shared by address and dtype
#   6 torchtitan#2581    the copy stream waits for itself in place of compute
#   7 pytorch#106360     a target allocated on the copy stream
#   8 torchrec#4231      a source freed while it is being copied


class Deaf(LateStreams):
    """Streams on which some waits do nothing."""

    def __init__(self, seed, deaf):
        super().__init__(seed)
        self.deaf = deaf

    def wait(self, stream, event):
        if not self.deaf(stream.name, event.stream.name):
            super().wait(stream, event)


class Forgetful(LateStreams):
    """Streams of which the package does not use one method, though it thinks it does."""

    def __init__(self, seed, method, instead):
        super().__init__(seed)
        honest = getattr(self, method)

        def chosen(*args):
            asking = sys._getframe(1).f_globals["__name__"]
            return (instead if asking.startswith("sparsekern") else honest)(*args)

        setattr(self, method, chosen)


def deaf(deaf):
    return lambda patch: lambda seed: Deaf(seed, deaf)


def forgetful(method, instead):
    return lambda patch: lambda seed: Forgetful(seed, method, instead)


def patched(owner, name, make):
    """Replaces a method by what `make` makes of it."""

    def apply(patch):
        patch.setattr(owner, name, make(getattr(owner, name)))
        return LateStreams

    return apply


def remembered(patch):
    def streams(seed):
        s = LateStreams(seed)
        first = []

        def current():
            here = LateStreams.current(s)
            if not sys._getframe(1).f_globals["__name__"].startswith("sparsekern"):
                return here
            first.append(here)
            return first[0]

        s.current = current
        return s

    return streams


def drop_stash(unstash):
    def dropping(self):
        self._stash.clear()
        self._stashed = 0

    return dropping


def retire_at_once(retire):
    return lambda self, events, what: self.pool.give(what) if isinstance(what, HostBlock) else None


def ignore_reloads(finalizer):
    def __del__(self):
        self._reloads = []
        finalizer(self)

    return __del__


def stale_event(now):
    def before(self):
        stream, event = now(self)
        last = getattr(self, "last", event)
        self.last = event
        return stream, last

    return before


def read_at_once(values):
    def at_once(self):
        if self._values is None:
            self._values = self._block.tensor.view(torch.int64).tolist()
        return self._values

    return at_once


def target_on_side(back):
    def other(self, *args):
        placed = back(self, *args)
        side = self.streams.side("in")
        self.streams._of(placed.tensor).home = side
        return placed

    return other


def any_stream(elements):
    def decoded(self):
        if self._cache is not None:
            self._cache = *self._cache[:2], self.transfer.streams.current()
        return elements(self)

    return decoded


def aliases(run: Run):
    """Memory that is saved, changed in place and saved again, by ops of which only the second matters."""
    grads = []
    for _ in range(2):
        p = torch.arange(64.0).requires_grad_()
        with run.offload:
            x = p * 2
            first = x * x
            # Else the copy of what cannot be unpacked any more races with the next line.
            run.streams.order(run.streams.main, run.streams.side("out"))
            x.add_(1)
            loss = (x * x).sum()
        loss.backward()
        grads.append(p.grad)
        del first, x, loss
    return grads


def unmarked(get):
    return lambda self: get(self) if self._placed is None else self._placed.tensor


MISTAKES = {
    "1,7-target_allocated_on_the_copy_stream": (
        patched(Transfer, "back", target_on_side),
        training,
    ),
    "1-used_on_another_stream_unmarked": (
        forgetful("used_on", lambda t, stream: None),
        weights_from_another_stream,
    ),
    "1-lent_to_another_stream_unmarked": (
        patched(Transfer, "lend", lambda lend: lambda self, t, stream: t),
        branches,
    ),
    "1-part_used_on_another_stream_unmarked": (patched(Part, "get", unmarked), other_stream),
    "2-decoded_for_another_stream": (patched(Packed, "elements", any_stream), branches),
    "2-concluded_on_another_stream": (
        forgetful("on", lambda stream: contextlib.nullcontext()),
        pipeline,
    ),
    "2,4-streams_remembered": (remembered, pipeline),
    "3-back_not_behind_arrival": (deaf(lambda to, of: (to, of) == ("in", "out")), training),
    "3-block_given_back_at_once": (patched(Transfer, "retire", retire_at_once), training),
    "3-block_given_back_under_a_reload": (patched(Part, "__del__", ignore_reloads), training),
    "4-event_from_before_the_source": (patched(Transfer, "now", stale_event), training),
    "5-shared_by_address": (
        patched(Packed, "covers", lambda covers: lambda self, t, at: self.dtype is t.dtype),
        aliases,
    ),
    "6-out_not_behind_compute": (deaf(lambda to, of: to == "out"), training),
    "6-back_not_behind_compute": (deaf(lambda to, of: to == "in" and of != "out"), training),
    "7-used_before_it_arrived": (deaf(lambda to, of: to != "in" and of == "in"), training),
    "8-no_stash": (patched(Transfer, "_unstash", drop_stash), training),
    "8-stash_dropped_without_wait": (deaf(lambda to, of: to != "in" and of == "out"), training),
    "answer_read_before_its_event": (patched(Answer, "values", read_at_once), training),
}


def planted(apply, scenario, patch) -> dict:
    """(to, seed) to the violations seen, and what came out wrong."""
    want = expected("mlp", scenario)
    streams = apply(patch)
    found = {}
    for to, seed in itertools.product(TO, (0, 2, 4, 6)):
        with late(seed, streams=streams(seed), ahead=ahead(seed)) as transfer:
            s = transfer.streams
            try:
                got = scenario(Run("mlp", s, sk.offload_activations(to, min_bytes=64)))
                wrong = differences(got, want)
            except ValueError as garbage:  # decoding checks what it reads
                wrong = str(garbage)
            s.drain()
            found[to, seed] = s.violations, wrong
    return found


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake, monkeypatch):
    found = planted(*MISTAKES[mistake], monkeypatch)
    assert any(violations or wrong for violations, wrong in found.values())


@pytest.mark.parametrize(
    "scenario", sorted({s for _, s in MISTAKES.values()}, key=str), ids=lambda s: s.__name__
)
def test_nothing_is_found_where_nothing_is_planted(scenario, monkeypatch):
    found = planted(lambda patch: LateStreams, scenario, monkeypatch)
    assert not any(violations or wrong for violations, wrong in found.values())


# ---- what is not as expected ----


def changing(run: Run, forward, inputs):
    """One net, one context, an input a step: the gradients of each."""
    out = []
    for x in inputs:
        w = torch.ones(x.shape[-1], requires_grad=True)
        with run.offload:
            loss = forward(x, w).sum()
        loss.backward()
        out.append(w.grad)
    return out


def dense_at_once(shift, w):
    """Squared ReLU of values that lie below zero until, at once, they do not."""
    torch.manual_seed(0)
    h = F.relu((torch.randn(64, 1024) + shift[0]) * w)
    return h * h


def wide_at_once(reach, w):
    """Picks columns by indices that fit in a byte until, at once, they do not."""
    index = (torch.arange(4096).view(8, 512) * int(reach[0])) % 4096
    return torch.gather(w.expand(8, 4096), 1, index)


def odd_at_once(byte, w):
    """A mask whose True is the byte 1 until it is another: a view of memory that held something else."""
    mask = (torch.arange(4096, dtype=torch.uint8) % 2 * int(byte[0])).view(torch.bool)
    return (w * 2).masked_fill(mask, 0)


SURPRISES = {
    "density": (dense_at_once, [torch.full((1024,), v) for v in (-3.0, -3.0, 3.0, 3.0, -3.0)]),
    "range": (wide_at_once, [torch.full((4096,), v) for v in (0.02, 0.02, 1.0, 9.0, 0.02)]),
    "bool": (odd_at_once, [torch.full((4096,), v) for v in (1.0, 1.0, 2.0, 255.0, 1.0)]),
}


@pytest.mark.parametrize("to", TO)
@pytest.mark.parametrize("surprise", SURPRISES)
def test_a_site_whose_tensors_are_suddenly_others(surprise, to):
    """What was expected of a site turns out wrong on the device, later: the tensor is kept, or moved raw."""
    forward, inputs = SURPRISES[surprise]
    want = changing(Run("mlp", LateStreams(0)), forward, inputs)
    packed = []
    for seed in SEEDS:
        with late(seed, ahead=(1 << 21, 0)[seed % 2]) as transfer:
            offload = sk.offload_activations(to, min_bytes=2048)
            got = changing(Run("mlp", transfer.streams, offload), forward, inputs)
            assert differences(got, want) == 0
            assert transfer.streams.violations == []
            packed.append(offload.stats.total)
            del got, offload
            settled(transfer)
    codec = {"density": "zvc", "range": "narrow", "bool": "bits"}[surprise]
    assert any(total.packed[codec] for total in packed)
    if to == "device" or (surprise, to) == ("bool", "auto"):
        assert any(total.kept["no gain"] for total in packed)
    else:
        assert any(total.packed["raw"] for total in packed)


def retreats(to, seed=2, net="block", **limits):
    """Trains with little of something; what became of it."""
    how = {k: limits.pop(k) for k in ("pins", "allocate") if k in limits}
    with late(seed, ahead=4096, **how) as transfer:
        offload = sk.offload_activations(to, min_bytes=64, **limits)
        with pytest.warns(RuntimeWarning, match="stats.retreats counts how often"):
            got = training(Run(net, transfer.streams, offload))
        assert differences(got, expected(net, training)) == 0
        assert transfer.streams.violations == []
        stats, pool = offload.stats, transfer.pool
        del got, offload
        settled(transfer)
        assert stats.ledger.now == {"plain": 0, "device": 0, "host": 0}
        return stats, pool


@pytest.mark.parametrize("cap", [0, 1000, 8000])
def test_beyond_the_cap_on_host_bytes_the_device_keeps_it(cap):
    stats, _ = retreats("cpu", max_host_bytes=cap)
    assert stats.ledger.peak["host"] <= cap
    assert [why for why in stats.retreats if "max_host_bytes" in why]
    assert stats.total.kept["no gain"] > 0
    assert bool(stats.total.packed["raw"]) == (cap > 0)


@pytest.mark.parametrize("pins", [0, 1])
def test_where_pinning_is_refused_memory_is_pageable(pins, monkeypatch):
    monkeypatch.setattr(host, "SLAB", 8192)
    stats, pool = retreats("cpu", pins=pins)
    assert [why for why in stats.retreats if "pinned host memory was refused" in why]
    assert stats.total.packed["raw"] > 0
    assert [slab.pinned for slab in pool._slabs][: pins + 1] == [True, False][1 - pins :]


def test_where_the_host_has_no_memory_the_device_keeps_it(monkeypatch):
    monkeypatch.setattr(host, "SLAB", 2048)
    slabs = 0

    def allocate(nbytes: int):
        nonlocal slabs
        slabs += 1
        if slabs > 3:
            raise MemoryError
        return torch.empty(nbytes, dtype=torch.uint8)

    stats, pool = retreats("cpu", allocate=allocate)
    assert [why for why in stats.retreats if "no memory left" in why]
    assert stats.total.packed["raw"] > 0
    assert stats.total.kept["no gain"] > 0
    assert pool.reserved <= 3 * 2048


# ---- steady state ----


@pytest.mark.parametrize("to", TO)
@pytest.mark.parametrize("net", NETS)
def test_the_host_does_not_wait_once_sites_are_known(net, to):
    """With a device that keeps up. Longer than a dense site is left in peace: it is then asked in passing."""
    with late(1) as transfer:
        offload = sk.offload_activations(to, min_bytes=64)
        run = Run(net, transfer.streams, offload)
        waits = []
        for _ in range(policy.RECHECK + 4):
            before = transfer.streams.waits.total()
            run.forward().backward()
            waits.append(transfer.streams.waits.total() - before)
    assert waits[0] > 0
    assert waits[2:] == [0] * len(waits[2:])


@pytest.mark.parametrize("to", TO)
@pytest.mark.parametrize("seed", [0, 2])
def test_what_may_wait_is_bounded(seed, to):
    """With a device that never keeps up: for one encoding at most per tensor the host waits, never for a copy."""
    bound = 4096
    with late(seed, ahead=bound) as transfer:
        offload = sk.offload_activations(to, min_bytes=64)
        run = Run("mlp", transfer.streams, offload)
        settle = offload._settle

        def settle_and_look():
            settle()
            pending = [p for p in (ref() for ref in offload._pending) if p is not None]
            assert sum(p.plain for p in pending) <= bound
            assert transfer._stashed <= bound
            assert sum(t.nbytes for _, t, _ in transfer._stash) == transfer._stashed

        offload._settle = settle_and_look
        for step in range(4):
            before, packed = transfer.streams.waits.copy(), offload.stats.total.packed.total()
            loss = run.forward()
            waits = transfer.streams.waits - before
            packed = offload.stats.total.packed.total() - packed
            assert waits["synchronize"] <= packed
            if step > 1:
                assert set(waits) <= {"synchronize"}
            loss.backward()


# ---- prefetching ----


class Fetches:
    """What a backward pass fetches and unpacks, by packed object, in order."""

    def __init__(self, transfer, patch):
        self.log = []
        inside = []

        def noting(method):
            def noted(packed):
                inside.append(packed)
                try:
                    return method(packed)
                finally:
                    inside.pop()
                    if method.__name__ == "elements":
                        self.log.append(("unpack", packed.index))

            return noted

        for name in ("elements", "prefetch"):
            patch.setattr(Packed, name, noting(getattr(Packed, name)))
        back = transfer.back

        def noted(block, *more):
            self.log.append(("fetch", inside[-1].index))
            self.parts[inside[-1].index] = len(inside[-1].parts)
            return back(block, *more)

        transfer.back, self.parts = noted, {}

    def order(self, what):
        return list(dict.fromkeys(i for kind, i in self.log if kind == what))


def deep():
    """Every layer's output is saved by it and by the next, and nothing of it has zeros."""
    torch.manual_seed(0)
    layers = [m for _ in range(8) for m in (nn.Linear(16, 16), nn.Sigmoid())]
    return nn.Sequential(*layers), torch.randn(8, 16)


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_backward_prefetches_the_way_forward_came(depth, monkeypatch):
    with late(1, ahead=0) as transfer:
        model, x = deep()
        offload = sk.offload_activations("cpu", min_bytes=64, prefetch=depth)
        with offload:
            loss = model(x).sum()
        fetches = Fetches(transfer, monkeypatch)
        loss.backward()
    fetched = fetches.order("fetch")
    assert len(fetched) >= 7
    assert fetched == sorted(fetched, reverse=True)
    assert fetches.order("unpack") == fetched
    # Once each, though two ops have saved each of them.
    assert Counter(i for kind, i in fetches.log if kind == "fetch") == fetches.parts
    under_way, most = set(), 0
    for kind, index in fetches.log:
        (under_way.add if kind == "fetch" else under_way.discard)(index)
        most = max(most, len(under_way))
    assert most == max(depth, 1)


def test_what_is_still_there_is_not_fetched(monkeypatch):
    with late(1, ahead=0) as transfer:
        model, x = deep()
        alive = []
        for layer in model[1::4]:
            layer.register_forward_hook(lambda module, args, out: alive.append(out))
        with sk.offload_activations("cpu", min_bytes=64) as offload:
            loss = model(x).sum()
        keys = {t.untyped_storage()._cdata for t in alive}
        there = {p.index for p in (ref() for ref in offload._by_index.values()) if p.key in keys}
        fetches = Fetches(transfer, monkeypatch)
        loss.backward()
    assert there
    assert fetches.order("fetch")
    assert not there & set(fetches.order("fetch"))


def test_one_ops_two_tensors_are_fetched_once(monkeypatch):
    """Backward of a product unpacks the first of them, looks ahead from there, and comes to the second."""
    with late(1, ahead=0) as transfer:
        p = torch.randn(8, 64, requires_grad=True)
        with sk.offload_activations("cpu", min_bytes=64):
            # Columns, so that they are gathered and what is unpacked is not what was decoded.
            loss = sum((p.sin()[:, ::3] * p.cos()[:, ::3]).sum() for _ in range(3))
        fetches = Fetches(transfer, monkeypatch)
        loss.backward()
    assert Counter(i for kind, i in fetches.log if kind == "fetch") == fetches.parts
    assert fetches.parts


def test_what_is_kept_for_a_second_use_is_little_and_goes_with_the_graph():
    with late(1, ahead=0) as transfer:
        model, x = deep()
        with sk.offload_activations("cpu", min_bytes=64) as offload:
            loss = model(x).sum()
        loss.backward(retain_graph=True)
        packed = [p for p in (ref() for ref in offload._by_index.values()) if p is not None]
        kept = [StorageWeakRef(p.warm.untyped_storage()) for p in packed if p.warm is not None]
        assert len(packed) > 4
        assert len(kept) == WARM
        del packed, loss
        assert all(ref.expired() for ref in kept)
        settled(transfer)


def test_a_prefetch_that_finds_no_memory_is_left_for_later(monkeypatch):
    want = expected("mlp", training)
    prefetch = Packed.prefetch
    refused = 0

    def refusing(packed):
        nonlocal refused
        if not packed.index % 2:
            refused += 1
            raise torch.OutOfMemoryError
        return prefetch(packed)

    monkeypatch.setattr(Packed, "prefetch", refusing)
    with late(0) as transfer:
        got = training(Run("mlp", transfer.streams, sk.offload_activations("cpu", min_bytes=64)))
        assert differences(got, want) == 0
        assert transfer.streams.violations == []
    assert refused


# ---- CUDA's own rules, as far as they can be had without it ----


def test_under_graph_capture_everything_is_left_alone():
    """Nothing may be asked or waited for there, not even for what was packed before."""

    def forbidden(*_):
        raise AssertionError("not allowed under graph capture")

    with late(0) as transfer:
        s = transfer.streams
        offload = sk.offload_activations("cpu", min_bytes=64)
        run = Run("mlp", s, offload)
        training(run)
        before = run.forward()  # leaves encodings whose outcome is not known
        assert offload._pending
        packed = offload.stats.total.packed.total()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(s, "capturing", lambda: True)
            for name in ("record", "wait", "done", "synchronize", "copy"):
                patch.setattr(s, name, forbidden)
            run.forward().backward()
            got = run.grads()
        before.backward()
        assert differences(run.grads(), got) == 0
        assert offload.stats.total.packed.total() == packed
        assert offload.stats.total.kept["graph capture"] > 0


def test_a_refused_pin_leaves_no_error_behind(monkeypatch):
    """The runtime keeps the last error of a call, and torch's next launch takes it for its own."""
    last = 0

    class Runtime:
        @staticmethod
        def cudaHostRegister(address, nbytes, flags):
            nonlocal last
            last = 2 if nbytes > 1024 else 0
            return last

    def launch(*args, **kwargs):
        nonlocal last
        error, last = last, 0
        if error:
            raise RuntimeError(f"CUDA error {error}")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime)
    monkeypatch.setattr(torch, "ones", launch)
    device = Accelerator(torch.device("cuda", 0))
    assert device.pin(torch.empty(1024, dtype=torch.uint8))
    assert not device.pin(torch.empty(1025, dtype=torch.uint8))
    assert last == 0


def test_a_stream_is_entered_through_an_object_of_ones_own():
    """What to return to is kept on the object: of two threads inside one, each would return to the other's."""

    class Side:
        stream_id, device_index, device_type = 3, 0, 0

        def __enter__(self):
            raise AssertionError("entered the object that other threads have too")

        def __exit__(self, *_):
            pass

    device = Accelerator(torch.device("cpu"))
    to = torch.zeros(4)
    device.copy(to, torch.ones(4), Side())
    assert to.tolist() == [1, 1, 1, 1]
    stream = torch.Stream(stream_id=3, device_index=0, device_type=0)
    assert device.on(stream) == stream
    assert device.on(stream) is not stream


# ---- the host pool ----


def test_finalizers_may_give_blocks_back_in_the_middle_of_the_pools_bookkeeping():
    """The garbage collector may run a packed object's finalizer between any two lines of the pool's own."""
    chance = random.Random(0)
    pool = HostPool(lambda _: True, lambda _: None)
    blocks = [pool.take(512 * chance.randint(1, 8)) for _ in range(400)]
    doomed: list = []

    def trace(frame, event, _):
        if frame.f_code.co_filename != host.__file__:
            return None
        if event == "line" and doomed and not chance.randrange(4):
            pool.give(doomed.pop())
        return trace

    before = sys.gettrace()
    for _ in range(400):
        chance.shuffle(blocks)
        doomed += [blocks.pop() for _ in range(3)]
        sys.settrace(trace)
        try:
            pool.give(blocks.pop())
            blocks += [pool.take(512 * chance.randint(1, 8)) for _ in range(4)]
        finally:
            sys.settrace(before)
        spans = sorted((b.slab.memory.data_ptr() + b.at, b.reserved) for b in (*blocks, *doomed))
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans)), "two blocks overlap"
    while blocks or doomed:
        pool.give((blocks or doomed).pop())
    assert pool.used == 0
    assert all(slab.unused for slab in pool._slabs)


def test_a_sweep_asks_about_the_oldest_alone():
    """Where the host runs far ahead of the device, nothing is free yet: no need to ask about all of it."""

    def asked(layers: int) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(8, 8), nn.Sigmoid())))
        with late(0) as transfer:  # in which nothing happens before it has to
            s, count = transfer.streams, 0
            done = s.done

            def counted(event) -> bool:
                nonlocal count
                count += 1
                return done(event)

            s.done = counted
            with sk.offload_activations("cpu", min_bytes=64):
                loss = model(torch.randn(16, 8)).sum()
            loss.backward()
            return count

    assert asked(32) < 2.5 * asked(16)


@pytest.mark.parametrize("to", ["cpu", "device"])
def test_an_interrupt_at_any_call_into_the_streams_leaves_no_race_and_no_leak(to):
    """KeyboardInterrupt right before something is queued, or right after: what was queued still runs."""

    def interrupted(nth: int) -> int:
        """Runs steps of which the nth call is interrupted, then whole ones. How many calls the first made."""
        with late(0, ahead=4096) as transfer:
            s, calls = transfer.streams, 0

            def interrupting(f):
                def call(*args):
                    nonlocal calls
                    calls += 1
                    if calls == nth and nth % 2:
                        raise KeyboardInterrupt
                    out = f(*args)
                    if calls == nth and not nth % 2:
                        raise KeyboardInterrupt
                    return out

                return call

            for name in ("record", "wait", "copy", "synchronize"):
                setattr(s, name, interrupting(getattr(s, name)))
            offload = sk.offload_activations(to, min_bytes=64)
            run = Run("mlp", s, offload)
            with contextlib.suppress(KeyboardInterrupt):
                training(run)
            count = calls
            run.model.zero_grad()
            run = Run("mlp", s, offload)
            assert differences(training(run), want) == 0
            assert s.violations == []
            ledger = offload.stats.ledger
            del run, offload
            settled(transfer)
            assert ledger.now == {"plain": 0, "device": 0, "host": 0}
            return count

    want = expected("mlp", training)
    total = interrupted(1 << 30)
    assert total > 30
    for nth in range(1, total, 7):
        interrupted(nth)


def test_hooks_run_in_threads_of_autograd_that_never_entered():
    """Backward that nests deeper than 60 goes on in another thread, as it does on a device from the start."""
    threads = set()

    def nest(x, depth):
        threads.add(threading.get_ident())
        y = F.relu(x) * x
        return checkpoint(nest, y * 0.5, depth - 1, use_reentrant=True) if depth else y

    def grad(offload):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with offload:
            nest(x, 64).sum().backward()
        return x.grad

    want = grad(contextlib.nullcontext())
    offload = sk.offload_activations("cpu", min_bytes=64)
    assert torch.equal(grad(offload), want)
    assert len(threads) > 1
    assert offload.stats.total.packed


def test_a_dying_packed_object_cannot_be_taken_up_again():
    """Weak references to an object are still good while its own finalizer runs, for other threads say."""
    with late(0, ahead=0) as transfer:
        model, x = deep()
        with sk.offload_activations("cpu", min_bytes=64) as offload:
            loss = model(x).sum()
        add, alive = offload.stats.ledger.add, []

        def looking(**changes):
            add(**changes)
            if changes.get("plain", 0) < 0:
                refs = list(offload._by_index.values())
                alive.append(sum(ref() is not None for ref in refs))

        offload.stats.ledger.add = looking
        packed = len(offload._by_index)
        del loss
        assert packed > 4
        assert sorted(alive, reverse=True) == list(range(packed - 1, -1, -1))
        settled(transfer)
