"""One run: its options, its clock, the ceilings it has measured, and the machine it runs on."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import __version__, backends
from ..info import cpu_name, usable_cores
from .clock import Budget, Clock, captured
from .results import Ceiling, Results, Row
from .shapes import Shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNKNOWN_CACHE_BYTES = 64 << 20
CHECKED_ROWS = 64  # of a result, spread over all of it, are compared with float64
WORST_ERROR = 2.0  # times torch's own error: what the library promises


@dataclass(frozen=True)
class Options:
    """What the command line chose.

    Attributes:
        against: names of peers, or None for every one that is here.
        minutes: of measuring, shared out among the cases.
    """

    suites: tuple[str, ...]
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: tuple[int, ...] = (1,)
    against: tuple[str, ...] | None = None
    rounds: int = 15
    minutes: float = 8.0
    check: bool = False
    quick: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """Something to measure: what the progress bar says, its share of the time, and the measurement."""

    label: str
    weight: float
    run: Callable[[Session, Budget], list[Row]]
    trains: bool = False  # needs autograd


@dataclass
class Session:
    options: Options
    clock: Clock
    results: Results
    spare: dict = field(default_factory=dict)  # what the next case may want again

    @functools.cached_property
    def cache_bytes(self) -> int:
        """What buffers that take turns have to be larger than."""
        return 1 << 12 if self.options.quick else cache_bytes() or UNKNOWN_CACHE_BYTES

    @property
    def device(self) -> torch.device:
        return self.options.device

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def wants(self, peer: str) -> bool:
        return self.options.against is None or peer in self.options.against

    @contextlib.contextmanager
    def threads(self, count: int) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def each_threads(self) -> tuple[int, ...]:
        """Numbers of threads to measure with; on a device that is not the host's, one case says all."""
        return self.options.threads if self.on_cpu else self.options.threads[-1:]

    # ---- ceilings ----

    def bandwidth(self, threads: int) -> float:
        """GB/s of a copy of float32 past the cache, bytes read and written."""
        return self._ceiling("copy", "", threads, self._measure_copy)

    def dense_rate(self, dtype: str, threads: int) -> float:
        """GFLOP/s of torch's own large dense product."""
        return self._ceiling("dense", dtype, threads, lambda: self._measure_dense(dtype))

    def bound_ms(self, nbytes: int, flop: int, dtype: str, threads: int) -> float:
        """What the ceilings allow for moving `nbytes` and for half of a dense product's `flop`."""
        bound = nbytes / self.bandwidth(threads) / 1e6
        if flop:
            bound = max(bound, flop / 2 / self.dense_rate(dtype, threads) / 1e6)
        return bound

    def _ceiling(self, kind: str, dtype: str, threads: int, measure: Callable[[], float]) -> float:
        if (rate := self.results.ceiling(kind, dtype, threads)) is None:
            with self.threads(threads):
                rate = measure()
            self.results.ceilings.append(Ceiling(kind, dtype, threads, rate))
        return rate

    def _measure_copy(self) -> float:
        n = (1 << 20 if self.options.quick else max(4 * self.cache_bytes, 64 << 20)) // 4
        a = torch.randn(n, device=self.device)
        b = torch.empty_like(a)
        times = self.clock.interleave({"copy": lambda i: b.copy_(a)}, Budget(15, 1.0))["copy"]
        return 2 * a.nbytes / min(times) / 1e6

    def _measure_dense(self, dtype: str) -> float:
        size = 128 if self.options.quick else 1024 if self.on_cpu else 8192
        x, w = torch.randn(2, size, size, device=self.device).to(DTYPES[dtype])
        times = self.clock.interleave({"dense": lambda i: F.linear(x, w)}, Budget(7, 1.0))["dense"]
        return 2 * size**3 / min(times) / 1e6

    # ---- rows ----

    def row(
        self,
        op: str,
        suite: str,
        case: dict,
        label: str,
        dtype: str,
        threads: int,
        served: tuple[str, str],
    ) -> Row:
        """An empty row; `served` is the back end and the kernel."""
        return Row(op, suite, case, label, dtype, str(self.device), threads, *served)

    def variants(self, sides: dict) -> Iterator[tuple[bool, dict]]:
        """(whether captured, sides): once as they are and, on a CUDA device, once as CUDA graphs."""
        yield False, sides
        if self.device.type == "cuda":
            graphs = {}
            for name, call in sides.items():
                with contextlib.suppress(RuntimeError):  # a peer that cannot be captured
                    graphs[name] = captured(call)
            yield True, graphs

    def backends_for(self, op: str, dtype: torch.dtype) -> dict[str, object]:
        """Our back ends that serve the op here, best first; the reference where there is nothing else."""
        found = {}
        for name in backends.order(self.device.type):
            module = backends.load(name)
            if name == "reference" or module.unavailable(self.device) is not None:
                continue
            if dtype in module.SERVES.get(op, ()):
                found[name] = module
        return found or {"reference": backends.load("reference")}

    def kernel(self, backend: str, op: str, dtype: torch.dtype, shape: Shape | None = None) -> str:
        """The variant of a back end that serves a case: the CPU's tier, Triton's kernel and tile."""
        if backend == "cpu":
            return backends.load("cpu").isa()
        if backend == "triton" and shape is not None:
            from ..backends.triton import autotune

            if op in autotune.FAMILIES:
                chosen = autotune.config(op, shape.M, shape.N, shape.K, dtype, self.device)
                return "-".join(map(str, chosen))
        return ""


def machine(device: torch.device) -> dict[str, str]:
    """What the numbers depend on besides the code."""
    found = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": str(usable_cores()),
        "load": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparsekern": __version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        )
        found["CUDA"] = str(torch.version.cuda)
    cpu = backends.load("cpu")
    if cpu.unavailable(torch.device("cpu")) is None:
        found["tier"] = cpu.isa()
    return found


def cache_bytes() -> int | None:
    """Size of the CPU's last-level cache as the kernel tells it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0").glob("cache/index*/size"):
        with contextlib.suppress(OSError):
            if found := re.fullmatch(r"(\d+)([KMG])", path.read_text().strip()):
                sizes.append(int(found[1]) << {"K": 10, "M": 20, "G": 30}[found[2]])
    return max(sizes, default=None)


# glibc's mallopt parameters, and what it comes to by itself once a process has freed large blocks.
_TRIM, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_DEFAULTS = {_TRIM: 64 << 20, _MMAP_THRESHOLD: 32 << 20, _MMAP_MAX: 65536}


@contextlib.contextmanager
def reused_memory() -> Iterator[None]:
    """Large host tensors take memory that was freed before, instead of pages that fault anew in every call.

    By itself glibc hands every block above 32 MB back to the system when it is freed. Where the C library is
    another, nothing happens.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM, 2**31 - 1)
    try:
        yield
    finally:
        for parameter, value in _DEFAULTS.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


def error_ratio(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> float:
    """RMS error of ours over that of theirs, both against float64."""

    def rms(t: torch.Tensor) -> float:
        return (t.double() - exact).square().mean().sqrt().item()

    return rms(ours) / max(rms(theirs), 1e-300)


def some_rows(n: int, device: torch.device | None = None) -> torch.Tensor:
    """Indices of up to CHECKED_ROWS rows of n, the first and the last among them."""
    return torch.linspace(0, n - 1, min(n, CHECKED_ROWS), device=device).round().long()
