"""What a run of a recipe gave: scores by epoch and by stage, as a table, a picture and JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from .recipe import Recipe
from .verify import Verification

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclass(frozen=True)
class Score:
    """On the test data: mean loss, and the share answered wrongly where that means something."""

    loss: float
    error: float | None

    def __lt__(self, other: Score) -> bool:
        return (self.error or 0.0, self.loss) < (other.error or 0.0, other.loss)

    @property
    def short(self) -> str:
        """The error, or the loss where there is none."""
        return f"loss {self.loss:.4f}" if self.error is None else f"error {100 * self.error:.2f} %"

    def __str__(self) -> str:
        loss = f"loss {self.loss:.4f}"
        return loss if self.error is None else f"{loss}, {self.short}"


@dataclass(frozen=True)
class Epoch:
    """A point of the curves: `stage` counts from 0, `epoch` within it from 1."""

    stage: int
    epoch: int
    lr: float
    train_loss: float
    test: Score


@dataclass(frozen=True)
class StageResult:
    """What a stage left: `density` is of all linear and convolution layers, `layers` what a pruning did to each."""

    do: str
    text: str
    epochs: int
    test: Score
    density: float
    seconds: float
    layers: list[dict] = field(default_factory=list)


@dataclass
class Result:
    """What a run gave. ``out`` holds the files; report.json is :meth:`as_dict`."""

    recipe: Recipe
    out: Path
    model: nn.Module
    stages: list[StageResult]
    history: list[Epoch]
    verification: Verification
    machine: dict[str, str | int]

    def as_dict(self) -> dict:
        return {
            "recipe": self.recipe.as_dict(),
            "machine": self.machine,
            "stages": [plain(stage) for stage in self.stages],
            "history": [plain(epoch) for epoch in self.history],
            "verification": self.verification.as_dict(),
        }

    def table(self) -> Table:
        """A row per stage."""

        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for column in ("", "test loss", "error", "density", "seconds"):
            table.add_column(column, justify="left" if not column else "right", no_wrap=True)
        table.add_column("")
        for stage in self.stages:
            error = "" if stage.test.error is None else f"{100 * stage.test.error:.2f} %"
            numbers = (
                f"{stage.test.loss:.4f}",
                error,
                f"{stage.density:.1%}",
                f"{stage.seconds:.1f}",
            )
            table.add_row(stage.do, *numbers, stage.text)
        return table

    def draw(self) -> Figure:
        """Test error, or loss where there is no error, and loss over the epochs; lines where was pruned."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 5.5), layout="constrained", facecolor="white")
        above, below = figure.subplots(2, 1, sharex=True)
        at = range(1, len(self.history) + 1)
        errors = [e.test.error for e in self.history]
        if None not in errors:
            above.plot(at, [100 * e for e in errors], "o-", markersize=3, color="#2b6ca3")
            above.set_ylabel("test error, %")
        above.set_title(
            "Error and loss by epoch; in orange, where weights were pruned and what was left then",
            loc="left",
            fontsize=10,
        )
        below.plot(
            at,
            [e.train_loss for e in self.history],
            "o-",
            markersize=3,
            color="#b7b7b7",
            label="train",
        )
        below.plot(
            at,
            [e.test.loss for e in self.history],
            "o-",
            markersize=3,
            color="#2b6ca3",
            label="test",
        )
        below.set(xlabel="epoch", ylabel="loss", yscale="log")
        below.legend(frameon=False)
        for i, stage in enumerate(self.stages[1:]):
            if stage.do == "prune":
                where = sum(e.stage < i for e in self.history) + 0.5
                for axes in (above, below):
                    axes.axvline(where, color="#d9772b", linestyle="--", linewidth=1)
                below.plot(where, stage.test.loss, "o", markersize=4, color="#d9772b")
                if stage.test.error is not None:
                    above.plot(where, 100 * stage.test.error, "o", markersize=4, color="#d9772b")
                above.annotate(
                    f" {stage.density:.0%}", (where, 0.95), xycoords=("data", "axes fraction"), color="#d9772b",
                    fontsize=8, va="top",
                )  # fmt: skip
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
        return figure


def plain(record: object) -> dict:
    """A dataclass as what both JSON and ``weights_only`` take."""
    return {k: vars(v) if isinstance(v, Score) else v for k, v in vars(record).items()}
