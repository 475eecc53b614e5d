"""Two runs against each other: what became faster or slower, beyond the spread."""

from __future__ import annotations

from dataclasses import dataclass

from .clock import Spread
from .results import Results, Row

TOLERANCE = 0.05  # below this nothing is called a difference, however sure it is


@dataclass(frozen=True)
class Change:
    """One row in both runs. `ratio` is the time then over the time now: above 1 it became faster.

    `against` names what both times are relative to: a peer in the same rounds, so that a machine that is slower
    today does not count, or "the clock" where there is no such peer.
    """

    key: str
    then: Spread
    now: Spread
    against: str

    @property
    def ratio(self) -> float:
        return (
            self.now.median / self.then.median
            if self.against != "the clock"
            else self.then.median / self.now.median
        )

    @property
    def verdict(self) -> str:
        """faster or slower where the two 95 % intervals of the median are apart and the medians 5 % or more."""
        apart = self.now.low > self.then.high or self.now.high < self.then.low
        if not apart or abs(self.ratio - 1) < TOLERANCE:
            return "no difference"
        return "faster" if self.ratio > 1 else "slower"


def compare(then: Results, now: Results) -> tuple[list[Change], list[str]]:
    """The changes, and the rows that only one of the runs has."""
    old = {row.key: row for row in then.rows if row.ms}
    new = {row.key: row for row in now.rows if row.ms}
    changes = [_change(old[key], row) for key, row in new.items() if key in old]
    alone = [f"only then: {key}" for key in old if key not in new]
    alone += [f"only now: {key}" for key in new if key not in old]
    return changes, alone


def _change(old: Row, new: Row) -> Change:
    for name, peer in new.peers.items():
        before = old.peers.get(name)
        if peer.ratio and before and before.ratio:
            return Change(new.key, before.ratio, peer.ratio, name)
    return Change(new.key, old.ms, new.ms, "the clock")
