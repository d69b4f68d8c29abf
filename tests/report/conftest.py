"""A hand-made run folder, so that every number in a report has a known origin."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

WriteRun = Callable[..., Path]


def made_rows(accuracy: Sequence[float | None], **columns: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows of one accuracy each, from round 1; other columns replace the defaults."""
    n = len(accuracy)
    defaults: dict[str, Sequence[Any]] = {
        "round": range(1, n + 1),
        "time_s": [1.5 * (i + 1) for i in range(n)],
        "lr": [0.1 / (i + 1) for i in range(n)],
        "train_loss": [2.0 - 0.25 * i for i in range(n)],
        "test_loss": [None if a is None else 3.0 - a for a in accuracy],
        "test_accuracy": accuracy,
        "protocol_up_bytes": [1000] * n,
        "protocol_down_bytes": [3000] * n,
        "link_bytes": [0] * n,
        "clients_per_s": [4.0] * n,
        "rank_idle": [0.0] * n,
        "cohort": [6] * n,
    }
    table = defaults | columns
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Write a run folder under `tmp_path`: `write_run("a", rows, algorithm="fedavg", seed=1)`."""

    def write(name: str, rows: Sequence[dict[str, Any]], **config: Any) -> Path:
        run_dir = tmp_path / name
        run_dir.mkdir(parents=True)
        complete: dict[str, Any] = {
            "algorithm": {"name": "fedavg", "server_lr": 1.0},
            "model": {"name": "lenet"},
            "data": {"name": "digits"},
            "partition": {"name": "dirichlet", "alpha": 0.3},
            "run_dir": str(run_dir),
            "seed": 0,
            "rounds": len(rows),
            "clients": 3,
            "cohort": 2,
        }
        (run_dir / "config.yaml").write_text(yaml.safe_dump(complete | config))
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run_dir / "environment.json").write_text(json.dumps({"python": "3.11.0", "devices": ["cpu"], "cuda": None}))
        histogram = [[5, 0, 1], [0, 7, 0], [2, 2, 2]]
        facts = {"clients": 3, "samples": 19, "histogram": histogram}
        (run_dir / "partition.json").write_text(json.dumps(facts))
        return run_dir

    return write


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Any]]]:
    return made_rows
