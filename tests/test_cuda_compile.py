"""What the compilers make of the CUDA sources, without a device: every kernel for every listed architecture, by nvcc
and by NVRTC, and what must and must not be in the machine code.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sparsekern.backends import cuda_launch, cuda_machine

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
FILES = sorted(path.stem for path in SOURCES.glob("*.cu"))
ARCHITECTURES = (SOURCES / "architectures.txt").read_text().split()

pytestmark = pytest.mark.cuda_sources


def tool(name: str) -> str | None:
    """nvcc, cuobjdump: on the path, in the toolkit's folder, or from a wheel."""
    folders = [Path("/usr/local/cuda/bin"), *sorted(Path("/usr/local").glob("cuda-*/bin"))]
    folders += [f for p in sys.path if p for f in sorted(Path(p).glob("nvidia/*/bin"))]
    found = (str(f / name) for f in folders if (f / name).exists())
    return shutil.which(name) or next(found, None)


@functools.cache
def cubin(file: str, architecture: str) -> tuple[Path, str]:
    """Machine code of a file and what ptxas said about it; built once for the same sources."""
    nvcc = tool("nvcc")
    digest = hashlib.sha256((nvcc + architecture).encode())
    for path in [SOURCES / f"{file}.cu", *sorted(SOURCES.glob("*.*h")), ROOT / "csrc/layout.h"]:
        digest.update(path.read_bytes())
    output = (
        ROOT / "build" / "cuda_compile" / f"{file}-{architecture}-{digest.hexdigest()[:16]}.cubin"
    )
    log = output.with_suffix(".txt")
    if not log.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        command = [
            nvcc,
            "-std=c++17",
            "--expt-relaxed-constexpr",
            "-cubin",
            f"-arch=sm_{architecture}",
        ]
        command += [
            "-Xptxas",
            "-v",
            "-Werror",
            "all-warnings",
            str(SOURCES / f"{file}.cu"),
            "-o",
            str(output),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        log.write_text(done.stderr)
    return output, log.read_text()


DTYPES = ("f32", "f16", "bf16", "f64", "i8", "u8")  # csrc/layout.h


def template_ids(mangled: list[str]) -> list[str]:
    """Kernels as ``SPARSEKERN_KERNEL`` names them, for functions of the machine code."""
    text = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout
    text = re.sub(r"\(sparsekern::DType\)(\d)", lambda m: f"DType::{DTYPES[int(m[1])]}", text)
    return [
        re.sub(r"^(void )?sparsekern::cuda::|\(sparsekern.*$", "", line)
        for line in text.splitlines()
    ]


def statistics(log: str) -> dict[str, tuple[int, int]]:
    """Kernel to registers and bytes spilled, from ptxas's report."""
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    names = template_ids([name for name, *_ in found])
    return {
        name: (int(registers), int(stores) + int(loads))
        for name, (_, stores, loads, registers) in zip(names, found, strict=True)
    }


def registers_of(kernel: str) -> int:
    return cuda_launch.registers(cuda_launch.Launch("", kernel, (1, 1, 1), 32, 0, b""))


@pytest.mark.nvcc
@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_nvcc(file, architecture):
    """Compiles without a warning; no kernel spills; registers leave room for the blocks that are promised."""
    _, log = cubin(file, architecture)
    found = statistics(log)
    registered = re.findall(
        r"^SPARSEKERN_KERNEL\(", (SOURCES / f"{file}.cu").read_text(), re.MULTILINE
    )
    assert len(found) == len(registered)
    for name, (registers, spilled) in found.items():
        assert spilled == 0, f"{name} spills {spilled} bytes"
        limit = registers_of(name)
        assert registers <= limit, f"{name} takes {registers} registers, {limit} are promised"


@functools.cache
def machine_code(file: str, architecture: str) -> dict[str, list[str]]:
    """Kernel to instructions, one a string."""
    path, _ = cubin(file, architecture)
    text = subprocess.run(
        [tool("cuobjdump"), "-sass", str(path)], capture_output=True, text=True, check=True
    ).stdout
    functions = re.split(r"Function : (\w+)", text)[1:]
    instruction = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
    names = template_ids(functions[::2])
    return {n: instruction.findall(b) for n, b in zip(names, functions[1::2], strict=True)}


def with_op(instructions: list[str], op: str) -> list[str]:
    return [i for i in instructions if re.search(rf"(^|\s){op}\b", i)]


@pytest.mark.nvcc
@pytest.mark.cuobjdump
@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_nothing_in_local_memory(file, architecture):
    for name, code in machine_code(file, architecture).items():
        assert code, name
        assert not with_op(code, "LDL[.A-Z0-9]*") + with_op(code, "STL[.A-Z0-9]*"), name


@pytest.mark.nvcc
@pytest.mark.cuobjdump
@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_many_rows_machine_code(architecture):
    """Sparse tensor-core instructions, operands by ldmatrix, copies of 16 bytes where the kernel says so."""
    for name, code in machine_code("linear_24_sm80", architecture).items():
        # 2 steps of 4 x 8 or 4 x 4 tiles
        assert len(with_op(code, r"HMMA\.SP\.16832\.F32[.BF16]*")) >= (
            64 if "128" in name else 32
        ), name
        assert with_op(code, r"LDSM\.16\.M88\.4"), name
        wide = with_op(code, r"LDGSTS\.E\.BYPASS\.128[.A-Z0-9]*")
        assert bool(wide) == (not name.endswith("0>")), name  # kBy4
    assert len(machine_code("linear_24_sm80", architecture)) == 12


# The upper word of the descriptor of a load as createpolicy makes it, evict first for the fraction 1.0: 0x12f00000,
# from sm_90a on put together as (0x120 | 0xf) << 20.
EVICT_FIRST = re.compile(r"0x12f00000|UMOV UR\d+, 0x120\b")


@pytest.mark.nvcc
@pytest.mark.cuobjdump
@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_few_rows_machine_code(architecture):
    """Weights are loaded by 16 bytes, past the L1 and first to leave the L2."""
    kernels = {
        n: c
        for n, c in machine_code("linear_24_decode_sm80", architecture).items()
        if "decode" in n
    }
    assert len(kernels) == 28
    for name, code in kernels.items():
        weights = with_op(code, r"LDG\.E[.A-Z0-9]*\.128[.A-Z0-9]*")
        assert len(weights) == 18, (
            name
        )  # eight of values and one of meta, twice: before the loop and in it
        assert all("desc[" in load for load in weights), name
        assert any(EVICT_FIRST.search(i) for i in code), name
        assert len(with_op(code, r"HMMA\.SP\.16832\.F32[.BF16]*")) >= 8, name


@pytest.mark.nvcc
@pytest.mark.cuobjdump
@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_few_rows_fp32_machine_code(architecture):
    """Copies of 16 bytes, those of weights first to leave the L2; shared memory is read by 16 bytes."""
    kernels = machine_code("linear_24_decode_fma", architecture)
    assert len(kernels) == 5
    for name, code in kernels.items():
        copies = with_op(code, r"LDGSTS[.A-Z0-9]*")
        assert all(".BYPASS" in c and ".128" in c for c in copies), name
        assert any(EVICT_FIRST.search(i) for i in code), name
        tokens = min(int(re.search(r"<(\d+)>", name)[1]), 32)
        assert len(with_op(code, r"LDS[.U]*\.128")) >= 4 + 2 * tokens, name  # weights, x
        assert len(with_op(code, "FFMA")) >= 32 * tokens, name


@pytest.mark.nvcc
@pytest.mark.cuobjdump
@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_many_rows_tf32_machine_code(architecture):
    """Tensor-core instructions of tf32, four steps of all tiles of a warp; operands by ldmatrix."""
    kernels = machine_code("linear_24_tf32_sm80", architecture)
    assert len(kernels) == 4
    for name, code in kernels.items():
        assert len(with_op(code, r"HMMA\.1688\.F32\.TF32")) >= (64 if "128" in name else 32), name
        assert with_op(code, r"LDSM\.16\.M88\.4"), name
        wide = with_op(code, r"LDGSTS\.E\.BYPASS\.128[.A-Z0-9]*")
        assert bool(wide) == (not name.endswith("0>")), name  # kBy4


@pytest.mark.nvrtc
@pytest.mark.timeout(900)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc(architecture):
    """The same sources by the run-time compiler, one instantiation at a time."""
    nvrtc = cuda_machine.Nvrtc.open()
    kernels = [
        (file, name)
        for file in FILES
        for name in re.findall(
            r"^SPARSEKERN_KERNEL\((.+)\);", (SOURCES / f"{file}.cu").read_text(), re.MULTILINE
        )
    ]
    assert len(kernels) > 70

    def compile(kernel):
        cubin, name = nvrtc.compile(*kernel, architecture)
        return cubin.startswith(b"\x7fELF") and name in cubin

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        assert all(pool.map(compile, kernels))


@pytest.mark.nvrtc
def test_cache(tmp_path, monkeypatch):
    """Compiled once; another architecture is another entry."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = cuda_machine.compiled("prepack_24", "prepack_24", "80")
    monkeypatch.setattr(cuda_machine.Nvrtc, "compile", None)  # would fail
    assert cuda_machine.compiled("prepack_24", "prepack_24", "80") == first
    with pytest.raises(TypeError):
        cuda_machine.compiled("prepack_24", "prepack_24", "90a")
