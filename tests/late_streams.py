"""A device whose copies come late: a stand-in for ``sparsekern.offload.streams.Streams``, on CPU tensors.

::

    compute streams   torch's ops run at once, so a wait on one forces what its event needs
    side streams      copies queue; they run when an event forces them, or at random, in any order that
                      streams and events allow
    the host          what `done` and `synchronize` showed it has happened before all that it queues later

A mistake in the ordering shows in two ways, whichever comes first:

* By lateness. A queued copy holds neither its source nor its target. If one of them is gone when it runs,
  or a host block was given back meanwhile, that is a violation, and what arrives is poison (0xFF, a NaN).
  Targets are poisoned until their copy has run, host blocks whenever they change hands.
* By clocks. Each stream counts its work and knows how far of each other stream it is ordered behind. Each
  access to memory is compared with those before it, and memory that is freed with those still under way,
  as the caching allocator hands it to the next kernel of the stream it came from. So a race is found even
  where the schedule at hand gets away with it.
"""

from __future__ import annotations

import contextlib
import functools
import random
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekern.offload.context import transfers
from sparsekern.offload.host import Block, HostPool
from sparsekern.offload.lock import LOCK
from sparsekern.offload.transfer import AHEAD, Transfer

POISON = 0xFF

# Ops for which the host waits until the device has an answer.
BLOCKING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::nonzero",
    "sparsekern::pack_zvc",
}


@dataclass(eq=False)
class LateStream:
    """Work in order: `clock` counts what was put on it, `reached` how much of that the host may know is done."""

    name: str
    clock: int = 0
    reached: int = 0
    seen: dict[LateStream, int] = field(default_factory=dict)  # ordered behind these, up to there
    tasks: deque = field(default_factory=deque)  # (clock, what to do)

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class LateEvent:
    stream: LateStream
    clock: int
    seen: dict[LateStream, int]


@dataclass(eq=False)
class Memory:
    """A storage, or a host block (`home` None): who used it last."""

    nbytes: int
    home: LateStream | None  # where the allocator takes it back to
    alive: object  # () -> bool
    key: int  # of the storage, or its address
    written: tuple[LateStream, int] | None = None
    read: dict[LateStream, int] = field(default_factory=dict)
    used_on: set[LateStream] = field(default_factory=set)

    @property
    def name(self) -> str:
        where = f"host block at {self.key:#x}" if self.home is None else f"memory of {self.home}"
        return f"{where} ({self.nbytes} bytes)"

    def accesses(self):
        return ([self.written] if self.written else []) + list(self.read.items())


