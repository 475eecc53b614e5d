"""What `sparsekern info` knows: this machine, and which back end serves which op here, and why.

* :func:`facts` gathers everything as plain data, which is also what ``--json`` prints.
* :func:`show` draws it as tables.
* :func:`markdown_table` is op × back end × dtype as the back ends declare it, the same on every
  machine; README.md holds a copy.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import backends, ops, selftest

# The order in which dtypes are listed, and their short names.
_SHORT = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int8: "int8",
    torch.uint8: "uint8",
}

# Ratios of medians at 2048 x 2048 weights and 4 Mi elements, fp32 and bf16, 2 cores with AVX-512.
REFERENCE_COST = (
    "the reference is plain torch: against the compiled core, pruning, packing and compression are "
    "5 to 240 times slower, a product of one token 60 to 80 times, of 16 tokens 4 to 11 times, of "
    "256 tokens up to 2 times (2 cores, AVX-512)"
)


# ---- versions, devices, the compiled core ----


def _installed(package: str) -> str | None:
    """The version of a package, or None. CuPy's wheels are named after their CUDA version."""
    names = (package, "cupy-cuda12x", "cupy-cuda13x") if package == "cupy" else (package,)
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _versions() -> dict[str, str | None]:
    return {
        "sparsekern": _installed("sparsekern"),
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "triton": _installed("triton"),
        "cupy": _installed("cupy"),
    }


def cpu_name() -> str:
    """The model of the CPU, as the kernel names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cuda_name(device: torch.device) -> str:
    """Name and compute capability: what a measurement on it holds for."""
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.major}.{properties.minor}"


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # counts what this process may use, not what there is
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _devices() -> list[dict]:
    devices: list[dict] = [
        {
            "device": "cpu",
            "name": cpu_name(),
            "cores": usable_cores(),
            "torch_threads": torch.get_num_threads(),
        }
    ]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "device": f"cuda:{i}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
            }
        )
    return devices


def _core() -> dict:
    """The compiled core: is it there, is it threaded, which instruction sets it found and uses."""
    cpu = backends.load("cpu")
    missing = cpu.unavailable(torch.device("cpu"))
    if missing is not None:
        return {"present": False, "reason": missing}
    from . import _cpu

    return {
        "present": True,
        "openmp": _cpu.has_openmp(),
        "tier": cpu.isa(),
        "tiers": cpu.isas(),
        "features": list(_cpu.features()),
    }


# ---- which back end serves which op ----


def _present(device_type: str) -> list[torch.device]:
    if device_type == "cpu":
        return [torch.device("cpu")]
    if device_type == "cuda":
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return []


_UNAVAILABLE = "is unavailable: "
_NOT_THESE = "does not take"  # the dtypes follow


def why_not(name: str, op: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a back end does not serve `op` for `dtype` on `device`; None if it does.

    The questions of :func:`sparsekern.backends.resolve`, answered in words and without its
    warnings. The last one runs the known-answer test, milliseconds per op and dtype.
    """
    if name not in backends.order(device.type):
        return f"left out by SPARSEKERN_BACKEND={os.environ.get('SPARSEKERN_BACKEND')}"
    if name == "reference":
        return None
    if reason := backends.load(name).unavailable(device):
        return f"{_UNAVAILABLE}{reason}"
    if op not in backends.load(name).SERVES:
        return "has none of its own"
    if dtype not in selftest.dtypes_served(name, op):
        return _NOT_THESE
    if reason := backends._self_test(name, op, dtype, str(device)):
        return f"switched off, it failed its self-test: {reason}"
    return None


def _served(op: str, device: torch.device) -> dict:
    """For one op on one device: each back end with the dtypes it serves, and who was passed over."""
    serves: dict[str, list[torch.dtype]] = {}
    passed_over: dict[tuple[str, str], list[torch.dtype]] = {}
    for dtype in _sorted(ops.OPS[op].dtypes):
        for name in backends.row(device.type):
            reason = why_not(name, op, dtype, device)
            if reason is None:
                serves.setdefault(name, []).append(dtype)
                break
            passed_over.setdefault((name, reason), []).append(dtype)
    return {
        "device": str(device),
        "op": op,
        "serves": [{"backend": n, "dtypes": _plain(d)} for n, d in serves.items()],
        "passed_over": [
            {"backend": name, "dtypes": _plain(dtypes), "reason": reason}
            for (name, reason), dtypes in passed_over.items()
        ],
    }


def _plain(dtypes: Iterable[torch.dtype]) -> list[str]:
    return [str(d).removeprefix("torch.") for d in dtypes]


def _sorted(dtypes: Iterable[torch.dtype]) -> list[torch.dtype]:
    order = list(_SHORT)
    return sorted(dtypes, key=lambda d: (order.index(d) if d in _SHORT else len(order), str(d)))


