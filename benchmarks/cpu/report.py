"""What the rows come to: targets and verdicts, ceilings, and the tables, as Markdown and on the terminal."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rich import box
from rich.table import Table as RichTable

from sparsekern.bench.clock import Spread

from .timing import IDENTITY, Row

# (must, stretch) of the ratio, the same on one and two threads. Products by (op, dtype, M, N, K); linear_24_prepacked
# has to reach what linear_24 has to where it has no line of its own.
_SQUARE, _WIDE = (4096, 4096), (14336, 4096)
TARGETS = {
    ("linear_24", "fp32", 1024, *_SQUARE): (1.5, 1.75),
    ("linear_24_prepacked", "fp32", 1024, *_SQUARE): (1.7, 2.0),
    ("linear_24", "bf16", 1024, *_SQUARE): (1.35, 1.55),
    ("linear_24", "fp16", 256, *_SQUARE): (4.0, 5.0),
    ("linear_24", "fp32", 1, *_WIDE): (1.6, 2.0),
    ("linear_24", "bf16", 1, *_WIDE): (2.0, 3.0),
    ("linear_24", "fp16", 1, *_WIDE): (1.25, 1.6),
    ("linear_24", "fp32", 4, *_WIDE): (2.5, 4.0),
    ("linear_24", "bf16", 4, *_WIDE): (1.35, 1.8),
    ("linear_24", "fp32", 16, *_WIDE): (1.0, None),
    ("linear_24_prepacked", "fp32", 16, *_WIDE): (2.0, 3.0),
    ("linear_24", "bf16", 16, *_WIDE): (1.0, None),
    ("linear_24_prepacked", "bf16", 16, *_WIDE): (1.4, 1.9),
    ("linear_24", "fp16", 16, *_WIDE): (1.75, 2.5),
    ("linear_24", "fp32", 64, *_WIDE): (1.0, None),
    ("linear_24_prepacked", "fp32", 64, *_WIDE): (1.75, 2.3),
    ("linear_24", "bf16", 64, *_WIDE): (1.0, None),
    ("linear_24_prepacked", "bf16", 64, *_WIDE): (1.4, 1.6),
    ("linear_24", "fp16", 64, *_WIDE): (3.0, 4.5),
}
AVX2_TARGETS = {("linear_24_prepacked", "fp32", 1024, *_SQUARE): (1.4, 1.7)}
ZVC_TARGET_BYTES = 64 << 20
ZVC_TARGETS = {
    ("pack_zvc_out", 0.5): (1.25, 1.5),
    ("pack_zvc_out", 0.9): (1.5, 1.8),
    ("unpack_zvc", 0.5): (1.2, 1.5),
    ("unpack_zvc", 0.9): (1.5, 1.9),
}
SMALL_M = 16  # up to here reading the weight is the cost, and bytes are what to compare
SLOWER = 1.0


def targets(row: Row) -> tuple[float | None, float | None]:
    """(must, stretch) of a row, None for what is not set."""
    case, none = row.case, (None, None)
    if row.section == "linear" and row.tier != "portable":
        shape = (row.dtype, case["M"], case["N"], case["K"])
        table = AVX2_TARGETS if row.tier == "avx2" else TARGETS
        return table.get((row.op, *shape), table.get(("linear_24", *shape), none))
    if row.section == "backward" and (case["N"], case["K"]) == _SQUARE:
        return 1.0, None
    if row.section == "zvc" and row.more["input_bytes"] == ZVC_TARGET_BYTES:
        # Against a clone on fresh memory most of the time is page faults, whatever the kernel does.
        return none if row.baseline == "clone" else ZVC_TARGETS.get((row.op, case["zeros"]), none)
    return none


def says_nothing_new(row: Row) -> bool:
    """The line of a prepacking that is the identity, unless it has more to reach than linear_24."""
    plain = dataclasses.replace(row, op="linear_24")
    return row.note == IDENTITY and targets(row) == targets(plain)


def verdict(ratio: float, must: float | None, stretch: float | None) -> str:
    if must is None:
        return ""
    if stretch is not None and ratio >= stretch:
        return ">= stretch"
    return ">= must" if ratio >= must else "below"


def judge(row: Row) -> Row:
    row.must, row.stretch = targets(row)
    if row.ratio is not None:
        row.verdict = verdict(row.ratio.median, row.must, row.stretch)
    return row


def ceilings(rows: Iterable[Row]) -> dict[tuple[str, int], tuple[float, str]]:
    """(dtype, threads) to the best GFLOP/s of a dense product of torch's in this run, and which product that was."""
    best: dict[tuple[str, int], tuple[float, str]] = {}
    for row in rows:
        if row.flop and row.baseline_ms:
            rate = row.flop / row.baseline_ms.median / 1e6
            where = f"{row.baseline}, {_shape(row)}"
            key = row.dtype, row.threads
            best[key] = max(best.get(key, (0.0, "")), (rate, where))
    return best