class LateStreams:
    """Streams of a device that is as late as it is allowed to be.

    Args:
        seed: of the order of copies and of when `done` says yes. Every fourth seed from 0 never runs anything
            before it must, every fourth from 1 runs everything at once; the others are in between.
        pins: how many slabs may be pinned.

    Attributes:
        violations: what went wrong, in words.
        waits: how often the host had to wait for the device, by the op, "synchronize" for an event.
    """

    asynchronous = True

    def __init__(self, seed: int, pins: int = 1 << 30):
        self._random = random.Random(seed)
        self.eagerness = {0: 0.0, 1: 1.0}.get(seed % 4, 0.2)
        self.pins = pins
        self.pinned: list[Tensor] = []
        self.violations: list[str] = []
        self.waits: Counter[str] = Counter()
        self.host: dict[LateStream, int] = {}  # what the host has seen happen
        self.main = LateStream("compute")
        self._sides: dict[str, LateStream] = {}
        self._streams = [self.main]
        self._local = threading.local()
        self._memory: dict[int, Memory] = {}  # by storage, whose identity a weak reference keeps
        self._crossed: set[int] = set()  # those of them that more than their own stream has used
        self._blocks: dict[int, Memory] = {}  # by address, those that are taken
        self._crowded = 256
        self._running = False

    # ---- what the tests use ----

    def stream(self, name: str) -> LateStream:
        """Another stream to compute on."""
        self._streams.append(LateStream(name))
        return self._streams[-1]

    @contextlib.contextmanager
    def on(self, stream: LateStream):
        """Compute on that stream, in this thread."""
        before = self.current()
        self._local.current = stream
        try:
            yield
        finally:
            self._local.current = before

    def order(self, later: LateStream, earlier: LateStream) -> None:
        """What a user writes as ``later.wait_stream(earlier)``."""
        self.wait(later, self.record(earlier))

    def made_here(self, *outputs: Tensor) -> None:
        """Backward of what is behind these, and on no stream yet, is to run on the current one.

        So does torch on a device: each node on the stream of its forward, behind the nodes that its gradients
        come from.
        """
        here = self.current()
        nodes = [t.grad_fn for t in outputs]
        while nodes:
            node = nodes.pop()
            if node is None or "stream" in node.metadata:
                continue
            node.metadata["stream"], node.metadata["after"] = here, []
            node.register_prehook(functools.partial(self._before_node, node.metadata))
            followers = [n for n, _ in node.next_functions if n is not None]
            node.register_hook(functools.partial(self._after_node, here, followers))
            nodes += followers

    def _before_node(self, metadata: dict, grads) -> None:
        self._local.current = stream = metadata["stream"]
        self._local.ran_on.add(stream)
        for event in metadata["after"]:
            self.wait(stream, event)
        metadata["after"].clear()
        for g in grads:
            if g is not None:
                self.used_on(g, stream)

    def _after_node(self, stream: LateStream, followers: list, *_) -> None:
        event = self.record(stream)
        for node in followers:
            if "after" in node.metadata:
                node.metadata["after"].append(event)

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``, each node on its stream, all done for what comes on the current one."""
        here = self.current()
        one = torch.ones_like(loss)
        loss.grad_fn.metadata["after"].append(self.record(here))
        self._local.ran_on = set()
        try:
            loss.backward(one)
        finally:
            self._local.current = here
        for stream in self._local.ran_on - {here}:
            self.order(here, stream)

    @contextlib.contextmanager
    def watch(self):
        """See the ops of this thread."""
        with Watch(lambda: self):
            yield

    def drain(self) -> None:
        """Let everything happen, and let the host know."""
        with LOCK:
            for stream in self._streams:
                self._advance(stream, stream.clock)
                self._observe({stream: stream.clock, **stream.seen})
            self._reap()

    # ---- Streams ----

    def current(self) -> LateStream:
        return getattr(self._local, "current", self.main)

    def side(self, direction: str) -> LateStream:
        with LOCK:
            if direction not in self._sides:
                self._sides[direction] = self.stream(direction)
            return self._sides[direction]

    def capturing(self) -> bool:
        return False

    def record(self, stream: LateStream) -> LateEvent:
        with LOCK:
            self._tick()
            self._enqueue(stream)
            return LateEvent(stream, stream.clock, {**stream.seen, stream: stream.clock})

    def wait(self, stream: LateStream, event: LateEvent) -> None:
        with LOCK:
            self._tick()
            self._reap()  # what is free already was freed without this wait
            self._enqueue(stream)
            _merge(stream.seen, event.seen)
            if stream in self._sides.values():
                stream.tasks.append(
                    (stream.clock, lambda: self._advance(event.stream, event.clock))
                )
            else:
                self._advance(event.stream, event.clock)

    def done(self, event: LateEvent) -> bool:
        with LOCK:
            self._tick()
            self._reap()
            if event.stream.reached < event.clock:
                if self._running or self._random.random() >= self.eagerness:
                    return False
                self._advance(event.stream, event.clock)
            self._observe(event.seen)
            return True

    def synchronize(self, event: LateEvent) -> None:
        with LOCK:
            self._reap()
            self.waits["synchronize"] += event.stream.reached < event.clock
            self._advance(event.stream, event.clock)
            self._observe(event.seen)

    def copy(self, to: Tensor, source: Tensor, stream: LateStream) -> None:
        with LOCK, torch.no_grad(), self._unwatched():
            self._tick()
            self._enqueue(stream)
            self._access(self._of(source), stream, "a copy", write=False)
            self._access(self._of(to), stream, "a copy", write=True)
            if _address(to) not in self._blocks:
                to.fill_(POISON)
            if stream in self._sides.values():
                read = self._later(source, "the source")
            else:  # what the stream has written so far, which is there already
                snapshot = source.clone()
                read = lambda: snapshot  # noqa: E731
            write = self._later(to, "the target")

            def run() -> None:
                with torch.no_grad(), self._unwatched():
                    data, target = read(), write()
                    if target is not None and data is None:
                        target.fill_(POISON)
                    elif target is not None:
                        target.copy_(data)

            stream.tasks.append((stream.clock, run))
            if self.eagerness == 1:
                self._advance(stream, stream.clock)

    def used_on(self, t: Tensor, stream: LateStream) -> None:
        with LOCK:
            self._of(t).used_on.add(stream)

    def pin(self, t: Tensor) -> bool:
        if len(self.pinned) >= self.pins:
            return False
        self.pinned.append(t)
        return True

    def unpin(self, t: Tensor) -> None:
        self.pinned.remove(t)

    # ---- when things run ----

    def _enqueue(self, stream: LateStream) -> None:
        _merge(stream.seen, self.host)
        stream.clock += 1

    def _advance(self, stream: LateStream, clock: int) -> None:
        """Run what is on the stream up to there."""
        running, self._running = self._running, True
        while stream.tasks and stream.tasks[0][0] <= clock:
            stream.tasks.popleft()[1]()
        self._running = running
        stream.reached = max(stream.reached, clock)

    def _tick(self) -> None:
        """Something may happen at any time."""
        if self._running or not 0 < self.eagerness < 1:
            return
        stream = self._random.choice(self._streams)
        if stream.tasks and self._random.random() < self.eagerness:
            self._advance(stream, self._random.choice(stream.tasks)[0])

    def _later(self, t: Tensor, what: str):
        """Finds the bytes of `t` again: None if they are gone."""
        block = self._blocks.get(_address(t))
        return _in_block(t, block, what, self) if block else _in_storage(t, what, self)

    # ---- what happened before what ----

    def _before(self, access: tuple[LateStream, int], stream: LateStream | None) -> bool:
        """Whether an access is over for what is queued on a stream now (for the host, if None)."""
        by, clock = access
        seen = 0 if stream is None else stream.seen.get(by, 0)
        return by is stream or max(seen, self.host.get(by, 0)) >= clock

    def _observe(self, seen: dict[LateStream, int]) -> None:
        _merge(self.host, seen)

    def _of(self, t: Tensor) -> Memory:
        block = self._blocks.get(_address(t))
        if block is not None:
            return block
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self._memory:
            if len(self._memory) >= self._crowded:
                self._memory = {
                    k: m for k, m in self._memory.items() if m.alive() or k in self._crossed
                }
                self._crowded = 2 * len(self._memory) + 256
            ref = StorageWeakRef(storage)
            self._memory[key] = Memory(
                storage.nbytes(), self.current(), lambda: not ref.expired(), key
            )
        return self._memory[key]

    def _access(self, memory: Memory, stream: LateStream | None, who: str, write: bool) -> None:
        earlier = memory.accesses() if write else [memory.written] if memory.written else []
        for access in earlier:
            if not self._before(access, stream):
                self.violations.append(
                    f"{who} on {stream or 'the host'} {'writes' if write else 'reads'} {memory.name} that "
                    f"{access[0]} may still be {'using' if write else 'writing'}"
                )
        if stream is None:
            return
        if memory.home is not None and stream is not memory.home:
            self._crossed.add(memory.key)
        if write:
            memory.written, memory.read = (stream, stream.clock), {}
        else:
            memory.read[stream] = stream.clock

    def _reap(self) -> None:
        """What was freed goes back to the stream it came from: it must be behind all that uses it."""
        for key in list(self._crossed):
            memory = self._memory[key]
            if memory.alive():
                continue
            self._crossed.discard(key)
            del self._memory[key]
            behind = {memory.home, *memory.used_on}
            for access in memory.accesses() if memory.nbytes else ():
                if not any(self._before(access, stream) for stream in behind):
                    self.violations.append(
                        f"{memory.name} was freed while {access[0]} may still use it"
                    )

    @contextlib.contextmanager
    def _unwatched(self):
        before = getattr(self._local, "unwatched", False)
        self._local.unwatched = True
        try:
            yield
        finally:
            self._local.unwatched = before

    def _op(self, func, args, kwargs, out) -> None:
        """An op ran on the current stream."""
        if getattr(self._local, "unwatched", False) or func.name().startswith("aten::set_"):
            return
        stream = self.current()
        read, written = [], []
        for name, value in (*zip(_writes(func), args, strict=False), *kwargs.items()):
            into = written if _writes(func)[name] else read
            into.extend(_tensors(value))
        outs = _tensors(out)
        inside = {t.untyped_storage()._cdata for t in (*read, *written)}
        with LOCK, self._unwatched():
            if not written and outs and all(t.untyped_storage()._cdata in inside for t in outs):
                # A view: no work for the device. Of host memory, it is the host that looks.
                for t in read:
                    if _address(t) in self._blocks:
                        self._access(self._of(t), None, func.name(), write=False)
                return
            self._enqueue(stream)
            for t in read:
                self._access(self._of(t), stream, func.name(), write=False)
            for t in (*written, *outs):
                self._access(self._of(t), stream, func.name(), write=True)
            if func.name() in BLOCKING:
                self._reap()
                self.waits[func.name()] += 1
                self._advance(stream, stream.clock)
                self._observe({**stream.seen, stream: stream.clock})


def _merge(seen: dict[LateStream, int], more: dict[LateStream, int]) -> None:
    for stream, clock in more.items():
        seen[stream] = max(seen.get(stream, 0), clock)


@functools.cache
def _writes(func) -> dict[str, bool]:
    """Argument to whether the op writes to it."""
    return {
        a.name: a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments
    }


def _tensors(value) -> list[Tensor]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [t for t in values if isinstance(t, Tensor)]


def _address(t: Tensor) -> int:
    """Also of an empty tensor, whose `data_ptr` is 0."""
    return t.untyped_storage().data_ptr() + t.storage_offset() * t.element_size()


def _in_block(t: Tensor, block: Memory, what: str, streams: LateStreams):
    def find() -> Tensor:
        if not block.alive():
            streams.violations.append(
                f"{what} of a copy, {block.name}, was given back before it ran"
            )
        return t

    return find


def _in_storage(t: Tensor, what: str, streams: LateStreams):
    ref, at, nbytes = StorageWeakRef(t.untyped_storage()), t.storage_offset(), t.nbytes

    def find() -> Tensor | None:
        alive = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
        if alive is None:
            streams.violations.append(f"{what} of a copy was freed before it ran")
            return None
        return torch.empty(0, dtype=torch.uint8).set_(alive, at, (nbytes,), (1,))

    return find


class Watch(TorchDispatchMode):
    """Tells the streams of the device that is current then of each op of this thread."""

    def __init__(self, streams: Callable[[], LateStreams]):
        super().__init__()
        self.streams = streams

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.streams()._op(func, args, kwargs or {}, out)
        return out


class PoisonedPool(HostPool):
    """Host memory that is poison whenever it changes hands."""

    def __init__(self, streams: LateStreams, allocate=None):
        more = {} if allocate is None else {"allocate": allocate}
        super().__init__(streams.pin, streams.unpin, **more)
        self.streams = streams

    def take(self, nbytes: int) -> Block | None:
        with LOCK, self.streams._unwatched():
            block = super().take(nbytes)
            if block is not None:
                block.tensor.fill_(POISON)
                at = _address(block.tensor)
                memory = Memory(nbytes, None, lambda: blocks.get(at) is memory, at)
                blocks = self.streams._blocks
                if at in blocks:
                    self.streams.violations.append(f"{memory.name} was given out twice")
                blocks[at] = memory
            return block

    def give(self, block: Block) -> None:
        with LOCK, self.streams._unwatched():
            memory = self.streams._blocks.pop(_address(block.tensor), None)
            if memory is None:
                self.streams.violations.append("a host block was given back twice")
                return
            for access in memory.accesses():
                if not self.streams._before(access, None):
                    self.streams.violations.append(
                        f"{memory.name} was given back while {access[0]} may still use it"
                    )
            block.tensor.fill_(POISON)
            super().give(block)


@contextlib.contextmanager
def late(seed: int, *, streams: LateStreams | None = None, ahead: int = AHEAD, allocate=None, **kw):
    """CPU tensors live on a late device: yields its :class:`Transfer`, whose `streams` are the LateStreams."""
    streams = LateStreams(seed, **kw) if streams is None else streams
    transfer = Transfer(streams, PoisonedPool(streams, allocate), ahead)
    with transfers(cpu=transfer), streams.watch():
        yield transfer
