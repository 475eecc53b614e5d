"""What the benchmarks show while they run, and what they leave: tables, and dated files in benchmarks/results."""

from __future__ import annotations

import datetime
import itertools
import platform
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import sparsekern as sk
from sparsekern.info import cpu_name

from .cpu import machine

if TYPE_CHECKING:
    from .cpu.report import Table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def dated(stem: str) -> Path:
    """A Markdown file in benchmarks/results that is not there yet: `stem`, numbered from the second on."""
    stems = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
    return next(path for s in stems if not (path := RESULTS / f"{s}.md").exists())


def facts(module: str, threads: int) -> dict[str, str | int]:
    """What the numbers of ``python -m module`` come from."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparsekern": sk.__version__,
        "revision": machine.revision(),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
    }


def origin(facts: dict) -> str:
    """The same in words, for the head of a file."""
    threads = f"{facts['threads']} thread" + "s" * (facts["threads"] != 1)
    return (
        f"`{facts['command']}`: sparsekern {facts['sparsekern']} at {facts['revision']}, torch {facts['torch']}, "
        f"Python {facts['python']}, {facts['cpu']}, {threads}"
    )


def progress(console: Console) -> Progress:
    """A bar per task, which has a field `note` for a few words; nothing where `console` is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def show(head: str, against: Iterable[str], tables: Iterable[Table]) -> None:
    """A file's parts on the terminal; wider than it, rather than folded, where a table needs that.

    Args:
        against: what the numbers come to, as a list.
    """
    narrow, unbounded = Console(), Console(width=1000)
    for text in (head, *(f"* {line}" for line in against)):
        narrow.print(text.replace("**", ""), markup=False, highlight=False)
    for table in tables:
        drawn = table.rich()
        narrow.print(table.words, markup=False, highlight=False)
        Console(width=max(narrow.width, unbounded.measure(drawn).maximum)).print(drawn)