# ---- tables ----


@dataclass
class Table:
    title: str
    words: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"## {self.title}\n\n{self.words}\n\n{body}\n"

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, box=box.SIMPLE_HEAD, title_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column.replace("[", r"\["), justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*(cell.replace("**", "").replace("[", r"\[") for cell in row))
        return table


@dataclass
class Results:
    """Everything measured; the JSON file is this."""

    machine: dict
    bandwidth: dict[int, tuple[float, str]]  # threads to GB/s and the reduction that reached it
    settings: dict
    rows: list[Row] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    interrupted: str = ""
    seconds: float = 0.0
    others: float | None = None  # cores that other processes took meanwhile

    def as_json(self) -> dict:
        found = dataclasses.asdict(self)
        found["ceilings"] = [
            {"dtype": dtype, "threads": threads, "gflops": rate, "product": product}
            for (dtype, threads), (rate, product) in ceilings(self.rows).items()
        ]
        return found


def _shape(row: Row) -> str:
    return " x ".join(str(row.case[letter]) for letter in "MNK" if letter in row.case)


def _ms(spread: Spread | None) -> str:
    return f"{spread.median:.3g}" if spread else "–"


def _number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def _ratio(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    text = f"{spread.median:.2f} [{spread.p10:.2f}, {spread.p90:.2f}]"
    return f"**{text}**" if spread.median < SLOWER else text


def _judged(row: Row) -> list[str]:
    shown = f"**{row.verdict}**" if row.verdict == "below" else row.verdict
    return [_number(row.must), _number(row.stretch), shown]


def _exact(row: Row) -> str:
    return {True: "yes", False: "**NO**", None: "–"}[row.exact]


def _products(results: Results, section: str, title: str, words: str) -> Table:
    ceiling = ceilings(results.rows)
    columns = "op | dtype | M | N x K | threads | tier | dense, ms | ours, ms | dense / ours [p10, p90] | rounds | "
    columns += "error / torch's | GFLOP/s (of ceiling) | GB/s (of read) | byte bound | must | stretch | verdict | note"
    table = Table(title, words, columns.split(" | "))
    for row in (r for r in results.rows if r.section == section and not says_nothing_new(r)):
        rate = row.flop / row.ours_ms.median / 1e6
        share = rate / ceiling[row.dtype, row.threads][0]
        speed, bound = "–", "–"
        if row.bytes and row.case["M"] <= SMALL_M:
            gbs = row.bytes / row.ours_ms.median / 1e6
            speed = f"{gbs:.1f} ({gbs / results.bandwidth[row.threads][0]:.0%})"
            bound = f"{row.baseline_bytes / row.bytes:.2f}"
        table.rows.append(
            [
                f"`{row.op}`",
                row.dtype,
                str(row.case["M"]),
                f"{row.case['N']} x {row.case['K']}",
                str(row.threads),
                row.tier,
                _ms(row.baseline_ms),
                _ms(row.ours_ms),
                _ratio(row.ratio),
                str(row.rounds),
                _number(row.error),
                f"{rate:.0f} ({share:.0%})",
                speed,
                bound,
                *_judged(row),
                row.note,
            ]
        )
    return table


def _linear(results: Results) -> Table:
    words = (
        "Dense is `F.linear`. GFLOP/s are dense-equivalent, 2MNK over our time; the share is of the measured "
        "dense ceiling and may pass 100 %. Up to M = 16: GB/s of values, meta, x and y, and their share of the "
        "measured read bandwidth, which is also the share of the byte bound on our time; `byte bound` is dense "
        "bytes over ours, the ratio of two sides that do nothing but move bytes."
    )
    if any(row.note == IDENTITY for row in results.rows):
        words += (
            " Where prepacking is the identity, linear_24_prepacked is linear_24 and has a line only where its "
            "target is higher."
        )
    return _products(results, "linear", "linear_24 against the dense product", words)


def _backward(results: Results) -> Table:
    words = (
        "Dense is `dy @ W` for linear_24_dx and `dyᵀ @ x` for linear_24_dvalues. Both sides of the latter write "
        "a fresh tensor, as large as the weight or as its values, whose page faults count."
    )
    return _products(results, "backward", "The gradients against the dense ones", words)


def _sweep(results: Results) -> Table:
    rows = [r for r in results.rows if r.section == "sweep"]
    columns = sorted({r.case["M"] for r in rows})
    slower = [r for r in rows if r.ratio.median < SLOWER]
    clearly = sum(r.ratio.p90 < SLOWER for r in slower)
    words = (
        f"F.linear's time over ours, median of few rounds. {len(slower)} of {len(rows)} cells are below 1.00 (bold), "
        f"{clearly} of them even at the 90th percentile."
    )
    head = ["op", "dtype", "N x K", "threads", *(f"M={M}" for M in columns)]
    table = Table("Every M: is anything slower than dense?", words, head)
    lines: dict[tuple, dict[int, Row]] = {}
    for r in rows:
        key = f"`{r.op}`", r.dtype, f"{r.case['N']} x {r.case['K']}", str(r.threads)
        lines.setdefault(key, {})[r.case["M"]] = r
    for key, cells in lines.items():
        values = [cells[M].ratio.median if M in cells else None for M in columns]
        bold = ["**" if v is not None and v < SLOWER else "" for v in values]
        table.rows.append(
            [*key, *(f"{b}{_number(v)}{b}" for v, b in zip(values, bold, strict=True))]
        )
    return table


def _peers(results: Results) -> Table:
    words = (
        "What else torch has for this product, in the same rounds. oneDNN with a reordered weight is what "
        "torch.compile with freezing calls for bf16; CSR multiplies the pruned weight. Ours is the prepacked form "
        "where there is one."
    )
    columns = "peer | dtype | M | N x K | threads | peer, ms | F.linear / peer | ours | ours, ms | "
    columns += "peer / ours [p10, p90] | note"
    table = Table("Other products of torch's", words, columns.split(" | "))
    for row in (r for r in results.rows if r.section == "peers"):
        table.rows.append(
            [
                row.baseline,
                row.dtype,
                str(row.case["M"]),
                f"{row.case['N']} x {row.case['K']}",
                str(row.threads),
                _ms(row.baseline_ms),
                _number(row.more.get("over_linear")),
                f"`{row.op}`",
                _ms(row.ours_ms),
                _ratio(row.ratio),
                row.note,
            ]
        )
    return table


def _formats(results: Results) -> Table:
    words = (
        "GB/s count what is read and written; the share is of those of `clone` of the dense weight in the same "
        "rounds. Every op and `clone` write a fresh tensor, whose page faults count where glibc takes it from the "
        "system, above 32 MB; `memory reused` is both sides without them. Torch's conversion is the one of "
        "`torch.sparse` for CUTLASS. Exact: the first 64 rows are what the reference gives."
    )
    columns = "op | dtype | N x K | threads | tier | baseline | baseline, ms | ours, ms | "
    columns += (
        "baseline / ours [p10, p90] | rounds | GB/s | of clone's bandwidth [p10, p90] | exact"
    )
    table = Table("Formats", words, columns.split(" | "))
    for row in (r for r in results.rows if r.section == "formats"):
        share = "–"
        if row.baseline_bytes:
            factor, s = row.bytes / row.baseline_bytes, row.ratio
            share = f"{s.median * factor:.0%} [{s.p10 * factor:.0%}, {s.p90 * factor:.0%}]"
        table.rows.append(
            [
                f"`{row.op}`",
                row.dtype,
                _shape(row),
                str(row.threads),
                row.tier,
                row.baseline,
                _ms(row.baseline_ms),
                _ms(row.ours_ms),
                _ratio(row.ratio),
                str(row.rounds),
                f"{row.bytes / row.ours_ms.median / 1e6:.1f}",
                share,
                _exact(row),
            ]
        )
    return table


def _size(nbytes: float) -> str:
    return f"{nbytes / 2**20:g} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:g} KiB"


def _zvc(results: Results) -> Table:
    rows = [r for r in results.rows if r.section == "zvc"]
    words = (
        f"{_size(rows[0].more['input_bytes'])} of input, zeros at random places; GB/s of the uncompressed bytes. "
        "`pack_zvc_out` writes to room that is there, against `copy_` to room that is there. `pack_zvc` and "
        "`unpack_zvc` allocate what they return, as `clone` does: page faults of fresh memory are part of both "
        "sides and often most of the time. `memory reused` is both sides on memory that was freed before, the "
        "nearest to a copy of the same bytes, and what the target of decompression is for. `byte bound` is the "
        "ratio of two sides that do nothing but move bytes. Exact: the round trip gives the same bits."
    )
    columns = "op | element | zeros | threads | tier | compression | baseline | baseline, ms | ours, ms | "
    columns += (
        "baseline / ours [p10, p90] | rounds | GB/s | byte bound | exact | must | stretch | verdict"
    )
    table = Table("Zero-value compression against copying", words, columns.split(" | "))
    for row in rows:
        table.rows.append(
            [
                f"`{row.op}`",
                row.dtype,
                f"{row.case['zeros']:.0%}",
                str(row.threads),
                row.tier,
                _number(row.more["compression"]),
                row.baseline,
                _ms(row.baseline_ms),
                _ms(row.ours_ms),
                _ratio(row.ratio),
                str(row.rounds),
                f"{row.more['input_bytes'] / row.ours_ms.median / 1e6:.1f}",
                f"{row.baseline_bytes / row.bytes:.2f}",
                _exact(row),
                *_judged(row),
            ]
        )
    return table


def _codecs(results: Results) -> Table:
    words = (
        "General compressors on the same data through their Python packages, GB/s of the uncompressed bytes, "
        "two to five rounds; each allocates what it returns."
    )
    columns = "codec | element | zeros | threads | compression | ours | compress, GB/s | ours | theirs / ours | "
    columns += "decompress, GB/s | ours | theirs / ours | note"
    table = Table("Zero-value compression beside general compressors", words, columns.split(" | "))
    for row in (r for r in results.rows if r.section == "codecs"):
        line = [row.baseline, row.dtype, f"{row.case['zeros']:.0%}", str(row.threads)]
        if row.ratio is None:
            line += ["–"] * 8
        else:
            more = row.more
            rates = [
                more["input_bytes"] / ms / 1e6
                for ms in (
                    row.baseline_ms.median,
                    row.ours_ms.median,
                    more["unpack_ms"],
                    more["ours_unpack_ms"],
                )
            ]
            line += [
                _number(more["compression"]),
                _number(more["ours_compression"]),
                f"{rates[0]:.3g}",
                f"{rates[1]:.3g}",
                f"{row.ratio.median:.1f}",
                f"{rates[2]:.3g}",
                f"{rates[3]:.3g}",
                f"{more['unpack_ratio']:.1f}",
            ]
        table.rows.append([*line, row.note])
    return table


_TABLES: dict[str, Callable[[Results], Table]] = {
    "linear": _linear,
    "sweep": _sweep,
    "peers": _peers,
    "backward": _backward,
    "formats": _formats,
    "zvc": _zvc,
    "codecs": _codecs,
}


def tables(results: Results) -> list[Table]:
    measured = {row.section for row in results.rows}
    return [make(results) for section, make in _TABLES.items() if section in measured]


# ---- the words around them ----


def head(results: Results) -> str:
    m, s = results.machine, results.settings
    title = f"# {m['date']}, {m['cpu']}, {m['cores']} cores"
    rates = [
        f"{dtype} on {threads}: {rate:.0f} ({product})"
        for (dtype, threads), (rate, product) in sorted(ceilings(results.rows).items())
    ]
    reads = [f"{gbs:.1f} on {t} (`{name}`)" for t, (gbs, name) in results.bandwidth.items()]
    lines = [
        f"`{m['command']}`: {results.seconds / 60:.1f} minutes, sparsekern {m['sparsekern']} at {m['revision']}, tier "
        f"{m['tier']} (here: {', '.join(m['tiers'])}), torch {m['torch']} using {m['torch_capability']}, "
        f"Python {m['python']}.",
        f"{m['cache']}; {m['clock']}; transparent huge pages: {m['huge_pages']}; "
        f"load before the run {m['load']}; cores taken by others during it: "
        f"{_number(results.others)}. Threads: {', '.join(map(str, m['threads']))}.",
        f"Random normal values. Up to {s['rounds']} rounds per cell, fewer where they take over {s['seconds']:g} s; "
        "the sides take turns in shuffled order, on weights or buffers that are together larger than the cache; "
        "each sample lasts a millisecond or more. Ratios are per round, median [p10, p90]; above 1 ours is faster, "
        "below 1 is bold. A tier is forced on our side alone: torch uses what it finds.",
        f"Measured read bandwidth by number of threads, GB/s: {'; '.join(reads)}, torch's reduction of a float32 "
        "buffer past the cache.",
        "Measured dense ceilings, dtype and number of threads, GFLOP/s: "
        + f"{'; '.join(rates) or 'none'}.",
        summary(results.rows),
    ]
    lines += [f"**Failed**: {failure}." for failure in results.failed]
    if results.interrupted:
        lines.append(f"**Interrupted** after {results.interrupted}: what follows is what was done.")
    return "\n\n".join([title, *lines]) + "\n"


def summary(rows: list[Row]) -> str:
    rows = [row for row in rows if not says_nothing_new(row)]
    counts = Counter(row.verdict for row in rows if row.verdict)
    if not counts:
        return "No cell of this run has a target."
    order = [v for v in (">= stretch", ">= must", "below") if counts[v]]
    text = f"Targets: {', '.join(f'{counts[v]} {v}' for v in order)}{':' if counts['below'] else '.'}\n"
    below = [
        f"`{r.op}` {r.dtype} {_shape(r) or format(r.case['zeros'], '.0%') + ' zeros'} with {r.threads} "
        f"threads ({r.tier}): {r.ratio.median:.2f} of {r.must:.2f}"
        for r in rows
        if r.verdict == "below"
    ]
    return text + "".join(f"\n* {line}" for line in below)


def markdown(results: Results) -> str:
    return "\n".join([head(results), *(table.markdown() for table in tables(results))])
