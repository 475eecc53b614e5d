"""`sparsekern tune`: the packed product against expanding the weight and multiplying densely, by number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from rich.text import Text

import sparsekern as sk

from .. import choices
from .clock import Budget, Sides, Spread, ratio_of
from .linear import DENSE, ours, weights
from .session import DTYPES, Session
from .shapes import Shape

EXPAND = "expand"
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Tuned:
    """One product at one number of tokens.

    Attributes:
        ratio: its time over that of expanding the weight and multiplying: above 1 expanding is faster.
        dense: torch's dense time over that of the faster of the two.
    """

    op: str
    shape: Shape
    dtype: str
    threads: int
    ratio: Spread
    dense: Spread

    @property
    def expands(self) -> bool:
        return self.ratio.low >= choices.WORTH

    @property
    def slower_than_dense(self) -> bool:
        return self.dense.high < 1


def tune(
    session: Session,
    budget: Budget,
    progress: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> list[Tuned]:
    """Measures every shape of the session's options; Ctrl-C ends it and keeps what was measured."""
    order = sorted(session.options.shapes, key=lambda s: (s.N, s.K, s.M))
    work = [
        (d, t, s) for d in session.options.dtypes for t in session.each_threads() for s in order
    ]
    found: list[Tuned] = []
    try:
        with torch.inference_mode():
            for done, (dtype, threads, shape) in enumerate(work):
                progress(done, len(work), f"{dtype} {shape} {shape.label}, threads: {threads}")
                found += _tune(session, budget, shape, dtype, threads)
            progress(len(work), len(work), "")
    except KeyboardInterrupt:
        pass
    return found


def _tune(session: Session, budget: Budget, shape: Shape, dtype: str, threads: int) -> list[Tuned]:
    w, kind = weights(session, shape, dtype), DTYPES[dtype]
    x = torch.randn(shape.M, shape.K, device=session.device).to(kind)
    mine = ours(session, x, w, shape, kind)
    best = next(iter(mine))[1]  # the back end that serves, not those on request
    calls = {op: call for (op, name), call in mine.items() if name == best}
    sides: Sides = dict(calls)
    sides[DENSE] = lambda i: F.linear(x, w.dense[i % w.count])
    # Not the copy that the packed product read in the same round: it may be in a cache still.
    other = w.count // 2
    sides[f"{EXPAND} linear_24"] = lambda i: F.linear(
        x, sk.unpack_24(*w.packed[(i + other) % w.count])
    )
    if "linear_24_prepacked" in calls:
        sides[f"{EXPAND} linear_24_prepacked"] = lambda i: F.linear(
            x,
            sk.unpack_24(
                *sk.unprepack_24(w.prepacked[(i + other) % w.count], shape.N, shape.K, kind)
            ),
        )
    with session.threads(threads):
        samples = session.clock.interleave(sides, budget)
    found = []
    for op in calls:
        packed, expanded = samples[op], samples[f"{EXPAND} {op}"]
        ratio = ratio_of(packed, expanded)
        chosen = expanded if ratio.low >= choices.WORTH else packed
        found.append(Tuned(op, shape, dtype, threads, ratio, ratio_of(samples[DENSE], chosen)))
    return found


def table_of(session: Session, tuned: list[Tuned]) -> choices.Table:
    """What choices.py keeps: of a bucket's numbers of tokens, the least in favour of expanding."""
    found: choices.Table = {}
    for t in tuned:
        with session.threads(t.threads):
            device = choices.device_name(session.device)
        name = choices.product(t.op, t.shape.N, t.shape.K, DTYPES[t.dtype])
        entries = found.setdefault(device, {}).setdefault(name, {})
        key = str(choices.bucket(t.shape.M))
        entries[key] = round(min(t.ratio.low, entries.get(key, t.ratio.low)), 3)
    return found


def table(tuned: list[Tuned]) -> Table:
    drawn = Table(
        title="Packed, or expanded for a dense product", box=box.SIMPLE_HEAD, title_justify="left"
    )
    for name in (
        "product",
        "dtype",
        "M x N x K",
        "threads",
        "packed / expanded",
        "dense / chosen",
        "chosen",
    ):
        drawn.add_column(
            name, justify="right" if "/" in name or name == "threads" else "left", no_wrap=True
        )
    for t in tuned:
        style = "red" if t.slower_than_dense else ""
        drawn.add_row(
            t.op,
            t.dtype,
            f"{t.shape} {t.shape.label}".strip(),
            str(t.threads),
            f"{t.ratio.median:.2f} [{t.ratio.p10:.2f}, {t.ratio.p90:.2f}]",
            Text(f"{t.dense.median:.2f} [{t.dense.p10:.2f}, {t.dense.p90:.2f}]", style),
            "expanded" if t.expands else "packed",
        )
    return drawn
