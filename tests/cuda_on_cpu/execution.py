"""Kernels of ``csrc/cuda`` on CPU tensors: builds them with the C++ compiler, once, and launches them.

Two builds of the same sources:

* ``races``: every access to shared memory is checked against the barriers between lanes, and a byte that nobody
  wrote may not be read. Loaded into this process; an error is an exception.
* ``addresses``: the address sanitizer, which ends the process; only under its runtime (``run_under_sanitizer``).

Both poison shared memory and deliver asynchronous copies at their wait. A build lies in ``build/cuda_on_cpu``, named
after a hash of everything that goes into it.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sparsekern.backends.cuda_launch import H100, Launch

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
HERE = Path(__file__).parent
CXX = os.environ.get("CXX", "c++")

COMMON = [
    "-std=c++17",
    "-DSPARSEKERN_CUDA_ON_CPU",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
]
# Tensors of 16-bit elements are read by the word; kernels declare no variables they do not use on the device.
KERNELS = [
    "-O1",
    "-g1",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
]
VARIANTS = {
    "races": (["-fsanitize=thread"], ["-DCHECK_RACES"], []),
    "addresses": (
        ["-fsanitize=address", "-fno-omit-frame-pointer"],
        ["-DCHECK_ADDRESSES"],
        ["-fsanitize=address"],
    ),
}
SCHEDULES = range(4)  # first come, last come, in turn, by lot; further numbers are further lots


def _runtime(flags: list[str]) -> Path:
    """The runtime's object, shared by all builds of a variant."""
    parts = [p.read_bytes() for p in (*sorted(HERE.glob("runtime.*")), SOURCES / "launch.h")]
    digest = hashlib.sha256(repr((flags, COMMON, CXX, parts)).encode()).hexdigest()[:16]
    output = ROOT / "build" / "cuda_on_cpu" / f"runtime-{digest}.o"
    with open(output.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            fresh = output.with_suffix(".fresh.o")
            _compile(fresh, HERE / "runtime.cpp", ["-O2", "-g1", *flags])
            fresh.replace(output)
    return output


def _compile(output: Path, source: Path, flags: list[str]) -> None:
    command = [CXX, *COMMON, *flags, "-x", "c++", "-c", str(source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def build(variant: str, sources: Path = SOURCES, only: str | None = None) -> Path:
    """The library of kernels, built if it is not there yet. `sources` is a folder like ``csrc/cuda``, whose parent
    holds what it includes; `only` names one file of it."""
    files = sorted(sources.glob(f"{only or '*'}.cu"))
    kernel_flags, runtime_flags, link_flags = VARIANTS[variant]
    digest = hashlib.sha256(repr((VARIANTS[variant], COMMON, KERNELS, CXX, only)).encode())
    headers = [*sources.glob("*.*h"), ROOT / "csrc/layout.h", ROOT / "csrc/cpu/convert.h"]
    for path in sorted([*files, *headers, *HERE.glob("runtime.*")]):
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "cuda_on_cpu" / f"{variant}-{digest.hexdigest()[:16]}"
    library = folder / "kernels.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes of one test run build it once
        if library.exists():
            return library
        objects = [folder / f"{path.stem}.o" for path in files]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            runtime = pool.submit(_runtime, runtime_flags)
            list(pool.map(_compile, objects, files, [[*KERNELS, *kernel_flags]] * len(files)))
        objects = map(str, [*objects, runtime.result()])
        fresh = folder / "fresh.so"
        subprocess.run([CXX, "-shared", *link_flags, *objects, "-o", str(fresh)], check=True)
        fresh.replace(library)
    return library


def plant(name: str, file: str, before: str, after: str, kernels: str) -> Path:
    """A copy of the sources with one fault in it: `before`, which `file` must have exactly once, becomes `after`.
    Of its instantiations only those are kept whose names match `kernels`, a regular expression."""
    folder = ROOT / "build" / "cuda_on_cpu" / "planted" / name / "csrc" / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    for path in SOURCES.iterdir():
        text = path.read_text()
        if path.name == file:
            if text.count(before) != 1:
                raise ValueError(f"{file} has {before!r} {text.count(before)} times")
            lines = text.replace(before, after).splitlines(keepends=True)
            text = "".join(
                line
                for line in lines
                if not line.startswith("SPARSEKERN_KERNEL(") or re.search(kernels, line)
            )
        (folder / path.name).write_text(text)
    (folder.parent / "cpu").mkdir(exist_ok=True)
    for path in ("csrc/layout.h", "csrc/cpu/convert.h"):
        (folder.parents[1] / path).write_text((ROOT / path).read_text())
    (folder.parents[1] / "tests").unlink(missing_ok=True)
    (folder.parents[1] / "tests").symlink_to(ROOT / "tests")
    return folder


class Fault(RuntimeError):
    """The execution found a fault in a kernel: a race, a deadlock, an illegal nibble, an unwaited copy."""


class Execution:
    """A machine of ``backends/cuda_machine.py`` that runs launches on the CPU, each under every schedule it is given.

    `launched` collects the names of the kernels that ran.
    """

    def __init__(self, library: Path, schedules=SCHEDULES) -> None:
        self._library = ctypes.CDLL(str(library))
        self._launch = self._library.cuda_on_cpu_launch
        self._launch.restype = ctypes.c_char_p
        self._launch.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self._launch.argtypes += [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int,
        ]
        self._name = self._library.cuda_on_cpu_kernel
        self._name.restype = ctypes.c_char_p
        self.schedule = 0
        self.launched: set[str] = set()
        # An H100's numbers, so that plans are those of a large device.
        self.device = H100

    def kernels(self) -> list[str]:
        names, i = [], 0
        while name := self._name(i):
            names.append(name.decode())
            i += 1
        return names

    def run(self, launch: Launch, first_block: int = 0, blocks: int | None = None) -> None:
        grid = (ctypes.c_uint * 3)(*launch.grid)
        block = (ctypes.c_uint * 3)(launch.block, 1, 1)
        total = launch.grid[0] * launch.grid[1] * launch.grid[2]
        error = self._launch(
            launch.kernel.encode(),
            grid,
            block,
            launch.shared,
            launch.arguments,
            len(launch.arguments),
            first_block,
            total - first_block if blocks is None else blocks,
            self.schedule,
        )
        self.launched.add(launch.kernel)
        if error:
            raise Fault(f"{launch.kernel}: {error.decode()}")
