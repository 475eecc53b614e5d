"""What every test shares: strictness, the tiers to test, and all the skips there are, each with what is missing."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. It has to be told before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import sparsekern as sk
from sparsekern import backends
from sparsekern.backends import cpu, cuda_machine, triton
from sparsekern.offload import ActivationOffload, context

COMPILED = cpu.unavailable(torch.device("cpu")) is None
ISAS = cpu.isas() if COMPILED else []
NO_TRITON = triton.unavailable(torch.device("cpu"))
TRANSFORMERS = all(importlib.util.find_spec(name) for name in ("transformers", "accelerate"))

# A fallback to a slower back end is an error in every test; without a compiled core it is all there is.
os.environ.setdefault("SPARSEKERN_STRICT", "1" if COMPILED else "0")
# Products of cuBLAS are the same every time only with this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DATA = {"mnist_path": "mnist.npz", "text_path": "tinyshakespeare.txt"}  # fixture to file


def pytest_addoption(parser):
    parser.addoption(
        "--data",
        type=Path,
        default=Path(__file__).parents[2] / "shared" / "data",
        help="folder with real data that is not in the repository: mnist.npz in Keras's layout, "
        "tinyshakespeare.txt",
    )
    parser.addoption(
        "--cubins",
        action="store_true",
        help="compile every Triton kernel for every architecture too: ten minutes on two cores",
    )
    parser.addoption(
        "--cuda-sources",
        action="store_true",
        help="execute the CUDA sources on the CPU, and compile them with what is here: make cuda",
    )
    parser.addoption(
        "--sanitized",
        action="store_true",
        help="insist that the compiled core in use was built with sanitizers (make sanitize)",
    )


def pytest_configure(config):
    if config.getoption("--sanitized") and not (COMPILED and cpu.sanitized()):
        raise pytest.UsageError("--sanitized: the core in use was built without sanitizers")


def cuda_tools_missing() -> list[str]:
    from test_cuda_compile import tool

    missing = [name for name in ("nvcc", "cuobjdump") if tool(name) is None]
    return missing + (["nvrtc"] if cuda_machine.Nvrtc.missing() else [])


def pytest_collection_modifyitems(config, items):
    skip_cuda = pytest.mark.skip(reason="no CUDA device")
    skip_compiled = pytest.mark.skip(reason="no compiled core")
    skip_triton = pytest.mark.skip(reason=f"no Triton for CPU tensors: {NO_TRITON}")
    skip_cubins = pytest.mark.skip(reason="machine code of every architecture: --cubins")
    skip_sources = pytest.mark.skip(reason="the CUDA sources executed and compiled: make cuda")
    skip_transformers = pytest.mark.skip(reason="no transformers with accelerate")
    skip_compiler = pytest.mark.skip(reason="no C++ compiler")
    peers = {"compressed_tensors"}
    missing_peers = {
        n: pytest.mark.skip(reason=f"no {n}") for n in peers if not importlib.util.find_spec(n)
    }
    sources = config.getoption("--cuda-sources")
    missing = cuda_tools_missing() if sources else []
    missing_tools = {n: pytest.mark.skip(reason=f"no {n}") for n in missing}
    for item in items:
        if "cubins" in item.keywords and not config.getoption("--cubins"):
            item.add_marker(skip_cubins)
        if "cuda_sources" in item.keywords and not sources:
            item.add_marker(skip_sources)
        for name in missing_tools.keys() & item.keywords.keys():
            item.add_marker(missing_tools[name])
        for name in missing_peers.keys() & item.keywords.keys():
            item.add_marker(missing_peers[name])
        if "compiled" in item.keywords and not COMPILED:
            item.add_marker(skip_compiled)
        if "compiler" in item.keywords and not shutil.which(os.environ.get("CXX", "c++")):
            item.add_marker(skip_compiler)
        if "transformers" in item.keywords and not TRANSFORMERS:
            item.add_marker(skip_transformers)
        if "triton" in item.keywords and NO_TRITON:
            item.add_marker(skip_triton)
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip_cuda)
        if "data" in item.keywords:
            names = [name for fixture, name in DATA.items() if fixture in item.fixturenames]
            for name in names:
                if not (config.getoption("--data") / name).exists():
                    reason = f"no {name} in the folder that --data names"
                    item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter):
    """Say how many tests were left out, and why."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons: dict[str, int] = {}
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] = (
            reasons.get(reason.removeprefix("Skipped: "), 0) + 1
        )
    terminalreporter.section("left out")
    terminalreporter.line(f"{len(skipped)} tests were left out")
    for reason, count in sorted(reasons.items()):
        terminalreporter.line(f"  {count}: {reason}")


def on_one_thread():
    """Products of several threads may differ in the last bit from call to call, and with addresses.

    Nets as small as those of tests gain nothing from threads either, and several test processes share the cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


one_thread = pytest.fixture(on_one_thread)  # for each test of its own
module_on_one_thread = pytest.fixture(
    on_one_thread, scope="module"
)  # for fixtures of a module, too


@pytest.fixture
def mnist_path(request) -> Path:
    """The full MNIST in Keras's file layout; mark the test with `data`."""
    return request.config.getoption("--data") / DATA["mnist_path"]


@pytest.fixture
def text_path(request) -> Path:
    """The plays of Shakespeare, 1.1 MB of plain text; mark the test with `data`."""
    return request.config.getoption("--data") / DATA["text_path"]


@pytest.fixture(params=["reference", *ISAS, pytest.param("triton", marks=pytest.mark.triton)])
def backend(request):
    """Each back end that serves CPU tensors, each instruction set of the compiled one: a module of ops."""
    if request.param in ("reference", "triton"):
        yield backends.load(request.param)
        return
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield cpu
    cpu.set_isa(before)


@pytest.fixture
def full(backend) -> bool:
    """Whether the back end is fast enough for the full size of a test; the interpreter takes a part of it."""
    return backend is not triton


@pytest.fixture(
    params=ISAS or [pytest.param("none", marks=pytest.mark.skip(reason="no compiled core"))]
)
def isa(request):
    """Each instruction set of the compiled core, in use for torch.ops.sparsekern during the test."""
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


class Offloads:
    """Makes offloads that take tensors of any size."""

    def __init__(self) -> None:
        self.made: list[ActivationOffload] = []

    def __call__(self, to: str = "cpu", **settings) -> ActivationOffload:
        self.made.append(sk.offload_activations(to, **{"min_bytes": 0, **settings}))
        return self.made[-1]

    def nothing_left(self) -> None:
        """No byte that is counted, no block of host memory, no entry in a table."""
        for transfer in context._transfers.values():
            if transfer.streams.asynchronous:
                torch.accelerator.synchronize()
            transfer.sweep()
            assert transfer.in_flight == 0
            assert transfer.pool.used == 0
        for offload in self.made:
            assert offload.stats.ledger.now == {"plain": 0, "device": 0, "host": 0}
            assert (offload._packed, offload._by_index, offload._kept) == ({}, {}, {})


@pytest.fixture
def offloads():
    """Makes offloads, and insists at the end of the test that nothing is left of what they held."""
    offloads = Offloads()
    yield offloads
    # Of a backward that failed, torch holds the nodes that were ready until the next one comes.
    torch.zeros(1, requires_grad=True).sum().backward()
    gc.collect()
    offloads.nothing_left()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Each device; where sums may come in any order, they do not."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param == "cuda", warn_only=True)
    yield torch.device(request.param)
    torch.use_deterministic_algorithms(before)