# ---- what is missing, and what that costs ----


def _missing(core: dict) -> Iterator[dict[str, str]]:
    if not core["present"]:
        yield {"what": "the compiled CPU core", "why": core["reason"], "costs": REFERENCE_COST}
    else:
        if not core["openmp"]:
            yield {
                "what": "threads in the compiled CPU core",
                "why": "it was built by a compiler without OpenMP",
                "costs": "CPU kernels run on one core of "
                f"{usable_cores()}; reinstall with a compiler that has OpenMP",
            }
        best = core["tiers"][0]
        if core["tier"] != best:
            yield {
                "what": f"the {best} kernels",
                "why": f"SPARSEKERN_CPU_ISA={os.environ.get('SPARSEKERN_CPU_ISA', '')} chose "
                f"{core['tier']}",
                "costs": "slower CPU kernels; unset it to use the best this CPU has",
            }
    for device_type, names in backends.TABLE.items():
        devices = _present(device_type)
        if not devices:
            yield {
                "what": f"a {device_type.upper()} device",
                "why": _why_no_cuda() if device_type == "cuda" else "torch finds none",
                "costs": "every op runs on the CPU instead",
            }
        for device in devices:
            for name in names:
                # The CPU core is reported above, with its own cost.
                if name in ("cpu", "reference"):
                    continue
                if reason := backends.load(name).unavailable(device):
                    yield {
                        "what": f"the {name} back end on {device}",
                        "why": reason,
                        "costs": f"the next back end serves: {', '.join(_after(name, names))}",
                    }
    absent = [p for p in ("matplotlib", "mlxtend", "safetensors") if not _importable(p)]
    if absent:
        yield {
            "what": ", ".join(absent),
            "why": "not installed",
            "costs": "`sparsekern demo` does not run; pip install 'sparsekern[demo]'",
        }


