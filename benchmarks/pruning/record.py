"""What a run on several seeds leaves: finished parts in a folder to go on from, and a dated Markdown file."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

from rich.console import Console

from benchmarks import output
from benchmarks.cpu import machine
from benchmarks.cpu.report import Table

DATA = output.ROOT.parent / "shared" / "data"

Advance = Callable[[str], None]
"""Called after every step of a part, with a few words."""


def parser(name: str, doc: str, file: str) -> argparse.ArgumentParser:
    """The options that the commands share; `file` is the data's."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.pruning.{name}", description=doc)
    add = made.add_argument
    add("--seeds", type=int, default=3, help="how many; each is a part of its own")
    add("--quick", action="store_true", help="tiny runs: the form, not the numbers")
    add("--data", type=Path, default=DATA / file, help=f"{file}, or the like")
    add("--threads", type=int, default=1)
    add("--work", type=Path, default=output.ROOT / "build" / name, help="folder for finished parts")
    add("--out", type=Path, help="the Markdown file; default: a dated one in benchmarks/results")
    return made


def checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    for name in ("seeds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it takes numbers from 1 on")
    if not options.data.is_file():
        parser.error(f"--data {options.data}: there is no such file")
    if options.out and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no such folder")
    options.work.mkdir(parents=True, exist_ok=True)
    return options


def measure(
    parts: dict[str, tuple[dict, int, Callable[[Advance], dict]]], work: Path
) -> tuple[dict[str, dict], bool]:
    """Everything measured, by part, and whether Ctrl-C ended it early.

    Args:
        parts: name to (settings, steps, what measures it). A part that `work` has under the same settings is
            not measured again.
    """
    found: dict[str, dict] = {}
    console = Console(stderr=True)
    with output.progress(console) as progress:
        tasks = {
            n: progress.add_task(n, total=p[1], start=False, note="") for n, p in parts.items()
        }
        try:
            for name, (settings, steps, run) in parts.items():
                path = work / f"{name}.json"
                kept = json.loads(path.read_text()) if path.exists() else {}
                if kept.get("settings") != settings:
                    progress.start_task(tasks[name])
                    revision, start = machine.revision(), time.monotonic()

                    def advance(words: str, name: str = name) -> None:
                        progress.update(tasks[name], advance=1, note=words)
                        if not console.is_terminal:
                            print(f"{name}: {words}", file=sys.stderr, flush=True)

                    result = run(advance)
                    kept = {
                        "settings": settings,
                        "revision": revision,
                        "seconds": time.monotonic() - start,
                        "result": result,
                    }
                    path.write_text(json.dumps(kept, indent=1) + "\n")
                progress.update(tasks[name], completed=steps)
                found[name] = kept
        except KeyboardInterrupt:
            return found, True
    return found, False


def spread(values: list[float], digits: int = 2, sign: str = "") -> str:
    """Mean ± standard deviation of a sample; "+" as `sign` shows it of what is above zero, too."""
    mean = f"{fmean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {stdev(values):.{digits}f}"


def write(
    name: str,
    title: str,
    words: list[str],
    against: list[str],
    tables: list[Table],
    options: argparse.Namespace,
    kept: dict[str, dict],
    interrupted: bool,
) -> Path:
    """The Markdown file: head, `against` the paper as a list, tables; `kept` is of :func:`measure`."""
    f = output.facts(f"benchmarks.pruning.{name}", options.threads)
    if kept:
        f["revision"] = ", ".join(sorted({part["revision"] for part in kept.values()}))
    minutes = sum(part["seconds"] for part in kept.values()) / 60
    head = [
        f"# {f['date']}, {title}",
        f"{output.origin(f)}, {minutes:.0f} minutes. The machine was shared; no other figure depends on its speed.",
        *words,
    ]
    if options.quick:
        head.append("**Quick**: tiny runs. The form is right, the numbers mean nothing.")
    if interrupted:
        head.append("**Interrupted**: what follows is what was done.")
    parts = ["\n\n".join(head) + "\n"]
    if against:
        parts.append("## Against the paper\n\n" + "\n".join(f"* {a}" for a in against) + "\n")
    path = options.out or output.dated(f"{f['date']}-pruning-{name}")
    path.write_text("\n".join(parts + [table.markdown() for table in tables]))
    console = Console()
    for table in tables:
        console.print(table.rich())
    print(f"written to {path}", file=sys.stderr)
    return path
