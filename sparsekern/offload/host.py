"""Host memory for what leaves the device: slabs, cut to size.

A slab is locked ("pinned") once and then reused; locking costs milliseconds, and torch's own pinned
allocator rounds every piece up to a power of two. Blocks are cut first-fit and joined again when freed::

    slab 64 MiB  |####block####|..free..|##block##|...........free............|
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .lock import LOCK

SLAB = 64 << 20  # bytes
ALIGN = 512  # bytes; what a device copies whole


@dataclass(eq=False)
class _Slab:
    memory: Tensor
    pinned: bool
    free: list[tuple[int, int]] = field(default_factory=list)  # (offset, bytes), in order

    def take(self, nbytes: int) -> int | None:
        for i, (at, size) in enumerate(self.free):
            if size >= nbytes:
                if size == nbytes:
                    del self.free[i]
                else:
                    self.free[i] = at + nbytes, size - nbytes
                return at
        return None

    def give(self, at: int, nbytes: int) -> None:
        i = 0
        while i < len(self.free) and self.free[i][0] < at:
            i += 1
        if i < len(self.free) and at + nbytes == self.free[i][0]:
            nbytes += self.free.pop(i)[1]
        if i and sum(self.free[i - 1]) == at:
            at, before = self.free[i - 1]
            self.free[i - 1] = at, before + nbytes
        else:
            self.free.insert(i, (at, nbytes))

    @property
    def unused(self) -> bool:
        return self.free == [(0, self.memory.nbytes)]


class Block:
    """Bytes of host memory. `tensor` views them as uint8; :meth:`HostPool.give` ends it."""

    __slots__ = ("at", "nbytes", "pinned", "reserved", "slab", "tensor")

    def __init__(self, tensor: Tensor, slab: _Slab, at: int, reserved: int):
        self.tensor = tensor
        self.nbytes = tensor.nbytes
        self.slab = slab
        self.at = at
        self.reserved = reserved
        self.pinned = slab.pinned


class HostPool:
    """Blocks of host memory, pinned as long as that is granted, pageable after that.

    Args:
        pin: locks a slab, False where it is refused. From the first refusal on, new slabs are pageable.
        unpin: undoes it.
        allocate: bytes to an uninitialised uint8 tensor on the host; MemoryError or RuntimeError if
            there is none.
    """

    def __init__(
        self,
        pin: Callable[[Tensor], bool],
        unpin: Callable[[Tensor], None],
        allocate: Callable[[int], Tensor] = lambda n: torch.empty(
            n, dtype=torch.uint8, device="cpu"
        ),
    ):
        self._pin, self._unpin, self._allocate = pin, unpin, allocate
        self._slabs: list[_Slab] = []
        # Blocks come back whenever the garbage collector drops their owner, in the middle of a take too.
        self._given: deque[Block] = deque()
        self.pins = True  # until refused

    @property
    def reserved(self) -> int:
        """Bytes of all slabs."""
        return sum(s.memory.nbytes for s in self._slabs)

    @property
    def used(self) -> int:
        """Bytes of all blocks, with what alignment adds."""
        with LOCK:
            self._collect()
            return self.reserved - sum(size for s in self._slabs for _, size in s.free)

    def take(self, nbytes: int) -> Block | None:
        """A block, or None where the machine has no memory for it."""
        reserve = max(ALIGN, -(-nbytes // ALIGN) * ALIGN)
        with LOCK:
            self._collect()
            for slab in self._slabs:
                at = slab.take(reserve)
                if at is not None:
                    return Block(slab.memory[at : at + nbytes], slab, at, reserve)
            slab = self._grow(max(SLAB, reserve))
            if slab is None and reserve < SLAB:
                slab = self._grow(reserve)
            if slab is None:
                return None
            at = slab.take(reserve)
            return Block(slab.memory[at : at + nbytes], slab, at, reserve)

    def _grow(self, nbytes: int) -> _Slab | None:
        try:
            memory = self._allocate(nbytes)
        except (MemoryError, RuntimeError):
            return None
        if self.pins:
            self.pins = self._pin(memory)
        slab = _Slab(memory, self.pins, [(0, nbytes)])
        # Pinned slabs first: they are the faster ones.
        self._slabs.insert(0 if slab.pinned else len(self._slabs), slab)
        return slab

    def give(self, block: Block) -> None:
        """Take a block back. Nothing may be reading or writing it any more.

        Only noted here: finalizers call this, in the middle of this pool's own bookkeeping too.
        """
        self._given.append(block)

    def _collect(self) -> None:
        while self._given:
            block = self._given.popleft()
            block.slab.give(block.at, block.reserved)

    def shrink(self, block: Block, nbytes: int) -> None:
        """Keep the first `nbytes` of a block only."""
        reserve = max(ALIGN, -(-nbytes // ALIGN) * ALIGN)
        with LOCK:
            if reserve < block.reserved:
                block.slab.give(block.at + reserve, block.reserved - reserve)
                block.reserved = reserve
            block.tensor = block.tensor[:nbytes]
            block.nbytes = nbytes

    def trim(self) -> None:
        """Return slabs that no block is in to the operating system."""
        with LOCK:
            self._collect()
            for slab in [s for s in self._slabs if s.unused]:
                self._slabs.remove(slab)
                if slab.pinned:
                    self._unpin(slab.memory)


def available_bytes() -> int | None:
    """Memory that this process could still take: what Linux and its control group say; None where they do not."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        with open("/proc/meminfo") as lines:
            line = next(x for x in lines if x.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        found.append(max(limit - int((group / "memory.current").read_text()), 0))
    return min(found, default=None)
