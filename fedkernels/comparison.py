"""Finished runs as numbers: reading run folders, grouping seeds, and the statistics a comparison shows."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from .metrics import ENVIRONMENT_FILE, format_bytes, format_loss, format_rate, format_seconds, is_number, read_metrics

THRESHOLDS = (0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Run:
    """One run folder as read from disk."""

    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    environment: dict[str, Any]
    partition: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a folder; all but `metrics.jsonl` or `config.yaml` may be missing.

        Raises:
            FileNotFoundError: the folder is not a run.
            ValueError: one of its files is damaged.
        """
        rows = read_metrics(path)
        config, environment, partition = (_read(path / n) for n in ("config.yaml", ENVIRONMENT_FILE, "partition.json"))
        return cls(path, config, rows, environment, partition)

    def values(self, key: str) -> dict[int, float]:
        """Round to value, where the round has one."""
        return {row["round"]: row[key] for row in self.rows if is_number(row.get(key))}

    def running(self, key: str) -> dict[int, float]:
        """Round to the sum of a per-round quantity up to it."""
        sums = np.cumsum([row[key] if is_number(row.get(key)) else 0 for row in self.rows])
        return {row["round"]: float(total) for row, total in zip(self.rows, sums, strict=True)}

    @property
    def last_round(self) -> int:
        return int(self.rows[-1]["round"]) if self.rows else 0

    @property
    def planned_rounds(self) -> int:
        return int(self.config.get("rounds") or self.last_round)


