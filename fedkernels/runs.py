"""Run folders read back: rows and configuration, with the seeds of one configuration put together."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .metrics import is_number, read_metrics


@dataclass(frozen=True)
class Run:
    """One run folder as read from disk."""

    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    environment: dict[str, Any]
    partition: dict[str, Any]
    diagnosis: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a folder; all but `metrics.jsonl` or `config.yaml` may be missing.

        Raises:
            FileNotFoundError: the folder is not a run.
            ValueError: one of its files is damaged.
        """
        rows = read_metrics(path)
        names = ("config.yaml", "environment.json", "partition.json", "diagnosis.json")
        config, environment, partition, diagnosis = (_read_mapping(path / name) for name in names)
        return cls(path, config, rows, environment, partition, diagnosis)

    def values(self, key: str) -> dict[int, float]:
        """Round to value, where the round has one."""
        return {row["round"]: row[key] for row in self.rows if is_number(row.get(key))}

    def running(self, key: str) -> dict[int, float]:
        """Round to the sum of a per-round quantity up to it; empty where no round has one."""
        values = self.values(key)
        rounds = [row["round"] for row in self.rows] if values else []
        sums = np.cumsum([values.get(r, 0) for r in rounds])
        return dict(zip(rounds, sums.tolist(), strict=True))

    @property
    def last_round(self) -> int:
        return self.rows[-1]["round"] if self.rows else 0

    @property
    def planned_rounds(self) -> int:
        return self.config.get("rounds", self.last_round)

    @property
    def remarks(self) -> list[str]:
        """What a reader of the numbers must know: an early end, losses that were NaN or infinite."""
        remarks = []
        if self.last_round < self.planned_rounds:
            remarks.append(f"stopped at round {self.last_round} of {self.planned_rounds}")
        broken = [row["round"] for row in self.rows if row.get("train_loss", 0) is None]
        if broken:
            remarks.append(f"train loss not finite in {len(broken)} rounds, first in round {broken[0]}")
        return remarks


@dataclass(frozen=True)
class Group:
    """Runs of one configuration that differ by their seed only; `folder` is what their paths share."""

    label: str
    folder: str
    runs: tuple[Run, ...]

    @property
    def algorithm(self) -> str:
        return name_of(self.runs[0].config, "algorithm")

    def curve(self, key: str, by: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean and standard error over the runs at the rounds they share, as `x, y, se` `[points]`.

        Args:
            by: `round`, or what to sum (`protocol_up_bytes`) or read (`time_s`) for the horizontal axis.
        """
        runs = [run for run in self.runs if run.values(key)]
        axes = [run.values(by) if by in ("round", "time_s") else run.running(by) for run in runs]
        series = [run.values(key) for run in runs]
        rounds = sorted(set.intersection(*map(set, series), *map(set, axes))) if runs else []
        if not rounds:
            return np.empty(0), np.empty(0), np.empty(0)
        x = np.array([[axis[r] for r in rounds] for axis in axes], dtype=float)
        y = np.array([[values[r] for r in rounds] for values in series], dtype=float)
        return x.mean(axis=0), y.mean(axis=0), standard_error(y)


def standard_error(values: np.ndarray) -> np.ndarray:
    """Of the mean over the first axis, `[runs, ...]`; zero for a single run."""
    n = len(values)
    return values.std(axis=0, ddof=1) / np.sqrt(n) if n > 1 else np.zeros(values.shape[1:])


def read_groups(run_dirs: Sequence[Path]) -> list[Group]:
    """Read run folders and put seeds of one configuration together, in the order given.

    A group is labelled by its algorithm, and by its folder where several groups share the algorithm.

    Raises:
        ValueError: no folder given, or a damaged file.
        FileNotFoundError: a folder that is not a run.
    """
    if not run_dirs:
        raise ValueError("no run folder given")
    paths = list(dict.fromkeys(Path(run_dir).resolve() for run_dir in run_dirs))
    root = os.path.commonpath([path.parent for path in paths])
    members: dict[str, list[Run]] = {}
    for path in paths:
        run = Run.read(path)
        shared = {key: value for key, value in run.config.items() if key not in ("seed", "run_dir")}
        # Without a configuration nothing says that two runs belong together.
        members.setdefault(json.dumps(shared, sort_keys=True, default=str) if shared else str(path), []).append(run)
    algorithms = Counter(name_of(runs[0].config, "algorithm") for runs in members.values())
    groups: list[Group] = []
    taken: Counter[str] = Counter()
    for runs in members.values():
        folder = _shared_name([os.path.relpath(run.path, root) for run in runs]) or runs[0].path.parent.name
        algorithm = name_of(runs[0].config, "algorithm")
        label = f"{algorithm} · {folder}" if algorithms[algorithm] > 1 else algorithm
        taken[label] += 1
        groups.append(Group(f"{label} ({taken[label]})" if taken[label] > 1 else label, folder, tuple(runs)))
    return groups


def name_of(config: Mapping[str, Any], key: str) -> str:
    """The name of a configured part, written `{name: ...}` or plainly."""
    part = config.get(key)
    return str((part.get("name") if isinstance(part, Mapping) else part) or "unknown")


def _read_mapping(path: Path) -> dict[str, Any]:
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
    """`fedavg` of `fedavg-s0` and `fedavg-s1`; one name stays as it is."""
    if len(names) == 1:
        return names[0]
    # By characters, not path parts: folders of seeds differ within a part.
    return re.sub(r"(^|[-_/ ]+)(seed|s)?[-_]?\d*$", "", os.path.commonprefix(names))  # noqa: RUF071
