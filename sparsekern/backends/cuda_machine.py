"""Who carries out launches on a device: the module that nvcc built at install, else NVRTC at first use.

NVRTC comes with torch's CUDA wheels (and with CuPy and the CUDA toolkit), the driver with the device; both are called
through ctypes, so neither a compiler nor another package is needed. A kernel is compiled when it is first launched,
and its machine code is kept in ``~/.cache/sparsekern``, under a hash of the sources, the options, the architecture and
the version of NVRTC.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from .cuda_launch import Device, Launch

try:
    from .. import _cuda
except ImportError:
    _cuda = None

LOWEST = (8, 0)  # compute capability: cp.async, mma.sp


class Machine:
    """One device and a way to launch on it. Launches go to torch's current stream there; none waits."""

    device: Device

    def run(self, launch: Launch) -> None:
        raise NotImplementedError


_machines: dict[torch.device, Machine] = {}


def machine(device: torch.device) -> Machine:
    found = _machines.get(device)
    if found is None:
        found = _machines[device] = (Compiled if _cuda else AtFirstUse)(device)
    return found


@contextlib.contextmanager
def instead(device: torch.device, machine: Machine) -> Iterator[None]:
    """`machine` launches for `device` meanwhile. For tests."""
    before = _machines.get(device)
    _machines[device] = machine
    try:
        yield
    finally:
        if before is None:
            del _machines[device]
        else:
            _machines[device] = before


@functools.cache
def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it serves CUDA devices, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LOWEST:
        needs, has = (".".join(map(str, c)) for c in (LOWEST, capability))
        return f"its kernels need compute capability {needs}, {device} has {has}"
    if _cuda is None and (reason := Nvrtc.missing()):
        return f"it was installed without nvcc and cannot compile at first use: {reason}"
    return None


def how() -> str:
    """Where the kernels come from, for ``sparsekern info``."""
    return "built by nvcc at install" if _cuda else "compiled by NVRTC at first use"


class OnDevice(Machine):
    def __init__(self, device: torch.device) -> None:
        self.index = torch.cuda.current_device() if device.index is None else device.index
        p = torch.cuda.get_device_properties(self.index)
        per_block = getattr(p, "shared_memory_per_block_optin", 48 << 10)
        per_multiprocessor = getattr(p, "shared_memory_per_multiprocessor", per_block)
        self.device = Device(p.multi_processor_count, per_block, per_multiprocessor)

    def run(self, launch: Launch) -> None:
        stream = torch.cuda.current_stream(self.index).cuda_stream
        if torch.cuda.current_device() == self.index:
            self.launch(launch, stream)
        else:
            with torch.cuda.device(self.index):
                self.launch(launch, stream)

    def launch(self, launch: Launch, stream: int) -> None:
        raise NotImplementedError


class Compiled(OnDevice):
    """Kernels that nvcc built at install."""

    def launch(self, launch: Launch, stream: int) -> None:
        _cuda.launch(
            launch.kernel, launch.grid, launch.block, launch.shared, launch.arguments, stream
        )


# ---- NVRTC ----

# NVRTC has no C++ library; these are the types that the sources use.
_CSTDINT = """#pragma once
typedef signed char int8_t; typedef unsigned char uint8_t;
typedef short int16_t; typedef unsigned short uint16_t;
typedef int int32_t; typedef unsigned int uint32_t;
typedef long long int64_t; typedef unsigned long long uint64_t; typedef unsigned long long uintptr_t;
"""
_OPTIONS = ("--std=c++17", "--device-as-default-execution-space")


def sources() -> Path:
    """``csrc``: next to this package where it was installed, else in the source tree."""
    package = Path(__file__).parents[1]
    return next(p for p in (package / "csrc", package.parent / "csrc") if (p / "layout.h").exists())


@functools.cache
def headers() -> dict[str, bytes]:
    """What kernels include, by the name they include it by."""
    csrc = sources()
    found = {p.name: p.read_bytes() for p in sorted((csrc / "cuda").glob("*.*h"))}
    return found | {"../layout.h": (csrc / "layout.h").read_bytes(), "cstdint": _CSTDINT.encode()}