@dataclass(frozen=True)
class Group:
    """Runs of one configuration that differ by their seed only; `folder` is what their folder names share."""

    label: str
    folder: str
    runs: tuple[Run, ...]

    @property
    def algorithm(self) -> str:
        return name_of(self.runs[0].config, "algorithm")

    @property
    def stopped(self) -> list[str]:
        """Where runs ended early: `stopped at round k of R`."""
        return [
            f"stopped at round {run.last_round} of {run.planned_rounds}"
            for run in self.runs
            if run.last_round < run.planned_rounds
        ]

    def curve(self, key: str, by: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean and standard error over the runs at the rounds they share, as `x, y, se` `[points]`.

        Args:
            by: `round`, or what to sum (`protocol_up_bytes`) or read (`time_s`) for the horizontal axis.
        """
        runs = [run for run in self.runs if run.values(key)]
        axes = [_axis(run, by) for run in runs]
        series = [run.values(key) for run in runs]
        rounds = sorted(set.intersection(*map(set, series), *map(set, axes))) if runs else []
        if not rounds:
            return np.empty(0), np.empty(0), np.empty(0)
        x = np.array([[axis[r] for r in rounds] for axis in axes], dtype=float)
        y = np.array([[values[r] for r in rounds] for values in series], dtype=float)
        se = y.std(axis=0, ddof=1) / np.sqrt(len(y)) if len(y) > 1 else np.zeros(len(rounds))
        return x.mean(axis=0), y.mean(axis=0), se


@dataclass(frozen=True)
class Statistic:
    """One column of the comparison: a number per run, None where a run has none."""

    title: str
    note: str
    value: Callable[[Run], float | None]
    format: Callable[[float], str]
    best: Literal["max", "min"] | None = None

    def cell(self, group: Group) -> Cell:
        """Mean and standard error over the runs of a group that have the number."""
        values = [value for run in group.runs if (value := self.value(run)) is not None]
        if not values:
            return Cell(None, 0.0, "-", "")
        mean = float(np.mean(values))
        se = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
        parts = [f"± {self.format(se)}"] if se else []
        if len(values) < len(group.runs):
            parts.append(f"{len(values)} of {len(group.runs)} runs")
        return Cell(mean, se, self.format(mean), ", ".join(parts))


@dataclass(frozen=True)
class Cell:
    """A formatted mean, with its spread in `detail`; `mean` is None where no run has a value."""

    mean: float | None
    se: float
    text: str
    detail: str


def read_groups(run_dirs: Sequence[Path]) -> list[Group]:
    """Read run folders and put seeds of one configuration together, in the order given.

    Raises:
        ValueError: no folder given, or a damaged file.
        FileNotFoundError: a folder that is not a run.
    """
    if not run_dirs:
        raise ValueError("no run folder given")
    paths = list(dict.fromkeys(Path(run_dir).resolve() for run_dir in run_dirs))
    members: dict[str, list[Run]] = {}
    for path in paths:
        run = Run.read(path)
        shared = {key: value for key, value in run.config.items() if key not in ("seed", "run_dir")}
        # Without a configuration nothing says that two runs belong together.
        members.setdefault(json.dumps(shared, sort_keys=True, default=str) if shared else str(path), []).append(run)
    root = os.path.commonpath([path.parent for path in paths])
    groups = [tuple(runs) for runs in members.values()]
    algorithms = [name_of(runs[0].config, "algorithm") for runs in groups]
    named: list[Group] = []
    for algorithm, runs in zip(algorithms, groups, strict=True):
        folder = _shared_name([os.path.relpath(run.path, root) for run in runs]) or runs[0].path.name
        label = f"{algorithm} · {folder}" if algorithms.count(algorithm) > 1 else algorithm
        same = sum(group.label.startswith(label) for group in named)
        named.append(Group(f"{label} ({same + 1})" if any(label == g.label for g in named) else label, folder, runs))
    return named


class Comparison:
    """The statistics of several groups against common yardsticks: equal rounds and shared accuracy targets."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = list(groups)
        runs = [run for group in groups for run in group.runs]
        evaluated = [max(accuracy) for run in runs if (accuracy := run.values("test_accuracy"))]
        self.equal_round = min(evaluated, default=0)
        best = [max(accuracy.values()) for run in runs if (accuracy := run.values("test_accuracy"))]
        self.targets = [(fraction, fraction * max(best)) for fraction in THRESHOLDS] if best else []

    @cached_property
    def statistics(self) -> list[Statistic]:
        """The columns of the full table."""
        at = f"at round {self.equal_round}" if self.equal_round else ""
        return [
            Statistic("rounds", "", lambda run: run.last_round, lambda value: f"{value:.0f}"),
            FINAL_ACCURACY,
            BEST_ACCURACY,
            Statistic("accuracy", at or "equal rounds", self.accuracy_at_equal_rounds, format_percent, "max"),
            TEST_LOSS,
            *(
                Statistic(
                    f"rounds to {format_percent(target)}",
                    f"{fraction:.0%} of best",
                    partial(rounds_to, target=target),
                    lambda value: f"{value:.3g}",
                    "min",
                )
                for fraction, target in self.targets
            ),
            Statistic("uplink", "protocol", partial(total, key="protocol_up_bytes"), format_bytes),
            Statistic("downlink", "protocol", partial(total, key="protocol_down_bytes"), format_bytes),
            Statistic("link", "cluster", partial(total, key="link_bytes"), format_bytes),
            TIME,
            Statistic("clients/s", "", _clients_per_s, format_rate),
            Statistic("rank idle", "", _rank_idle, format_percent),
        ]

    def accuracy_at_equal_rounds(self, run: Run) -> float | None:
        """Accuracy at the last evaluation that no run is short of."""
        return _last({r: value for r, value in run.values("test_accuracy").items() if r <= self.equal_round})

    def leaders(self, statistic: Statistic) -> list[int]:
        """Indices of the groups with the best mean; none where there is nothing to win."""
        means = [statistic.cell(group).mean for group in self.groups]
        known = [mean for mean in means if mean is not None]
        if statistic.best is None or len(set(known)) < 2:
            return []
        best = max(known) if statistic.best == "max" else min(known)
        return [index for index, mean in enumerate(means) if mean == best]


def rounds_to(run: Run, target: float) -> float | None:
    """The first evaluated round with at least the target accuracy."""
    return next((r for r, accuracy in run.values("test_accuracy").items() if accuracy >= target), None)


def name_of(config: Mapping[str, Any], key: str) -> str:
    """The name of a configured part, written `{name: ...}` or plainly."""
    part = config.get(key)
    return str((part.get("name") if isinstance(part, Mapping) else part) or "unknown")


def format_percent(fraction: float) -> str:
    return f"{fraction * 100:.1f} %"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else json.loads(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: damaged file, {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def _shared_name(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    # By characters, not path parts: `fedavg-s0` and `fedavg-s1` share `fedavg`.
    return re.sub(r"(^|[-_/ ]+)(seed|s)?[-_]?\d*$", "", os.path.commonprefix(names))  # noqa: RUF071


def _axis(run: Run, by: str) -> dict[int, float]:
    if by == "round":
        return {row["round"]: row["round"] for row in run.rows}
    return run.values(by) if by == "time_s" else run.running(by)


def _last(values: Mapping[int, float]) -> float | None:
    return values[max(values)] if values else None


def total(run: Run, key: str) -> float | None:
    """The sum of a per-round quantity over the run."""
    return _last(run.running(key)) if run.values(key) else None


def _clients_per_s(run: Run) -> float | None:
    """Clients trained over training time, so that long rounds weigh as much as they last."""
    time_s = _last(run.values("time_s"))
    return sum(run.values("cohort").values()) / time_s if time_s and run.values("cohort") else None


def _rank_idle(run: Run) -> float | None:
    idle = run.values("rank_idle")
    return float(np.mean(list(idle.values()))) if idle else None


def _final(run: Run, key: str) -> float | None:
    return _last(run.values(key))


FINAL_ACCURACY = Statistic("accuracy", "final", partial(_final, key="test_accuracy"), format_percent, "max")
BEST_ACCURACY = Statistic(
    "accuracy", "best", lambda run: max(run.values("test_accuracy").values(), default=None), format_percent, "max"
)
TEST_LOSS = Statistic("test loss", "final", partial(_final, key="test_loss"), format_loss, "min")
TIME = Statistic("time", "training", partial(_final, key="time_s"), format_seconds, "min")
