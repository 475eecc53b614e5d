"""Every op on tensors that lie flush against a page nobody may touch: an access outside one ends the process.

Run as a script, this file is that process: `test_memory.py ISA end|start` names each case before it runs it. Inputs are
read-only on top. Outputs that an op allocates are torch's; those that it is given (`pack_zvc_out`) are guarded.
tests/core guards every output and the scratch of the core.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys

import pytest
import torch

from sparsekern import ops
from sparsekern.backends import cpu
from sparsekern.samples import Samples

PAGE = mmap.PAGESIZE
NONE, READ, WRITE = 0, 1, 2  # PROT_*
MAP_PRIVATE_ANONYMOUS = 0x22
DTYPES = {
    **dict.fromkeys(("prune_24", "pack_24", "unpack_24", "gather_24"), ops.FORMAT_DTYPES),
    "prune_24_transposable": ops.FORMAT_DTYPES,
    **dict.fromkeys(
        ("pack_zvc", "pack_zvc_out", "unpack_zvc"),
        (torch.uint8, torch.bfloat16, torch.float32, torch.int64),
    ),
}
PRODUCTS = (torch.float32, torch.float16, torch.bfloat16)


# ---- in the process under test ----


class Guard:
    """Makes copies of tensors at one end of their pages: storage of just the elements that the strides reach."""

    def __init__(self, flush: str) -> None:
        self.flush, self.maps = flush, []
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            *[ctypes.c_int] * 3,
            ctypes.c_long,
        ]
        self.libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def __call__(self, t: torch.Tensor, align: int = 1, write: bool = False) -> torch.Tensor:
        if t.numel() == 0:
            return t
        reach = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        size = reach * t.element_size()
        inner = -(-size // PAGE) * PAGE
        base = self.libc.mmap(None, inner + 2 * PAGE, NONE, MAP_PRIVATE_ANONYMOUS, -1, 0)
        assert base not in (None, ctypes.c_void_p(-1).value)
        self.maps.append((base, inner + 2 * PAGE))
        assert self.libc.mprotect(base + PAGE, inner, READ | WRITE) == 0
        address = base + PAGE + ((inner - size) // align * align if self.flush == "end" else 0)
        # Every element that strides skip over is a NaN, or all ones.
        ctypes.memset(address, 0xFF, size)
        buffer = (ctypes.c_char * size).from_address(address)
        copy = torch.frombuffer(buffer, dtype=t.dtype).as_strided(t.shape, t.stride())
        copy.copy_(t)
        if not write:
            assert self.libc.mprotect(base + PAGE, inner, READ) == 0
        return copy

    def release(self) -> None:
        while self.maps:
            assert self.libc.munmap(*self.maps.pop()) == 0


def same(got, want) -> bool:
    if isinstance(want, torch.Tensor):
        return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (got, want)))
    return all(same(g, w) for g, w in zip(got, want, strict=True))


def layouts(x: torch.Tensor):
    """x, and two tensors of the same elements with gaps and in another order."""
    yield "contiguous", x
    if x.dim() == 2 and x.numel():
        wide = x.new_zeros(x.shape[0], 2 * x.shape[1] + 3)
        yield "every other column", wide[:, : 2 * x.shape[1] : 2].copy_(x)
        yield "column-major", x.T.contiguous().T


def written(op, place, args: tuple) -> list[torch.Tensor]:
    """What pack_zvc_out leaves in its outputs, with all the room there is and with too little."""
    x, mask, values, offsets, count = args
    found = []
    for room in (values.numel(), values.numel() // 3):
        outputs = [place(t.clone()) for t in (mask, values[:room].fill_(1), offsets, count)]
        op(x, *outputs)
        found += [t.clone() for t in outputs]
    return found


def every_op(guard: Guard):
    """The name of a case, what it gives on guarded memory, and what on torch's own."""
    for name in ops.OPS:
        op = getattr(torch.ops.sparsekern, name)
        # The bytes of a prepacked weight start like a tensor of 8-byte elements.
        align = 8 if name in ("unprepack_24", "linear_24_prepacked") else 1
        for dtype in DTYPES.get(name, PRODUCTS):
            for i, (first, *rest) in enumerate(Samples(dtype, torch.device("cpu")).of(name)):
                for layout, x in layouts(first):
                    print(f"{name} {dtype}, sample {i}, {layout}", flush=True)
                    if name == "pack_zvc_out":
                        got = written(op, lambda t: guard(t, write=True), (guard(x), *rest))
                        yield got, written(op, lambda t: t, (first, *rest))
                        continue
                    guarded = (guard(a, align) if isinstance(a, torch.Tensor) else a for a in rest)
                    yield op(guard(x, align), *guarded), op(first, *rest)


def main(isa: str, flush: str) -> None:
    cpu.set_isa(isa)
    guard, cases = Guard(flush), 0
    for threads in (1, 2):
        torch.set_num_threads(threads)
        print(f"on {threads} threads:")
        for got, want in every_op(guard):
            assert same(got, want), "other bits than on memory of torch's own"
            guard.release()
            cases += 1
    print(f"served {cases} cases")


# ---- in pytest ----


def run(*arguments: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run(
        [sys.executable, __file__, *arguments], env=env, capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize("flush", ["end", "start"])
def test_no_op_touches_memory_outside_its_tensors(isa, flush):
    done = run(isa, flush)
    lines = done.stdout.splitlines() or ["nothing ran"]
    assert done.returncode == 0, f"exit code {done.returncode} in: {lines[-1]}\n{done.stderr}"
    assert int(lines[-1].split()[1]) > 1000


if __name__ == "__main__":
    main(*sys.argv[1:])
