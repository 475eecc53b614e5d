"""One command for a machine with a GPU and nothing but a clone: build, prove, measure, report.

    python -m benchmarks.gpu --minutes 9

Each part runs in a process of its own within its share of the minutes, so a part that fails, hangs or breaks the
device's context hides none of the others. Nothing is downloaded. The report, with a summary last, goes to
benchmarks/results; the exit code is 1 if a part failed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
MEASURED = ("linear", "memory", "offload")  # modules here with measure(device, seconds, quick)
LEAST_SECONDS = 10
COLUMNS = {  # of the report's tables, in this order, where a row has them
    "op": "",
    "net": "",
    "side": "",
    "dtype": "",
    "M": "",
    "N": "",
    "K": "",
    "MB": ".0f",
    "density": "",
    "cache": "",
    "ms": ".4f",
    "p10": ".4f",
    "p90": ".4f",
    "ratio": ".2f",
    "times": ".2f",
    "GB/s": ".0f",
    "input GB/s": ".0f",
    "TFLOP/s": ".0f",
    "error": ".2f",
    "peak MB": ".0f",
    "ratio packed": ".2f",
    "copy ms": ".2f",
    "hidden": ".0%",
    "wait ms": ".2f",
}


@dataclass(frozen=True)
class Part:
    """A command and its share of the time. `needs` is a program without which it is left out, by name."""

    name: str
    command: list[str]
    share: float
    needs: str = ""


@dataclass
class Outcome:
    part: Part
    status: str  # ok, FAILED, timed out, left out
    seconds: float = 0.0
    tail: str = ""
    found: dict = field(default_factory=dict)


def parts(quick: bool, device: str) -> list[Part]:
    python = sys.executable
    own = [python, "-m", "benchmarks.gpu", "--device", device, *(["--quick"] if quick else [])]
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-e",
    ]
    check = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    return [
        Part("build", [*install, "."], 0.15),
        Part("selftest", [python, "-m", "sparsekern", "selftest"], 0.1),
        Part("tests", [python, "-m", "pytest", "-q", "-x", "-n", "8", "tests"], 0.25),
        Part("memcheck", [*check, "memcheck", *own, "--part", "answers"], 0.08, check[0]),
        Part("racecheck", [*check, "racecheck", *own, "--part", "answers"], 0.08, check[0]),
        *(Part(name, [*own, "--part", name], 0.34 / len(MEASURED)) for name in MEASURED),
    ]


def run(todo: list[Part], seconds: float, say: Callable[[str], None]) -> list[Outcome]:
    """Every part in turn. What one leaves of its share goes to those that come after."""
    outcomes, end = [], time.monotonic() + seconds
    for i, part in enumerate(todo):
        if part.needs and shutil.which(part.needs) is None:
            outcomes.append(Outcome(part, "left out", tail=f"no {part.needs} here"))
            continue
        left = end - time.monotonic()
        limit = max(LEAST_SECONDS, left * part.share / sum(p.share for p in todo[i:]))
        say(f"{part.name}: at most {limit:.0f} s")
        outcomes.append(_run(part, limit))
        say(f"{part.name}: {outcomes[-1].status} in {outcomes[-1].seconds:.0f} s")
    return outcomes


def _run(part: Part, limit: float) -> Outcome:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = part.command
        if "--part" in command:
            command = [*command, "--seconds", str(0.6 * limit), "--json", str(file)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit
            )
            status = "ok" if done.returncode == 0 else f"FAILED ({done.returncode})"
            said = done.stdout + done.stderr
        except subprocess.TimeoutExpired as late:
            status = "timed out"
            said = "".join(
                s.decode() if isinstance(s, bytes) else s or "" for s in (late.stdout, late.stderr)
            )
        except OSError as error:
            status, said = "FAILED", str(error)
        found = {}
        if file.exists():
            found = json.loads(file.read_text())
        tail = "\n".join(said.strip().splitlines()[-12:])
        return Outcome(part, status, time.monotonic() - start, tail, found)


def answers(device: torch.device, seconds: float, quick: bool) -> dict:
    """Known answers of every kernel of every back end here, small: what the sanitizers watch."""
    from sparsekern import backends, ops, selftest

    from .linear import available

    found, wrong = [], {}
    for op, contract in ops.OPS.items():
        for dtype in sorted(contract.dtypes, key=str):
            for name, module in available(op, dtype, device).items():
                reason = selftest.known_answers(module, op, dtype, device)
                found.append({"op": op, "dtype": str(dtype), "side": name})
                if reason:
                    wrong[f"{name} {op} {dtype}"] = reason
    if wrong:
        raise SystemExit("\n".join(f"{k}: {v}" for k, v in wrong.items()))
    if not found and backends.order(device.type) != ("reference",):
        raise SystemExit(f"no back end but the reference serves {device}")
    return {"rows": [], "missing": {}}


def do(name: str, options: argparse.Namespace) -> None:
    """One measuring part, in this process."""
    device = torch.device(options.device)
    module = (
        answers if name == "answers" else importlib.import_module(f"{__package__}.{name}").measure
    )
    found = module(device, options.seconds, options.quick)
    if options.json:
        options.json.write_text(json.dumps(found))


# ---- the report ----


def facts(device: str) -> list[str]:
    lines = [
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"`{' '.join(['python', '-m', 'benchmarks.gpu', *sys.argv[1:]])}`",
    ]
    if device.startswith("cuda"):
        p = torch.cuda.get_device_properties(device)
        lines.insert(
            0, f"{p.name}, {p.multi_processor_count} multiprocessors, {p.total_memory >> 20} MiB"
        )
    for name in ("triton", "cupy"):
        try:
            lines.append(f"{name} {importlib.import_module(name).__version__}")
        except ImportError as error:
            lines.append(f"{name}: {error}")
    for command in (
        ["nvidia-smi", "--query-gpu=driver_version,clocks.sm", "--format=csv,noheader"],
        ["nvcc", "--version"],
    ):
        if shutil.which(command[0]):
            said = subprocess.run(command, capture_output=True, text=True).stdout.strip()
            lines.append(f"{command[0]}: {said.splitlines()[-1] if said else 'silent'}")
    return lines


def table(rows: list[dict]) -> Table:
    found = Table(box=box.MARKDOWN)
    columns = [c for c in COLUMNS if any(c in row for row in rows)]
    for column in columns:
        found.add_column(column, no_wrap=True)
    for row in rows:
        cells = (
            "" if row.get(c) is None else format(row[c], COLUMNS[c]) if COLUMNS[c] else str(row[c])
            for c in columns
        )
        found.add_row(*cells)
    return found


def summary(outcomes: list[Outcome]) -> Table:
    found = Table(box=box.MARKDOWN)
    for column in ("part", "outcome", "seconds", "last line"):
        found.add_column(column)
    for o in outcomes:
        last = o.tail.splitlines()[-1] if o.tail else ""
        found.add_row(o.part.name, o.status, f"{o.seconds:.0f}", last[:120])
    return found


def report(outcomes: list[Outcome], device: str) -> str:
    console = Console(width=260, color_system=None, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(f"# {datetime.date.today().isoformat()}, one GPU: what was proved and measured\n")
    for line in facts(device):
        console.print(f"* {line}")
    for o in outcomes:
        if o.found.get("rows"):
            console.print(f"\n## {o.part.name}\n")
            console.print(table(o.found["rows"]))
        for what, why in o.found.get("missing", {}).items():
            console.print(f"* not measured: {what}: {why}")
        if o.status not in ("ok", "left out"):
            console.print(f"\n## {o.part.name}: {o.status}\n\n```\n{o.tail}\n```")
    console.print("\n## Summary\n")
    console.print(summary(outcomes))
    lines = console.export_text().splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--minutes", type=float, default=9, help="for everything; 9 by default")
    p.add_argument("--device", default="cuda")
    p.add_argument(
        "--out", type=Path, help="the Markdown report; default: dated, in benchmarks/results"
    )
    p.add_argument("--only", nargs="+", help="parts by name")
    p.add_argument(
        "--quick", action="store_true", help="tiny sizes: to see the form, not the numbers"
    )
    p.add_argument("--part", choices=("answers", *MEASURED), help=argparse.SUPPRESS)
    p.add_argument("--seconds", type=float, default=60, help=argparse.SUPPRESS)
    p.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    return p.parse_args(arguments)


def main() -> int:
    options = parsed()
    if options.part:
        do(options.part, options)
        return 0
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device: nothing to measure (--device cpu shows the form)", file=sys.stderr)
        return 2
    todo = parts(options.quick, options.device)
    if options.only:
        unknown = set(options.only) - {p.name for p in todo}
        if unknown:
            print(
                f"--only {', '.join(sorted(unknown))}: it takes {', '.join(p.name for p in todo)}",
                file=sys.stderr,
            )
            return 2
        todo = [p for p in todo if p.name in options.only]
    outcomes = run(
        todo, options.minutes * 60, lambda line: print(line, file=sys.stderr, flush=True)
    )
    text = report(outcomes, options.device)
    name = (
        torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else "cpu"
    )
    stem = f"{datetime.date.today().isoformat()}-gpu-{name.lower().replace(' ', '-')}.md"
    path = options.out or ROOT / "benchmarks" / "results" / stem
    path.write_text(text)
    print(text)
    print(f"written to {path}", file=sys.stderr)
    return 1 if any(o.status not in ("ok", "left out") for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
