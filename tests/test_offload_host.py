"""The pool of host memory: blocks never overlap, freed neighbours are joined, and pinning is given up once."""

from __future__ import annotations

import gc
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekern.offload import host
from sparsekern.offload.host import ALIGN, HostPool, available_bytes

SLAB = 8 * ALIGN


@pytest.fixture(autouse=True, scope="module")
def _small_slabs():
    patch = pytest.MonkeyPatch()
    patch.setattr(host, "SLAB", SLAB)
    yield
    patch.undo()


class Machine:
    """Host memory of a size, of which some may be pinned."""

    def __init__(self, nbytes: int = 1 << 40, pinnable: int = 0):
        self.left, self.pinnable = nbytes, pinnable
        self.pinned: list[int] = []  # addresses
        self.pool = HostPool(self.pin, self.unpin, self.allocate)

    def allocate(self, nbytes: int) -> torch.Tensor:
        if nbytes > self.left:
            raise MemoryError
        self.left -= nbytes
        return torch.empty(nbytes, dtype=torch.uint8)

    def pin(self, memory: torch.Tensor) -> bool:
        if memory.nbytes > self.pinnable:
            return False
        self.pinnable -= memory.nbytes
        self.pinned.append(memory.data_ptr())
        return True

    def unpin(self, memory: torch.Tensor) -> None:
        self.pinned.remove(memory.data_ptr())


def check(pool: HostPool, blocks: list) -> None:
    """Blocks and free pieces tile each slab; no two free ones touch."""
    assert pool.used == sum(b.reserved for b in blocks)
    for slab in pool._slabs:
        taken = [(b.at, b.reserved, "taken") for b in blocks if b.slab is slab]
        pieces = sorted([*taken, *((at, size, "free") for at, size in slab.free)])
        assert pieces[0][0] == 0
        assert sum(pieces[-1][:2]) == slab.memory.nbytes
        for (at, size, kind), (next_at, _, next_kind) in pairwise(pieces):
            assert at + size == next_at
            assert (kind, next_kind) != ("free", "free")
    for b in blocks:
        assert b.slab in pool._slabs
        assert not b.nbytes or b.tensor.data_ptr() == b.slab.memory.data_ptr() + b.at
        assert b.at % ALIGN == 0
        assert b.tensor.nbytes == b.nbytes <= b.reserved < b.nbytes + 2 * ALIGN
        assert b.pinned == b.slab.pinned
    assert pool.reserved == sum(s.memory.nbytes for s in pool._slabs)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, 2 * SLAB)),
        st.tuples(st.just("take"), st.integers(0, 3 * ALIGN)),
        st.tuples(st.just("give"), st.integers(0, 100)),
        st.tuples(st.just("shrink"), st.tuples(st.integers(0, 100), st.floats(0, 1))),
        st.tuples(st.just("trim"), st.none()),
    ),
    max_size=60,
)


@given(OPERATIONS, st.integers(0, 20), st.integers(0, 6))
@settings(max_examples=300, deadline=None)
def test_any_order_of_taking_and_giving(operations, slabs, pinnable):
    machine = Machine(slabs * SLAB, pinnable * SLAB)
    pool, blocks = machine.pool, []
    for what, argument in operations:
        if what == "take":
            block = pool.take(argument)
            if block is None:
                assert machine.left < max(-(-argument // ALIGN), 1) * ALIGN
            else:
                assert block.nbytes == argument
                blocks.append(block)
        elif what == "give" and blocks:
            pool.give(blocks.pop(argument % len(blocks)))
        elif what == "shrink" and blocks:
            block = blocks[argument[0] % len(blocks)]
            nbytes = int(block.nbytes * argument[1])
            pool.shrink(block, nbytes)
            assert block.nbytes == nbytes
        elif what == "trim":
            pool.trim()
            assert all(any(b.slab is s for b in blocks) for s in pool._slabs)
        check(pool, blocks)
        assert sorted(machine.pinned) == sorted(
            s.memory.data_ptr() for s in pool._slabs if s.pinned
        )
    while blocks:
        pool.give(blocks.pop())
    check(pool, [])
    assert all(slab.unused for slab in pool._slabs)
    pool.trim()
    assert pool.reserved == 0
    assert machine.pinned == []


def test_freed_memory_is_used_again():
    pool = Machine().pool
    for _ in range(100):
        blocks = [pool.take(3 * ALIGN) for _ in range(4)]
        for i in (1, 3, 0, 2):
            pool.give(blocks[i])
    assert pool.reserved == 2 * SLAB


def test_more_than_a_slab_gets_its_own():
    pool = Machine().pool
    block = pool.take(5 * SLAB + 1)
    assert pool.reserved == 5 * SLAB + ALIGN
    pool.give(block)
    assert pool.take(SLAB).slab is block.slab


def test_less_than_a_slab_where_there_is_no_more():
    machine = Machine(3 * ALIGN)
    assert machine.pool.take(2 * ALIGN).nbytes == 2 * ALIGN
    assert machine.pool.take(2 * ALIGN) is None
    assert machine.pool.take(ALIGN).nbytes == ALIGN


def test_pinned_until_it_is_refused_once():
    machine = Machine(pinnable=2 * SLAB)
    blocks = [machine.pool.take(SLAB) for _ in range(4)]
    assert [b.pinned for b in blocks] == [True, True, False, False]
    machine.pinnable = 10 * SLAB
    assert not machine.pool.take(SLAB).pinned
    for b in blocks:
        machine.pool.give(b)
    assert machine.pool.take(SLAB).pinned  # of the free ones the faster


@pytest.mark.parametrize("allocations", range(1, 12))
def test_blocks_given_back_in_the_middle_of_a_take(allocations):
    """The garbage collector runs at any allocation, and frees what owns a block."""

    class Owner:
        def __init__(self, pool, block):
            self.pool, self.block, self.cycle = pool, block, self

        def __del__(self):
            self.pool.give(self.block)

    pool = Machine().pool
    first, second = pool.take(ALIGN), pool.take(ALIGN)
    threshold = gc.get_threshold()
    gc.collect()
    gc.disable()
    try:
        Owner(pool, first)
        gc.set_threshold(gc.get_count()[0] + allocations, 1, 1)
        gc.enable()
        third = pool.take(ALIGN)
    finally:
        gc.set_threshold(*threshold)
        gc.enable()
    gc.collect()
    check(pool, [second, third])


def test_available_bytes():
    lines = Path("/proc/meminfo").read_text().splitlines()
    (total,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    assert 0 < available_bytes() <= total