class Nvrtc:
    """The runtime compiler, as the library's C functions."""

    def __init__(self, path: str) -> None:
        self.library = ctypes.CDLL(path)
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self.library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = major.value, minor.value

    @classmethod
    @functools.cache
    def open(cls) -> Nvrtc:
        """The first that loads: one that is in the process, that the system finds, that a wheel brought."""
        wheels = (Path(p) for p in sys.path if p)
        found = (str(f) for p in wheels for f in sorted(p.glob("nvidia/*/lib/libnvrtc.so.*")))
        names = ["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12", *found]
        for name in names:
            if "builtins" in name or ".alt." in name:
                continue
            with contextlib.suppress(OSError):
                return cls(name)
        raise OSError(
            "no libnvrtc.so found; torch's CUDA wheels, CuPy and the CUDA toolkit bring it"
        )

    @classmethod
    def missing(cls) -> str | None:
        try:
            cls.open()
        except OSError as error:
            return str(error)
        return None

    def _check(self, code: int, log: str = "") -> None:
        if code:
            raise RuntimeError(f"NVRTC: {self.library.nvrtcGetErrorString(code).decode()}\n{log}")

    def compile(self, source: str, kernel: str, architecture: str) -> tuple[bytes, bytes]:
        """Machine code of one instantiation of ``csrc/cuda/SOURCE.cu``, and its name there."""
        lib, program = self.library, ctypes.c_void_p()
        text = (sources() / "cuda" / f"{source}.cu").read_bytes()
        text += b"\nusing namespace sparsekern;\nusing namespace sparsekern::cuda;\n"
        names, bodies = list(headers()), list(headers().values())
        array = ctypes.c_char_p * len(names)
        self._check(
            lib.nvrtcCreateProgram(
                ctypes.byref(program),
                text,
                f"{source}.cu".encode(),
                len(names),
                array(*bodies),
                array(*(n.encode() for n in names)),
            )
        )
        try:
            self._check(lib.nvrtcAddNameExpression(program, kernel.encode()))
            options = [o.encode() for o in (*_OPTIONS, f"--gpu-architecture=sm_{architecture}")]
            code = lib.nvrtcCompileProgram(
                program, len(options), (ctypes.c_char_p * len(options))(*options)
            )
            self._check(code, self._text(program, "ProgramLog") if code else "")
            lowered = ctypes.c_char_p()
            self._check(lib.nvrtcGetLoweredName(program, kernel.encode(), ctypes.byref(lowered)))
            return self._bytes(program, "CUBIN"), bytes(lowered.value)
        finally:
            lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        room = ctypes.create_string_buffer(size.value)
        self._check(getattr(self.library, f"nvrtcGet{what}")(program, room))
        return room.raw

    def _text(self, program: ctypes.c_void_p, what: str) -> str:
        return self._bytes(program, what).rstrip(b"\0").decode(errors="replace")


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsekern"


def compiled(source: str, kernel: str, architecture: str) -> tuple[bytes, bytes]:
    """As :meth:`Nvrtc.compile`, from the cache on disk if it is there."""
    nvrtc = Nvrtc.open()
    parts = [kernel, architecture, _OPTIONS, nvrtc.version, sorted(headers().items())]
    digest = hashlib.sha256(repr(parts).encode())
    digest.update((sources() / "cuda" / f"{source}.cu").read_bytes())
    path = cache_folder() / f"{digest.hexdigest()}.cubin"
    if path.exists():
        name, _, cubin = path.read_bytes().partition(b"\n")
        return cubin, name
    cubin, name = nvrtc.compile(source, kernel, architecture)
    with contextlib.suppress(OSError):  # a home that cannot be written to: compiled anew next time
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(name + b"\n" + cubin)
        fresh.replace(path)
    return cubin, name


class AtFirstUse(OnDevice):
    """Kernels that NVRTC compiles when they are first launched."""

    _MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.functions: dict[str, ctypes.c_void_p] = {}
        major, minor = torch.cuda.get_device_capability(self.index)
        # Machine code of 9.0 and later may use what only that very architecture has.
        self.architecture = f"{major}{minor}{'a' if major >= 9 else ''}"

    def launch(self, launch: Launch, stream: int) -> None:
        function = self.functions.get(launch.kernel)
        if function is None:
            function = self.functions[launch.kernel] = self._load(launch)
        room = ctypes.create_string_buffer(launch.arguments, len(launch.arguments))
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(room))
        block = (launch.block, 1, 1)
        self._check(
            launch,
            self.driver.cuLaunchKernel(
                function,
                *(ctypes.c_uint(n) for n in (*launch.grid, *block, launch.shared)),
                ctypes.c_void_p(stream),
                arguments,
                None,
            ),
        )

    def _load(self, launch: Launch) -> ctypes.c_void_p:
        cubin, name = compiled(launch.source, launch.kernel, self.architecture)
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(launch, self.driver.cuModuleLoadData(ctypes.byref(module), cubin))
        self._check(launch, self.driver.cuModuleGetFunction(ctypes.byref(function), module, name))
        if launch.shared > 48 << 10:
            self._check(
                launch,
                self.driver.cuFuncSetAttribute(function, self._MAX_DYNAMIC_SHARED, launch.shared),
            )
        return function

    def _check(self, launch: Launch, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{launch.kernel}: {(text.value or b'').decode()} ({code})")
