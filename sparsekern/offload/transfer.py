"""Bytes on their way: from the device to the host and back, ordered by events.

The rules, each with the failure it prevents:

1. A copy waits for the compute stream before it reads what that stream writes.
2. Its source is kept until compute has been ordered behind the copy: a freed source would be handed
   to the next kernel while the copy still reads it.
3. The target of a reload is allocated on the compute stream and the copy waits for that stream, as the
   memory may still be in use there; the copy back also waits for the copy out of the same block.
4. Compute waits for the reload's event at its first use, on the stream that uses it.
5. A host block, or a reload nobody used, returns to its pool only when the events on it have happened.
6. Streams are asked for at every use, never remembered: backward may run on other ones, in other threads.
7. Memory that another stream than its own has used is marked so: freed, it goes back to the stream it was
   allocated on, which knows nothing of the other.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from .host import Block, HostPool
from .lock import LOCK
from .streams import Streams

AHEAD = 256 << 20  # bytes of sources that may wait for their copies before compute waits for them


class Transfer:
    """The two copy directions of one device, the host pool behind them and what is in flight."""

    def __init__(self, streams: Streams, pool: HostPool | None = None, ahead: int = AHEAD):
        self.streams = streams
        self.pool = HostPool(streams.pin, streams.unpin) if pool is None else pool
        self.ahead = ahead
        self._stash: deque[tuple[object, Tensor, object]] = deque()  # (copied, source, its stream)
        self._stashed = 0
        self._limbo: deque[tuple[list, object]] = deque()  # (events, block or tensor): dead, in use

    def now(self) -> tuple:
        """The current stream, and the event of all that is on it now."""
        stream = self.streams.current()
        return stream, self.streams.record(stream)

    def out(self, source: Tensor, compute, made) -> tuple[Block, object] | None:
        """Start copying to the host what stream `compute` has made by the event `made`.

        The block and the event of its arrival, or None where there is no room.
        """
        self.sweep()
        block = self.pool.take(source.nbytes)
        if block is None:
            return None
        s = self.streams
        side = s.side("out")
        with self.all_or_nothing(side, block):
            s.wait(side, made)
            s.copy(block.tensor, source.view(torch.uint8), side)
            copied = s.record(side)
            if s.asynchronous:
                with LOCK:
                    self._stash.append((copied, source, compute))
                    self._stashed += source.nbytes
                self._unstash()
        return block, copied

    def back(self, block: Block, arrived, dtype: torch.dtype, device: torch.device) -> Placed:
        """Start copying a block to the device."""
        s = self.streams
        target = torch.empty(block.nbytes // dtype.itemsize, dtype=dtype, device=device)
        compute, allocated = self.now()
        side = s.side("in")
        with self.all_or_nothing(side):
            s.wait(side, allocated)
            s.wait(side, arrived)
            s.copy(target.view(torch.uint8), block.tensor, side)
            return Placed(target, compute, s.record(side))

    @contextlib.contextmanager
    def all_or_nothing(self, stream, block: Block | None = None):
        """Where queueing breaks off, an interrupt say: what was queued is over before its memory is freed."""
        try:
            yield
        except BaseException:
            self.streams.synchronize(self.streams.record(stream))
            if block is not None:
                self.pool.give(block)
            raise

    def use(self, placed: Placed) -> Tensor:
        """The bytes, on the current stream."""
        self.streams.wait(self.streams.current(), placed.ready)
        return self.lend(placed.tensor, placed.stream)

    def lend(self, t: Tensor, stream) -> Tensor:
        """`t`, which is kept here for `stream`, for the current one; the last to hold it may be we."""
        current = self.streams.current()
        if current != stream:
            self.streams.used_on(t, current)
        return t

    def ask(self, scalars: Tensor) -> Answer:
        """Send a few int64 to the host, behind what is on the compute stream now, without waiting."""
        self.sweep()
        return Answer(self, scalars)

    def retire(self, events: list, what: Block | Tensor) -> None:
        """Free a block, or the target of a reload, once the events have happened: in a later :meth:`sweep`.

        Finalizers call this, at any time: it asks and frees nothing.
        """
        if self.streams.asynchronous:
            self._limbo.append((events, what))
        elif isinstance(what, Block):
            self.pool.give(what)

    def sweep(self) -> None:
        """Free what has become free, the oldest first: most events here are in the order of their streams.

        Asking all of them each time would take, in a backward pass that the host runs ahead of, a time
        that grows with the square of its length.
        """
        s = self.streams
        with LOCK:
            while self._limbo and all(s.done(e) for e in self._limbo[0][0]):
                what = self._limbo.popleft()[1]
                if isinstance(what, Block):
                    self.pool.give(what)
        self._unstash()

    def _unstash(self) -> None:
        s = self.streams
        with LOCK:
            while self._stash and s.done(self._stash[0][0]):
                self._stashed -= self._stash.popleft()[1].nbytes
            while self._stashed > self.ahead:
                copied, source, compute = self._stash[0]
                s.wait(compute, copied)  # compute waits, the host does not
                s.used_on(source, compute)  # the memory may be another stream's
                self._stash.popleft()
                self._stashed -= source.nbytes

    @property
    def in_flight(self) -> int:
        """Sources and dead targets that copies still hold."""
        return len(self._stash) + len(self._limbo)


@dataclass(frozen=True, slots=True)
class Placed:
    """Memory of the device: the stream it was allocated on, and the event from which on it holds what it should."""

    tensor: Tensor
    stream: object
    ready: object


class Answer:
    """A few int64 on their way from the device."""

    __slots__ = ("_arrived", "_block", "_transfer", "_values")

    def __init__(self, transfer: Transfer, scalars: Tensor):
        s = transfer.streams
        self._transfer = transfer
        self._block: Block | None = None
        self._values: list[int] | None = None
        block = transfer.pool.take(scalars.nbytes) if s.asynchronous else None
        if block is None:
            self._values = scalars.tolist()
            return
        compute = s.current()
        with transfer.all_or_nothing(compute, block):
            s.copy(block.tensor, scalars.view(torch.uint8), compute)
            self._arrived = s.record(compute)
        self._block = block

    def ready(self) -> bool:
        return self._values is not None or self._transfer.streams.done(self._arrived)

    def values(self) -> list[int]:
        """Blocks the host until they are here."""
        if self._values is None:
            self._transfer.streams.synchronize(self._arrived)
            self._values = self._block.tensor.view(torch.int64).tolist()
        return self._values

    def __del__(self):
        if getattr(self, "_block", None) is not None:
            self._transfer.retire([self._arrived], self._block)


class Room:
    """Where the parts of one encoding are written.

    On a device, its own memory. Where the device is the host itself, blocks of the pool: they are warm
    from the last step, and a block is cut to size in place.
    """

    def __init__(self, transfer: Transfer, device: torch.device):
        self._transfer = transfer
        self._device = device
        self._blocks: list[Block | None] = []

    def empty(self, n: int, dtype: torch.dtype) -> Tensor:
        block = None
        if not self._transfer.streams.asynchronous:
            block = self._transfer.pool.take(n * dtype.itemsize)
        self._blocks.append(block)
        if block is None:
            return torch.empty(n, dtype=dtype, device=self._device)
        return block.tensor.view(dtype)

    def part(self, i: int, array: Tensor, ledger) -> Part:
        """The i-th array made here, or its beginning, as a part that owns it."""
        block, self._blocks[i] = self._blocks[i], None
        if block is not None:
            self._transfer.pool.shrink(block, array.nbytes)
        else:
            whole = array.untyped_storage().nbytes()
            if array.nbytes < whole - whole // 8:
                array = array.clone()
        return Part(array, self._transfer.now(), self._transfer, ledger, block)

    def __del__(self):
        for block in getattr(self, "_blocks", ()):
            if block is not None:
                self._transfer.pool.give(block)


class Part:
    """One array of an encoded tensor, on the device or on the host, for as long as somebody needs it.

    Several packed objects may hold the same part.

    Args:
        made: the stream that has made it and the event of that.
    """

    __slots__ = (
        "__weakref__",
        "_arrived",
        "_block",
        "_ledger",
        "_lock",
        "_placed",
        "_reload",
        "_reloads",
        "_transfer",
        "device",
        "dtype",
        "nbytes",
    )

    def __init__(
        self, tensor: Tensor, made: tuple, transfer: Transfer, ledger, block: Block | None = None
    ):
        self._placed: Placed | None = Placed(tensor, *made)  # None once it is on the host
        self._transfer = transfer
        self._ledger = ledger
        self._block = block  # its memory, where that is the host's
        self._arrived = None
        self._reload: Placed | None = None
        self._reloads: list = []  # events of copies that read the block
        self._lock = threading.RLock()
        self.dtype, self.device, self.nbytes = tensor.dtype, tensor.device, tensor.nbytes
        ledger.add(device=self.nbytes)

    def move_out(self) -> str:
        """To the host. Why it stays on the device, or "" if it went."""
        if not self._ledger.reserve_host(self.nbytes):
            return "host bytes are at max_host_bytes: what comes stays on the device"
        if self._block is None:
            moved, start = None, time.perf_counter()
            try:
                placed = self._placed
                moved = self._transfer.out(placed.tensor, placed.stream, placed.ready)
            finally:
                if moved is None:
                    self._ledger.add(host=-self.nbytes)
            if moved is None:
                return "the host has no memory left: what comes stays on the device"
            self._block, self._arrived = moved
            self._ledger.copy("out", self.nbytes, time.perf_counter() - start)
        self._placed = None
        self._ledger.add(device=-self.nbytes)
        return ""

    @property
    def pinned(self) -> bool:
        return self._block is not None and self._block.pinned

    def here(self) -> Tensor:
        """The array where it lies now. On a device with streams, only one that has not moved."""
        if self._placed is not None:
            return self._placed.tensor
        return self._block.tensor.view(self.dtype)

    def fetch(self) -> None:
        """Start bringing it back, if it is not here or on its way."""
        with self._lock:
            if self._placed is not None or self._reload is not None:
                return
            transfer, start = self._transfer, time.perf_counter()
            self._reload = transfer.back(self._block, self._arrived, self.dtype, self.device)
            self._ledger.copy("in", self.nbytes, time.perf_counter() - start)
            self._reloads = [e for e in self._reloads if not transfer.streams.done(e)]
            self._reloads.append(self._reload.ready)

    def get(self) -> Tensor:
        """The array on the device, for the current stream. Not kept here: a second call reloads."""
        with self._lock:
            if self._placed is not None:
                return self._transfer.use(self._placed)
            self.fetch()
            tensor = self._transfer.use(self._reload)
            self._reload = None
            return tensor

    def __del__(self):
        if not hasattr(self, "_lock"):
            return
        if self._reload is not None:
            self._transfer.retire([self._reload.ready], self._reload.tensor)
        if self._block is not None:
            self._transfer.retire([self._arrived, *self._reloads], self._block)
        if self._placed is None:
            self._ledger.add(host=-self.nbytes)
        else:
            self._ledger.add(device=-self.nbytes)
