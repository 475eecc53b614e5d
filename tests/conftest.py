"""What every test shares: strictness, the tiers to test, and all the skips there are, each with what is missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from sparsekern import backends
from sparsekern.backends import cpu, cuda_machine

COMPILED = cpu.unavailable(torch.device("cpu")) is None
ISAS = cpu.isas() if COMPILED else []

# A fallback to a slower back end is an error in every test; without a compiled core it is all there is.
os.environ.setdefault("SPARSEKERN_STRICT", "1" if COMPILED else "0")


def pytest_addoption(parser):
    parser.addoption(
        "--data",
        type=Path,
        default=Path(__file__).parents[2] / "shared" / "data",
        help="folder with real data that is not in the repository: mnist.npz in Keras's layout",
    )
    parser.addoption(
        "--sanitized",
        action="store_true",
        help="insist that the compiled core in use was built with sanitizers (make sanitize)",
    )


def pytest_configure(config):
    if config.getoption("--sanitized") and not (COMPILED and cpu.sanitized()):
        raise pytest.UsageError("--sanitized: the core in use was built without sanitizers")


def mnist(config) -> Path:
    return config.getoption("--data") / "mnist.npz"


def cuda_tools_missing() -> list[str]:
    from test_cuda_compile import tool

    missing = [name for name in ("nvcc", "cuobjdump") if tool(name) is None]
    return missing + (["nvrtc"] if cuda_machine.Nvrtc.missing() else [])


def pytest_collection_modifyitems(config, items):
    skip_cuda = pytest.mark.skip(reason="no CUDA device")
    skip_data = pytest.mark.skip(reason="no mnist.npz in the folder that --data names")
    skip_compiled = pytest.mark.skip(reason="no compiled core")
    skip_compiler = pytest.mark.skip(reason="no C++ compiler")
    missing_tools = {n: pytest.mark.skip(reason=f"no {n}") for n in cuda_tools_missing()}
    for item in items:
        for name in missing_tools.keys() & item.keywords.keys():
            item.add_marker(missing_tools[name])
        if "compiled" in item.keywords and not COMPILED:
            item.add_marker(skip_compiled)
        if "compiler" in item.keywords and not shutil.which(os.environ.get("CXX", "c++")):
            item.add_marker(skip_compiler)
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip_cuda)
        if "data" in item.keywords and not mnist(config).exists():
            item.add_marker(skip_data)


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


@pytest.fixture
def mnist_path(request) -> Path:
    """The full MNIST in Keras's file layout; mark the test with `data`."""
    return mnist(request.config)


@pytest.fixture(params=["reference", *ISAS])
def backend(request):
    """Each back end that serves CPU tensors, each instruction set of the compiled one: a module of ops."""
    if request.param == "reference":
        yield backends.load("reference")
        return
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield cpu
    cpu.set_isa(before)


@pytest.fixture(
    params=ISAS or [pytest.param("none", marks=pytest.mark.skip(reason="no compiled core"))]
)
def isa(request):
    """Each instruction set of the compiled core, in use for torch.ops.sparsekern during the test."""
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)
