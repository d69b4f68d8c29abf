"""The numbers a comparison of runs shows: means and standard errors over seeds, at common yardsticks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from .formats import (
    format_bytes,
    format_loss,
    format_number,
    format_rate,
    format_score,
    format_seconds,
    format_share,
)
from .runs import Group, Run, read_groups, standard_error

# Of the best accuracy any run reached: the target that rounds, bytes and time are counted to.
TARGET_SHARE = 0.9


@dataclass(frozen=True)
class Cell:
    """A mean with its spread, as text; `mean` is None where no run has a value."""

    mean: float | None = None
    text: str = "-"
    detail: str = ""
    complete: bool = False

    def __str__(self) -> str:
        return f"{self.text} {self.detail}".rstrip()


@dataclass(frozen=True)
class Statistic:
    """One number per run, None where a run has none."""

    title: str
    note: str
    value: Callable[[Run], float | None]
    format: Callable[[float], str]
    best: Literal["max", "min"] | None = None

    def cell(self, group: Group) -> Cell:
        """Mean and standard error over the runs of a group that have the number."""
        values = [value for run in group.runs if (value := self.value(run)) is not None]
        if not values:
            return Cell()
        se = float(standard_error(np.array(values)))
        complete = len(values) == len(group.runs)
        details = [f"± {self.format(se)}"] if se else []
        details += [] if complete else [f"{len(values)} of {len(group.runs)} runs"]
        mean = float(np.mean(values))
        return Cell(mean, self.format(mean), ", ".join(details), complete)


class Comparison:
    """Groups of runs side by side.

    Attributes:
        equal_round: the last evaluated round that no run is short of, 0 where nothing was evaluated.
        target: the accuracy that costs are counted to, None where nothing was evaluated.
        statistics: the columns that some group can fill.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = list(groups)
        curves = [curve for group in groups for run in group.runs if (curve := run.values("test_accuracy"))]
        self.equal_round = min((max(curve) for curve in curves), default=0)
        self.target = TARGET_SHARE * max(max(curve.values()) for curve in curves) if curves else None
        equal_lengths = len({max(curve) for curve in curves}) < 2
        self.statistics = [
            statistic
            for statistic in (
                ROUNDS,
                FINAL_ACCURACY,
                BEST_ACCURACY,
                *([] if equal_lengths else [self.accuracy_at_equal_round]),
                TEST_LOSS,
                MATTHEWS,
                F1,
                PERPLEXITY,
                *([] if self.target is None else costs_of(self.target)),
                UPLINK,
                DOWNLINK,
                LINK,
                TIME,
                CLIENTS_PER_S,
                RANK_IDLE,
            )
            if any(statistic.cell(group).mean is not None for group in groups)
        ]

    @property
    def accuracy_at_equal_round(self) -> Statistic:
        """Accuracy at the last evaluation that no run is short of."""

        def value(run: Run) -> float | None:
            return _last({r: accuracy for r, accuracy in run.values("test_accuracy").items() if r <= self.equal_round})

        return Statistic("accuracy", f"round {self.equal_round}", value, format_share, "max")

    def leaders(self, statistic: Statistic) -> list[int]:
        """Indices of the groups with the best mean, among those where every run has a value; none where all tie."""
        cells = [statistic.cell(group) for group in self.groups]
        means = {index: cell.mean for index, cell in enumerate(cells) if cell.mean is not None and cell.complete}
        if statistic.best is None or len(self.groups) < 2 or len(set(means.values())) == 1 < len(means):
            return []
        best = (max if statistic.best == "max" else min)(means.values(), default=None)
        return [index for index, mean in means.items() if mean == best]


