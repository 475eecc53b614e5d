"""What the numbers depend on besides the code: the CPU, its caches and clock, versions, the bandwidth of its memory."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import sparsekern as sk
from sparsekern.backends import cpu
from sparsekern.bench.clock import Budget
from sparsekern.bench.session import UNKNOWN_CACHE_BYTES, cache_bytes
from sparsekern.info import cpu_name, usable_cores

from .timing import interleave

CPU0 = Path("/sys/devices/system/cpu/cpu0")


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def clock() -> str:
    governor = _read(CPU0 / "cpufreq/scaling_governor")
    khz = _read(CPU0 / "cpufreq/scaling_cur_freq")
    known = re.search(r"^cpu MHz\s*:\s*([\d.]+)", _read(Path("/proc/cpuinfo")) or "", flags=re.M)
    mhz = int(khz) / 1e3 if khz else float(known[1]) if known else None
    return (
        f"governor {governor or 'not readable'}, "
        f"{f'{mhz:.0f} MHz by the kernel' if mhz else 'frequency not readable'}"
    )


def revision() -> str:
    """The commit, with a + where the working tree has changes."""
    root = Path(__file__).parent
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not known"


def facts(threads: list[int]) -> dict[str, str | int | list]:
    cache = cache_bytes()
    pages = _read(Path("/sys/kernel/mm/transparent_hugepage/enabled")) or ""
    chosen_pages = re.search(r"\[(\w+)\]", pages)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "cache_bytes": cache or UNKNOWN_CACHE_BYTES,
        "cache": f"Last-level cache {cache >> 20} MiB"
        if cache
        else f"Last-level cache not readable, {UNKNOWN_CACHE_BYTES >> 20} MiB assumed",
        "clock": clock(),
        "huge_pages": chosen_pages[1] if chosen_pages else "not readable",
        "load": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "sparsekern": sk.__version__,
        "revision": revision(),
        "tier": cpu.isa(),
        "tiers": cpu.isas(),
        "threads": threads,
        "command": shlex.join(["python", "-m", "benchmarks.cpu", *sys.argv[1:]]),
    }


class Others:
    """How many cores everything but this process takes, from now on. A ratio on two threads needs two free cores."""

    def __init__(self) -> None:
        self.start = self._seconds()

    def cores(self) -> float | None:
        if self.start is None or (now := self._seconds()) is None:
            return None
        busy, own, clock = (n - s for n, s in zip(now, self.start, strict=True))
        return max(0.0, busy - own) / max(clock, 1e-9)

    @staticmethod
    def _seconds() -> tuple[float, float, float] | None:
        """Busy seconds of all cores, of this process and its children, and of the clock."""
        ticks = re.match(r"cpu +(.*)", _read(Path("/proc/stat")) or "")
        if not ticks:
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, ticks[1].split()[:8])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        times = os.times()
        return busy, sum(times[:4]), times.elapsed


def read_bandwidth(threads: int, nbytes: int) -> tuple[float, str]:
    """GB/s of the faster of two of torch's reductions over float32 past the cache, and which one it was."""
    a, b = torch.randn(2, nbytes // 8)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    both = torch.randn(nbytes // 4)
    sides = {"sum": lambda i: both.sum(), "dot": lambda i: torch.dot(a, b)}
    samples = interleave(sides, Budget(15, 2.0))
    torch.set_num_threads(before)
    name = min(samples, key=lambda name: statistics.median(samples[name]))
    return nbytes / statistics.median(samples[name]) / 1e6, name
