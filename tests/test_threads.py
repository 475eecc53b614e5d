"""Threads: the caller's count is obeyed, answers do not depend on it, and concurrent or forked callers are served."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import sparsekern as sk
from sparsekern import reference
from sparsekern.backends import cpu


def raw(t: torch.Tensor) -> bytes:
    return t.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def cases() -> dict:
    """Calls large enough for several threads: a name to a function of no arguments that gives a tuple of tensors."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(300, 400, generator=generator).to(dtype)
        values, meta = reference.pack_24(weight)
        x = torch.randn(530, 400, generator=generator).to(dtype)
        sparse = torch.where(torch.rand(530, 400, generator=generator) < 0.6, 0, x)
        stream = reference.pack_zvc(sparse)
        name = str(dtype).removeprefix("torch.")
        found |= {
            f"linear_24, many rows, {name}": lambda x=x, v=values, m=meta: sk.linear_24(x, v, m),
            f"linear_24, few rows, {name}": lambda x=x[:3], v=values, m=meta: sk.linear_24(x, v, m),
            f"pack_24, {name}": lambda w=weight: sk.pack_24(w, prune=True),
            f"unpack_24, {name}": lambda v=values, m=meta: sk.unpack_24(v, m),
            f"prune_24, {name}": lambda w=weight: sk.prune_24(w),
            f"prune_24_transposable, {name}": lambda w=weight: sk.prune_24_transposable(w),
            f"pack_zvc, {name}": lambda x=sparse: torch.ops.sparsekern.pack_zvc(x),
            f"unpack_zvc, {name}": lambda s=stream, x=sparse: sk.unpack_zvc(*s, list(x.shape)),
        }
    return found


def answer(call) -> list[bytes]:
    out = call()
    return [raw(t) for t in (out if isinstance(out, tuple) else (out,))]


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_answers_do_not_depend_on_the_number_of_threads(isa, restore_threads):
    for name, call in cases().items():
        torch.set_num_threads(1)
        alone = answer(call)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert answer(call) == alone, f"{name} on {threads} threads"


def test_concurrent_callers_get_the_answers_of_one(isa, restore_threads):
    torch.set_num_threads(2)
    calls = list(cases().items())
    alone = {name: answer(call) for name, call in calls}

    def caller(first: int) -> list[str]:
        turn = calls[first:] + calls[:first]  # each caller is at another op
        return [name for _ in range(4) for name, call in turn if answer(call) != alone[name]]

    with ThreadPoolExecutor(6) as pool:
        wrong = [name for names in pool.map(caller, range(0, 12, 2)) for name in names]
    assert wrong == []


# ---- in a process of its own ----

PRELUDE = """
import os, sys, time, torch
import sparsekern as sk
from sparsekern.backends import cpu
torch.set_num_threads(1)
torch.manual_seed(0)
assert cpu.isa() == os.environ["SPARSEKERN_CPU_ISA"]
weight, x = torch.randn(512, 512), torch.randn(600, 512)
values, meta = sk.pack_24(weight, prune=True)
sparse = x.relu()
stream = torch.ops.sparsekern.pack_zvc(sparse)

def calls():
    return [
        sk.linear_24(x, values, meta),
        sk.linear_24(x[:2], values, meta),
        *sk.pack_24(weight, prune=True),
        sk.unpack_24(values, meta),
        *torch.ops.sparsekern.pack_zvc(sparse),
        sk.unpack_zvc(*stream, [600, 512]),
    ]

def answers():
    # Bytes are compared, as torch.equal may itself start threads.
    return [t.contiguous().numpy().tobytes() for t in calls()]

def os_threads():
    return len(os.listdir("/proc/self/task"))

alone = answers()
"""


def run(isa: str, script: str, timeout: int = 120) -> str:
    env = os.environ | {"SPARSEKERN_CPU_ISA": isa, "SPARSEKERN_STRICT": "1"}
    env |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_set_num_threads_is_obeyed(isa):
    out = run(
        isa,
        """
before = os_threads()
for _ in range(3):
    assert answers() == alone
print(os_threads() - before)
for threads in (2, 3):
    torch.set_num_threads(threads)
    assert answers() == alone
    print(os_threads() - before)
""",
    )
    threaded = cpu._cpu.has_openmp()
    assert [int(n) for n in out.split()] == ([0, 1, 2] if threaded else [0, 0, 0])


FORK = """
import multiprocessing, warnings
warnings.simplefilter("ignore")
torch.set_num_threads(2)
assert answers() == alone  # the pool is up

child = os.fork()
if child == 0:
    code = 1
    try:
        code = 0 if answers() == alone and answers() == alone else 2
    finally:
        os._exit(code)
deadline = time.monotonic() + 60
while True:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        break
    if time.monotonic() > deadline:
        os.kill(child, 9)
        os.waitpid(child, 0)
        sys.exit("the forked child hangs")
    time.sleep(0.01)
assert os.waitstatus_to_exitcode(status) == 0, status
assert answers() == alone  # and the parent goes on

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return int(answers() == alone), torch.get_num_threads()

loader = torch.utils.data.DataLoader(
    Items(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60,
    worker_init_fn=lambda i: torch.set_num_threads(2),
)
for right, threads in loader:
    assert right.tolist() == [1, 1]
    assert threads.tolist() == [2, 2]
print("served")
"""


def test_a_forked_child_and_data_loader_workers_are_served(isa):
    assert run(isa, FORK, timeout=240) == "served\n"