def comparison_table(run_dirs: Sequence[Path]) -> str:
    """The comparison as aligned plain text, one line per configuration, for a terminal.

    Raises:
        ValueError: no folder given, or a damaged file.
        FileNotFoundError: a folder that is not a run.
    """
    columns = {"final acc": FINAL_ACCURACY, "best acc": BEST_ACCURACY, "test loss": TEST_LOSS}
    columns |= {"uplink": UPLINK, "time": TIME}
    lines = [["run", "algorithm", "rounds", *columns]]
    for group in read_groups(run_dirs):
        seeds = f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""
        rounds = dict.fromkeys(f"{run.last_round}/{run.planned_rounds}" for run in group.runs)
        cells = [str(statistic.cell(group)) for statistic in columns.values()]
        lines.append([group.folder + seeds, group.algorithm, ", ".join(rounds), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    template = "  ".join(f"{{:{'<' if i < 2 else '>'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(template.format(*line) for line in lines)


def rounds_to(run: Run, target: float) -> int | None:
    """The first evaluated round with at least the target accuracy."""
    return next((r for r, accuracy in run.values("test_accuracy").items() if accuracy >= target), None)


def costs_of(target: float) -> list[Statistic]:
    """Rounds, uplink bytes of all clients and training time until the target accuracy."""

    def spent(quantity: Callable[[Run], Mapping[int, float]]) -> Callable[[Run], float | None]:
        return lambda run: quantity(run).get(rounds_to(run, target) or 0)

    to, note = f"to {format_share(target)}", f"{TARGET_SHARE:.0%} of best"
    return [
        Statistic(f"rounds {to}", note, lambda run: rounds_to(run, target), _format_rounds, "min"),
        Statistic(f"uplink {to}", note, spent(lambda run: run.running("protocol_up_bytes")), format_bytes, "min"),
        Statistic(f"time {to}", note, spent(lambda run: run.values("time_s")), format_seconds, "min"),
    ]


def _last(values: Mapping[int, float]) -> float | None:
    return values[max(values)] if values else None


def _final(key: str) -> Callable[[Run], float | None]:
    return lambda run: _last(run.values(key))


def _total(key: str) -> Callable[[Run], float | None]:
    return lambda run: _last(run.running(key))


def _best_accuracy(run: Run) -> float | None:
    return max(run.values("test_accuracy").values(), default=None)


def _clients_per_s(run: Run) -> float | None:
    """Clients trained over training time, so that long rounds weigh as much as they last."""
    clients, time_s = _total("cohort")(run), _final("time_s")(run)
    return clients / time_s if clients and time_s else None


def _rank_idle(run: Run) -> float | None:
    idle = list(run.values("rank_idle").values())
    # A single rank never waits.
    return float(np.mean(idle)) if any(idle) else None


def _format_rounds(rounds: float) -> str:
    return f"{rounds:.3g}" if rounds < 100 else f"{rounds:.0f}"


ROUNDS = Statistic("rounds", "", lambda run: run.last_round, _format_rounds)
FINAL_ACCURACY = Statistic("accuracy", "final", _final("test_accuracy"), format_share, "max")
BEST_ACCURACY = Statistic("accuracy", "best", _best_accuracy, format_share, "max")
TEST_LOSS = Statistic("test loss", "final", _final("test_loss"), format_loss, "min")
# Of the tasks that are scored by them.
MATTHEWS = Statistic("Matthews corr.", "final", _final("test_matthews"), format_score, "max")
F1 = Statistic("F1", "final", _final("test_f1"), format_score, "max")
PERPLEXITY = Statistic("perplexity", "final", _final("test_perplexity"), format_number, "min")
UPLINK = Statistic("uplink", "all clients", _total("protocol_up_bytes"), format_bytes)
DOWNLINK = Statistic("downlink", "all clients", _total("protocol_down_bytes"), format_bytes)
# A single rank sends nothing.
LINK = Statistic("link", "cluster", lambda run: _total("link_bytes")(run) or None, format_bytes)
TIME = Statistic("time", "training", _final("time_s"), format_seconds)
CLIENTS_PER_S = Statistic("clients/s", "", _clients_per_s, format_rate)
RANK_IDLE = Statistic("rank idle", "mean", _rank_idle, format_share)