def _after(name: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return names[names.index(name) + 1 :]


def _importable(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    return "torch is built with CUDA but finds no device"


# ---- everything, as data ----


def cuda_kernels(N: int, K: int) -> list[dict]:
    """What the CUDA back end launches for linear_24 of aligned tensors, and why: on the devices here, else on as many
    multiprocessors as an H100 has."""
    from .backends import cuda_launch as plan
    from .backends.cuda_machine import OnDevice

    devices = {str(device): OnDevice(device).device for device in _present("cuda")}
    if not devices:
        devices = {"no device here, 132 multiprocessors": plan.H100}
    rows = []
    for name, device in devices.items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for M in (1, 8, 16, 32, 64, 512, 4096):
                o = plan.Operands(M, N, K, x=16, x_stride=K, x_step=1, values=16, meta=16, y=16)
                launch, why = plan.explain_linear_24(device, dtype, o, backends.allows_tf32(dtype))
                row = {"device": name, "dtype": _SHORT[dtype], "M": M, "N": N, "K": K}
                rows.append(row | {"kernel": launch.kernel, "why": why})
    return rows


def facts(kernels: tuple[int, int] | None = None) -> dict:
    """Everything `sparsekern info` prints, as plain data; `kernels` adds those of CUDA for a weight [N, K].

    Raises:
        ValueError: a SPARSEKERN_ variable has a value that it does not take.
    """
    backends.order("cpu")  # refuses a SPARSEKERN_BACKEND that nobody knows
    core = _core()
    asked = {} if kernels is None else {"cuda_kernels": cuda_kernels(*kernels)}
    return asked | {
        "versions": _versions(),
        "devices": _devices(),
        "core": core,
        "environment": selftest.environment(),
        "ops": [
            _served(op, device)
            for device_type in backends.TABLE
            for device in _present(device_type)
            for op in ops.OPS
        ],
        "absent_devices": [
            {"device": device_type, "order": list(names)}
            for device_type, names in backends.TABLE.items()
            if not _present(device_type)
        ],
        "missing": list(_missing(core)),
    }


# ---- as tables ----


def show(found: dict, console: Console) -> None:
    """Draw what :func:`facts` found."""
    console.print(_machine_table(found))
    for device in dict.fromkeys(row["device"] for row in found["ops"]):
        console.print(_ops_table(device, [r for r in found["ops"] if r["device"] == device]))
    for absent in found["absent_devices"]:
        console.print(
            f"{absent['device']}: no such device here. Back ends in order: "
            f"{', '.join(absent['order'])}.\n"
        )
    if rows := found.get("cuda_kernels"):
        console.print(_kernels_table(rows))
    console.print(_missing_table(found["missing"]))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _machine_table(found: dict) -> Table:
    table = _table("This machine", "", "")
    table.show_header = False
    for name, version in found["versions"].items():
        table.add_row(name, version or Text("not installed" if name != "torch's CUDA" else "none"))
    table.add_section()
    for device in found["devices"]:
        details = (
            f"{device['cores']} cores, torch uses {device['torch_threads']} threads"
            if device["device"] == "cpu"
            else f"compute capability {device['capability']}, "
            f"{device['multiprocessors']} multiprocessors, "
            f"{device['memory_bytes'] / 2**30:.0f} GiB"
        )
        table.add_row(device["device"], f"{device['name']}, {details}")
    table.add_section()
    core = found["core"]
    if core["present"]:
        others = ", ".join(t for t in core["tiers"] if t != core["tier"]) or "none"
        table.add_row(
            "compiled core", "present, " + ("threaded (OpenMP)" if core["openmp"] else "one thread")
        )
        table.add_row("instruction set", f"{core['tier']} in use; others here: {others}")
        table.add_row(
            "CPU features", ", ".join(core["features"]) or "none that the kernels ask for"
        )
    else:
        table.add_row("compiled core", Text(f"missing: {core['reason']}", style="red"))
        table.add_row("CPU features", "not known without the compiled core")
    table.add_section()
    for name, value in found["environment"].items():
        table.add_row(name, Text(value) if value else Text("not set", style="dim"))
    return table


def _ops_table(device: str, rows: list[dict]) -> Table:
    table = _table(f"Who serves what on {device}", "op", "back end", "dtypes", "passed over")
    notes: dict[str, None] = {}  # an ordered set: what would fill the table if every row said it
    for row in rows:
        passed = []
        for p in row["passed_over"]:
            reason = p["reason"]
            if reason == _NOT_THESE:
                reason += f" {_compact(p['dtypes'])}"
            elif reason.startswith(_UNAVAILABLE):
                notes[f"{p['backend']} {reason}."] = None
                reason = "is unavailable"
            passed.append(f"{p['backend']} {reason}")
        for i, served in enumerate(row["serves"]):
            slow = served["backend"] == "reference"
            if slow and passed:
                notes[f"Costs: {REFERENCE_COST}."] = None
            table.add_row(
                row["op"] if i == 0 else "",
                Text(served["backend"], style="yellow" if slow else "green"),
                _compact(served["dtypes"]),
                Text("\n".join(passed) if i == 0 else "", style="dim"),
            )
    table.caption = Text("\n".join(notes), style="dim")
    table.caption_justify = "left"
    return table


def _kernels_table(rows: list[dict]) -> Table:
    title = f"linear_24 in the CUDA back end, N = {rows[0]['N']}, K = {rows[0]['K']}"
    table = _table(title, "device", "dtype", "M", "kernel", "why")
    for row in rows:
        table.add_row(*(Text(str(row[key])) for key in ("device", "dtype", "M", "kernel", "why")))
    table.caption = Text("On request: SPARSEKERN_BACKEND=cuda.", style="dim")
    table.caption_justify = "left"
    return table


def _missing_table(missing: list[dict[str, str]]) -> Table | str:
    if not missing:
        return "Nothing is missing."
    table = _table("What is missing, and what it costs", "what", "why", "costs")
    for row in missing:
        table.add_row(*(Text(row[key]) for key in ("what", "why", "costs")))
    return table


# ---- as Markdown, from the declarations alone ----


def _compact(dtypes: Iterable[torch.dtype | str]) -> str:
    """Dtypes in few words: 'fp32, fp16, bf16'; 'all of 1, 2, 4, 8 bytes'."""
    found = {getattr(torch, d) if isinstance(d, str) else d for d in dtypes}
    if found >= ops.ZVC_DTYPES:
        sizes = sorted({d.itemsize for d in found})
        return f"all of {', '.join(map(str, sizes))} bytes"
    return ", ".join(_SHORT.get(d, str(d).removeprefix("torch.")) for d in _sorted(found)) or "–"


def markdown_table() -> str:
    """Op × back end × dtype as GitHub Markdown, from TABLE, SERVES and OPS: the same on every machine."""
    devices: dict[str, list[str]] = {}  # back end to the device types it is listed for
    for device_type, names in backends.TABLE.items():
        for name in names:
            devices.setdefault(name, []).append(device_type)
    devices["reference"] = devices.pop("reference", [])  # last: it is what is left
    heads = [
        f"`{name}` ({'any device' if name == 'reference' else ', '.join(types)})"
        for name, types in devices.items()
    ]
    lines = [["op", *heads], ["---"] * (1 + len(heads))]
    for op in ops.OPS:
        cells = [_compact(selftest.dtypes_served(name, op)) for name in devices]
        lines.append([f"`{op}`", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
