"""Compile every kernel and configuration of the Triton back end for a list of GPUs, without one; report what came
out.

    python -m benchmarks.triton_cubins [--arch 80 90 ...] [--only KERNEL ...] [--json]

Per kernel, dtype and configuration: registers, spills, shared memory, instructions, and how wide its loads from
global memory are, read from the machine code. :func:`record` lists the launches that a call of an op makes, without
making them; the model of bytes (``benchmarks.triton_model``) reads the same list.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsekern import ops
from sparsekern.backends import triton as backend
from sparsekern.backends.triton import autotune

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
_POINTER = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


# ---- what an op launches ----


class Launch(NamedTuple):
    """A kernel, its grid, its arguments by name, and the options of the compiler."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    arguments: dict
    options: dict[str, int]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def programs(self) -> int:
        return torch.Size(self.grid).numel()


def record(function: Callable, *args) -> list[Launch]:
    """The launches that function(*args) makes. Nothing is computed: what it returns is left as it was allocated."""
    launches = []

    def note(kernel, *args, grid, warmup=False, **kwargs):
        options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(kernel, grid, named, options))

    kind = type(backend.format_24._pack_24)  # a compiled or an interpreted function
    with mock.patch.object(kind, "run", note):
        function(*args)
    return launches


# ---- what the compiler makes of it ----


class Cubin(NamedTuple):
    """One kernel compiled for one architecture. `loads` counts instructions by their width in bytes."""

    kernel: str
    dtype: str
    config: str
    masked: bool  # compiled for a K that is no multiple of the tile
    arch: int
    registers: int
    spills: int
    shared: int
    instructions: int
    loads: dict[int, int]


