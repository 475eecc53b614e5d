"""What the rows come to, as tables for the terminal and for a Markdown file. Losses are as plain as wins."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .clock import Spread
from .compare import Change
from .results import Results, Row

TITLES = {
    "linear_24": "Products",
    "pack_24": "The 2:4 formats",
    "zvc": "Zero-value compression",
    "offload": "Activation offload, one training step",
}
EXPLAINED = {
    "linear_24": "TFLOP/s are dense-equivalent, 2MNK over our time; *share* is of what the measured copy bandwidth and "
    "half of the measured dense rate allow.",
    "pack_24": "GB/s count what is read and written; *share* is of the measured copy bandwidth. Both sides write to "
    "memory that was freed before.",
    "zvc": "GB/s count what is read and written; *share* is of the measured copy bandwidth. `pack_zvc_out` writes to "
    "room that is there, as `copy_` does; `unpack_zvc` allocates what it returns, as `clone` does.",
    "offload": "`without` is the same step without the context. *less* is how many times fewer bytes are held for "
    "backward at the peak.",
}
WORTH_SAYING = 0.97  # a median ratio below this is counted as a loss


def tables(results: Results) -> list[tuple[str, str, list[str], list[list[str]]]]:
    """(title, words, head, lines) per suite that was measured."""
    found = []
    for suite, title in TITLES.items():
        rows = [row for row in results.rows if row.suite == suite and row.ms]
        if rows:
            found.append((title, _words(suite, rows), *_lines(suite, rows)))
    return found


def _words(suite: str, rows: list[Row]) -> str:
    missing: dict[str, str] = {}
    for row in rows:
        missing |= {name: p.missing for name, p in row.peers.items() if p.missing}
    measured = {name for row in rows for name, p in row.peers.items() if p.ratio}
    absent = [f"{name} ({why})" for name, why in missing.items() if name not in measured]
    words = "Ratios are a peer's time over ours in the same round, median [10 %, 90 %]: above 1 ours is faster. "
    words += EXPLAINED[suite]
    return words + (f" Not here: {'; '.join(absent)}." if absent else "")


def _lines(suite: str, rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    peers = list(dict.fromkeys(name for row in rows for name, p in row.peers.items() if p.ratio))
    checked = any(row.error is not None or row.exact is not None for row in rows)
    packs = any(row.compression for row in rows)
    head = [
        "op",
        "case",
        "dtype",
        "threads",
        "back end",
        "ms [10 %, 90 %]",
        "GB/s",
        "TFLOP/s",
        "share",
    ]
    if suite == "offload":
        head = head[:4] + head[5:6]
    head += ["less" if suite == "offload" else "compression"] * packs + ["check"] * checked
    head += [f"{name} / ours" for name in peers]
    lines = []
    for row in rows:
        served = " ".join(filter(None, [row.backend, row.kernel, "graph" if row.graph else ""]))
        line = [row.op, row.label, row.dtype, str(row.threads), served, _interval(row.ms)]
        line += [
            _number(row.gbs),
            _number(row.tflops),
            "" if row.share is None else f"{row.share:.0%}",
        ]
        if suite == "offload":
            line = line[:4] + line[5:6]
        line += [_number(row.compression)] * packs + [_check(row)] * checked
        line += [_interval(row.peers[p].ratio if p in row.peers else None) for p in peers]
        lines.append(line)
    if not any(row.tflops for row in rows) and "TFLOP/s" in head:
        at = head.index("TFLOP/s")
        head, lines = head[:at] + head[at + 1 :], [line[:at] + line[at + 1 :] for line in lines]
    return head, lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _interval(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{_number(spread.median)} [{_number(spread.p10)}, {_number(spread.p90)}]"


def _check(row: Row) -> str:
    if row.wrong:
        return "WRONG"
    if row.error is not None:
        return f"error {row.error:.2f}"
    return "" if row.exact is None else "exact"


def losses(rows: Iterable[Row]) -> list[str]:
    """Every row that is slower than its first peer, in words."""
    found = []
    for row in rows:
        name, peer = next(((n, p) for n, p in row.peers.items() if p.ratio), ("", None))
        if peer and peer.ratio.median < WORTH_SAYING and row.suite != "offload":
            sure = "" if peer.ratio.high < 1 else ", within the spread"
            where = f"{row.op} {row.label} {row.dtype}, threads: {row.threads}, {row.backend} {row.kernel}"
            found.append(f"{where.strip()}: {peer.ratio.median:.2f} of {name}'s speed{sure}")
    return found


def head(results: Results) -> list[str]:
    m = results.machine
    where = m.get("device") or f"{m['cpu']}, {m['cores']} cores"
    facts = "; ".join(
        f"{k} {v}" for k, v in m.items() if k not in ("cpu", "cores", "device", "date")
    )
    rates = [
        f"copy, threads: {c.threads}: {c.rate:.1f} GB/s"
        if c.kind == "copy"
        else f"dense {c.dtype}, threads: {c.threads}: {c.rate / 1e3:.3g} TFLOP/s"
        for c in results.ceilings
    ]
    lines = [
        f"{where}. {facts}.",
        f"Measured in {results.seconds / 60:.1f} minutes by `{results.command}`. Random normal values. The sides of a "
        "comparison take turns, a cold cache before each.",
        f"Ceilings measured in this run: {'; '.join(rates) or 'none'}.",
    ]
    compared = [
        r for r in results.rows if r.suite != "offload" and any(p.ratio for p in r.peers.values())
    ]
    slower = losses(compared)
    lines.append(f"{len(slower)} of {len(compared)} rows are slower than the first of their peers.")
    lines += [f"* slower: {line}" for line in slower]
    lines += [f"* WRONG: {row.op} {row.label} {row.dtype}: {row.wrong}" for row in results.wrong]
    lines += [f"* failed: {failure}" for failure in results.failed]
    if results.interrupted:
        lines.append(f"Interrupted after {results.interrupted}; what follows is what was done.")
    return lines


def show(results: Results, console: Console) -> None:
    for line in head(results):
        style = "red" if line.startswith(("* WRONG", "* failed")) else None
        console.print(Text(line.replace("`", ""), style or ""))
    for title, words, columns, lines in tables(results):
        console.print()
        drawn = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            drawn.add_column(Text(column), justify="left" if i < 2 else "right", no_wrap=True)
        for line in lines:
            drawn.add_row(*(Text(cell, "red" if cell == "WRONG" else "") for cell in line))
        console.print(Text(words.replace("`", "").replace("*", "")))
        _print_whole(drawn, console)


def _print_whole(drawn: Table, console: Console) -> None:
    """Wider than the terminal rather than folded, where a table needs that."""
    narrow = console.width
    console.width = max(narrow, Console(width=1000).measure(drawn).maximum)
    console.print(drawn)
    console.width = narrow


def markdown(results: Results) -> str:
    parts = [f"# {results.machine['date']}, sparsekern bench", *_paragraphs(head(results))]
    for title, words, columns, lines in tables(results):
        rows = [columns, ["---"] * len(columns), *lines]
        body = "\n".join(f"| {' | '.join(line)} |" for line in rows)
        parts += [f"## {title}", words, body]
    return "\n\n".join(parts) + "\n"


def _paragraphs(lines: list[str]) -> list[str]:
    """Lines that are items of one list stay together."""
    found: list[str] = []
    for line in lines:
        if line.startswith("* ") and found and found[-1].startswith("* "):
            found[-1] += f"\n{line}"
        else:
            found.append(line)
    return found


def show_changes(changes: list[Change], alone: list[str], console: Console) -> None:
    drawn = Table(
        title="Then and now", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold"
    )
    for name in ("row", "relative to", "then", "now", "speed", "verdict"):
        drawn.add_column(
            name, justify="left" if name in ("row", "relative to", "verdict") else "right"
        )
    colours = {"faster": "green", "slower": "red", "no difference": ""}
    for c in sorted(changes, key=lambda c: c.ratio):
        unit = " ms" if c.against == "the clock" else ""
        drawn.add_row(
            Text(c.key),
            Text(c.against),
            f"{c.then.median:.3g}{unit}",
            f"{c.now.median:.3g}{unit}",
            f"{c.ratio:.2f} x",
            Text(c.verdict, colours[c.verdict]),
        )
    _print_whole(drawn, console)
    for line in alone:
        console.print(Text(line))
    counts = {v: sum(c.verdict == v for c in changes) for v in colours}
    console.print(", ".join(f"{n} {v}" for v, n in counts.items()))
