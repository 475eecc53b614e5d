"""Everything the CPU back end promises, measured against torch on this machine.

    python -m benchmarks.cpu [--section NAME ...] [--out FILE] [--json FILE] [--plot FILE.png]

Writes one Markdown file with what was measured, on which machine, by which command and how far from the targets, and
prints the same. Ctrl-C ends the measuring; what was done until then is written. How it times is told in timing.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sparsekern.backends import cpu
from sparsekern.bench.clock import Budget

from .. import output
from . import formats, linear, machine, report, zvc
from .timing import DTYPES, Cell

SECTIONS = {
    "linear": "linear_24 against F.linear where the targets are",
    "peers": "the other ways torch has to such a product",
    "sweep": "every M: is anything slower than dense?",
    "backward": "the gradients",
    "formats": "pruning, packing and back, against clone",
    "zvc": "zero-value compression against copying",
    "codecs": "zero-value compression beside general compressors",
}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    words = "; ".join(f"{name}: {what}" for name, what in SECTIONS.items())
    add("--section", nargs="+", choices=[*SECTIONS, "all"], default=["all"], help=words)
    add("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="zvc has its own")
    add("--threads", type=int, nargs="+", default=[1, 2])
    add("--rounds", type=int, default=15, help="per cell, at most")
    add("--seconds", type=float, default=4.0, help="per cell, after which three rounds do")
    add("--quick", action="store_true", help="tiny sizes: to see the form, not the numbers")
    add("--isa", help="force a tier of ours, such as avx2")
    add("--out", type=Path, help="the Markdown file; default: a dated one in benchmarks/results")
    add("--json", type=Path, help="all numbers, for programs")
    add("--plot", type=Path, help="a picture of the ratios over M")
    options = parser.parse_args()
    if min(options.threads) < 1 or options.rounds < 1:
        parser.error("--threads and --rounds take numbers from 1 on")
    if cpu.unavailable(torch.device("cpu")):
        parser.error(cpu.unavailable(torch.device("cpu")))
    if options.isa and options.isa not in cpu.isas():
        parser.error(f"--isa is {options.isa}; this machine takes one of {', '.join(cpu.isas())}")
    for path in (options.out, options.json, options.plot):
        if path and not path.parent.is_dir():
            parser.error(f"{path}: there is no such folder")
    options.section = list(SECTIONS) if "all" in options.section else options.section
    options.floats = [d for d in options.dtype if DTYPES[d].is_floating_point]
    options.budget = Budget(options.rounds, options.seconds)
    return options


def cells(options: argparse.Namespace, cache_bytes: int) -> list[Cell]:
    found: list[Cell] = []
    if "linear" in options.section:
        found += linear.linear_cells(options, cache_bytes)
    if "peers" in options.section:
        found += linear.peer_cells(options, cache_bytes)
    if "sweep" in options.section:
        found += linear.sweep_cells(options, cache_bytes)
    if "backward" in options.section:
        found += linear.backward_cells(options, cache_bytes)
    if "formats" in options.section:
        found += formats.cells(options, cache_bytes)
    return found + list(zvc.cells(options, cache_bytes))  # zvc and codecs share their data


def measure(work: list[Cell], results: report.Results) -> None:
    """Runs the cells one by one into `results`; Ctrl-C ends it early."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        speed_estimate_period=300,
        disable=not console.is_terminal,
    )
    task = progress.add_task("", total=sum(cell.cost for cell in work))
    start, done, others = time.monotonic(), 0, machine.Others()
    try:
        with progress, torch.inference_mode():
            for cell in work:
                progress.update(task, description=f"{done}/{len(work)} {cell.label}")
                try:
                    results.rows += map(report.judge, cell.run())
                except Exception as error:  # one broken cell must not cost the others
                    results.failed.append(f"{cell.label}: {type(error).__name__}: {error}")
                done += 1
                progress.advance(task, cell.cost)
                if not console.is_terminal:
                    passed = time.monotonic() - start
                    print(
                        f"{passed:6.0f} s {done}/{len(work)} {cell.label}",
                        file=sys.stderr,
                        flush=True,
                    )
    except KeyboardInterrupt:
        results.interrupted = f"{done} of {len(work)} cells"
    results.seconds, results.others = time.monotonic() - start, others.cores()


def stem(facts: dict) -> str:
    """Of the dated file."""
    name = re.sub(r"\(r\)|\(tm\)|\bcpu\b|@.*", " ", facts["cpu"].lower())
    name = "-".join(re.findall(r"[a-z0-9]+", name))
    return f"{facts['date']}-{name}-{facts['cores']}-cores"


def main() -> int:
    # A slower back end that steps in is an error: nobody should time the reference by accident.
    os.environ.setdefault("SPARSEKERN_STRICT", "1")
    options = parsed()
    if options.isa:
        cpu.set_isa(options.isa)
    torch.manual_seed(0)
    facts = machine.facts(options.threads)
    buffer_bytes = 1 << 20 if options.quick else 8 * facts["cache_bytes"]
    cache_bytes = 1 << 12 if options.quick else facts["cache_bytes"]
    results = report.Results(
        machine=facts,
        bandwidth={t: machine.read_bandwidth(t, buffer_bytes) for t in options.threads},
        settings={"rounds": options.rounds, "seconds": options.seconds, "quick": options.quick},
    )
    measure(cells(options, cache_bytes), results)
    path = options.out or output.dated(stem(facts))
    path.write_text(report.markdown(results))
    if options.json:
        options.json.write_text(json.dumps(results.as_json(), indent=1) + "\n")
    output.show(report.head(results), (), report.tables(results))
    if options.plot:
        from .plot import plot  # matplotlib is there for this alone

        plot(results, options.plot)
    print(f"written to {path}", file=sys.stderr)
    return 130 if results.interrupted else 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