def _source(launch: Launch) -> ASTSource:
    """The kernel with the types of its arguments, specialised as Triton does at a launch: ones, multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    annotated = {p.name for p in launch.kernel.params if p.is_constexpr}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if name in annotated or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = _POINTER[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)


def compile_for(launch: Launch, arch: int, dtype: str) -> Cubin:
    """Compile a launch's kernel and read the machine code."""
    compiled = triton.compile(
        _source(launch), target=GPUTarget("cuda", arch, 32), options=launch.options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass, usage = (
            subprocess.run(
                [_BINARIES / "cuobjdump", what, file.name],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            for what in ("-sass", "-res-usage")
        )
    operations = re.findall(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", sass, flags=re.M
    )
    loads = collections.Counter(
        _width(op) for op in operations if op.startswith(("LDG", "LDGSTS", "UTMALDG"))
    )
    tile = {k: v for k, v in launch.arguments.items() if k.startswith("BLOCK")}
    tile |= {k: launch.options[k] for k in OPTIONS[:2] if k in launch.options}
    return Cubin(
        launch.name.lstrip("_"),
        dtype,
        ", ".join(f"{k} {v}" for k, v in tile.items()),
        not launch.arguments.get("EVEN_K", True),
        arch,
        int(re.search(r"REG:(\d+)", usage)[1]),
        sum(op.startswith(("STL", "LDL")) for op in operations),
        compiled.metadata.shared,
        len(operations),
        dict(loads),
    )


def _width(operation: str) -> int:
    """Bytes a thread loads: 4 where the instruction does not say."""
    for part in operation.split("."):
        if part in ("U8", "S8"):
            return 1
        if part in ("U16", "S16"):
            return 2
        if part in ("64", "128", "256"):
            return int(part) // 8
    return 4


# ---- every kernel, every configuration ----

N, K = 4096, 4096
_BY_SIZE = (torch.uint8, torch.int16, torch.int32, torch.int64)


def _formats(dtype: torch.dtype) -> Iterator[Launch]:
    weight = torch.empty(N, K, dtype=dtype)
    values, meta = torch.empty(N, K // 2, dtype=dtype), torch.empty(N, K // 8, dtype=torch.uint8)
    yield from record(backend.prune_24, weight)
    yield from record(backend.prune_24_transposable, weight)
    yield from record(backend.pack_24, weight)
    yield from record(backend.unpack_24, values, meta)
    yield from record(backend.gather_24, weight, meta)


def _products(dtype: torch.dtype, K: int = K) -> Iterator[Launch]:
    """Every configuration; the built-in ones alone for a K that is no multiple of the tiles, and for float16, whose
    code differs from that of bfloat16 in conversions.

    The kernel for few rows is compiled for each number of them, and here for both ends.
    """
    values, meta = torch.empty(N, K // 2, dtype=dtype), torch.empty(N, -(-K // 8)).byte()
    for op, family in autotune.FAMILIES.items():
        for M in (1, 4, 16, 64, 256):
            x, dy = torch.empty(M, K, dtype=dtype), torch.empty(M, N, dtype=dtype)
            arguments = {
                "linear_24": (x, values, meta),
                "linear_24_dx": (dy, values, meta),
                "linear_24_dvalues": (dy, x, meta),
            }[op]
            configs = family.candidates(M, dtype)
            if K % 32 or dtype is torch.float16:
                configs = [family.built_in(M, N, K, dtype, 132)]
            for config in configs:
                if (config.kernel == "few") == (M <= 4):
                    with mock.patch.object(autotune, "config", lambda *_, c=config: c):
                        yield from record(family.launch, *arguments)


def _activations() -> Iterator[Launch]:
    """Bias and activation behind one part of K, and behind several."""
    values, meta = torch.empty(N, K // 2), torch.empty(N, K // 8, dtype=torch.uint8)
    for M, activation in itertools.product((4, 256), ("relu2", "gelu", "silu")):
        yield from record(
            backend.linear_24, torch.empty(M, K), values, meta, torch.empty(N), activation
        )


def _compressions(dtype: torch.dtype) -> Iterator[Launch]:
    x, empty = torch.empty(1 << 20, dtype=dtype), torch.empty(0, dtype=dtype)
    mask, offsets = torch.zeros(1 << 17, dtype=torch.uint8), torch.zeros(256, dtype=torch.int64)
    for determinism in (False, True):
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(determinism)
        yield from record(backend.pack_zvc_out, x, mask, x, offsets, offsets[:1])
        torch.use_deterministic_algorithms(before)
    yield from record(backend.unpack_zvc, mask, empty, offsets.zero_(), list(x.shape))


def everything() -> Iterator[tuple[str, Launch]]:
    """Each kernel that the back end can launch, once per configuration and dtype."""
    for dtype in sorted(ops.FORMAT_DTYPES, key=str):
        yield from ((dtype, launch) for launch in _formats(dtype))
    for dtype in sorted(backend.SERVES["linear_24"], key=str):
        yield from ((dtype, launch) for launch in _products(dtype))
    # Masked where K is no multiple of the tile.
    yield from ((torch.bfloat16, launch) for launch in _products(torch.bfloat16, K - 4))
    yield from ((torch.float32, launch) for launch in _activations())
    for dtype in _BY_SIZE:
        yield from ((dtype, launch) for launch in _compressions(dtype))


def distinct() -> list[tuple[str, Launch]]:
    """`everything` without what compiles to the same."""
    seen, result = set(), []
    for dtype, launch in everything():
        source = _source(launch)
        key = launch.name, str((source.signature, source.constants, source.attrs, launch.options))
        if key not in seen:
            seen.add(key)
            result.append((str(dtype).removeprefix("torch."), launch))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--only", nargs="+", help="names of kernels, without the underscore")
    parser.add_argument("--json", action="store_true", help="a line of JSON per cubin")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled")
    for arch in options.arch:
        for dtype, launch in distinct():
            if options.only and launch.name.lstrip("_") not in options.only:
                continue
            cubin = compile_for(launch, arch, dtype)
            if options.json:
                print(json.dumps(cubin._asdict()), flush=True)
                continue
            loads = " ".join(f"{n}x{width}B" for width, n in sorted(cubin.loads.items()))
            print(
                f"sm_{arch:<4} {cubin.kernel:24} {dtype:9} {cubin.config:66} {cubin.registers:3} registers "
                f"{cubin.spills:2} spills {cubin.shared:6} B shared {cubin.instructions:5} instructions  {loads}",
                flush=True,
            )


if __name__ == "__main__":
    main()
