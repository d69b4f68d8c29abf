"""Accuracy at equal rounds of the algorithms on digits: every learning rate tuned alike, then several seeds.

Tuning tries five learning rates, half a decade apart, with one seed that the table does not use, and takes the one with
the best accuracy over the last five rounds. The table then runs the configurations of `configs/digits` as they are.
"""

from __future__ import annotations

import math
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from common import Table, arguments, report

from fedkernels.config import load
from fedkernels.federated.collectives import Collectives
from fedkernels.train import build

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "digits"
ALGORITHMS = ("fedavg", "scaffold", "local_adamw", "local_muon", "fedadamw", "fedmuon")
TUNING_SEED = 1000
GRIDS = {
    "sgd": (0.01, 0.03, 0.1, 0.3, 1.0),
    "adamw": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "muon": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
LAST_ROUNDS = 5
Row = dict[str, Any]


def family(algorithm: str) -> str:
    """Which grid of learning rates an algorithm's local optimizer takes."""
    return next((name for name in ("adamw", "muon") if name in algorithm), "sgd")


def run(algorithm: str, overrides: dict[str, Any]) -> list[Row]:
    """The metrics rows of one training of `configs/digits/<algorithm>.yaml`."""
    config = load(CONFIGS / f"{algorithm}.yaml", overrides)
    engine, _, _ = build(config, Collectives())
    return [engine.run_round() | engine.evaluate() for _ in range(config.rounds)]


def final_accuracy(rows: list[Row]) -> float:
    """Mean test accuracy over the last rounds."""
    return statistics.mean(row["test_accuracy"] for row in rows[-LAST_ROUNDS:])


def run_all(jobs: int, wanted: list[tuple[str, dict[str, Any]]]) -> list[list[Row]]:
    """The rows of many runs, `jobs` at a time, in the order asked for."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(run, algorithm, overrides) for algorithm, overrides in wanted]
        for (algorithm, overrides), future in zip(wanted, futures, strict=True):
            print(f"{algorithm} {overrides}: {100 * final_accuracy(future.result()):.2f} %", flush=True)
        return [future.result() for future in futures]


def tune(algorithms: list[str], jobs: int, options: dict[str, Any]) -> tuple[Table, dict[str, Any]]:
    """Accuracy of every algorithm at every learning rate of its grid."""
    wanted = [
        (algorithm, {"seed": TUNING_SEED, "lr": lr} | options)
        for algorithm in algorithms
        for lr in GRIDS[family(algorithm)]
    ]
    accuracy = dict.fromkeys(algorithms, ())
    for (algorithm, _), rows in zip(wanted, run_all(jobs, wanted), strict=True):
        accuracy[algorithm] += (final_accuracy(rows),)
    lines = []
    for algorithm in algorithms:
        grid, values = GRIDS[family(algorithm)], accuracy[algorithm]
        best = grid[values.index(max(values))]
        edge = " (edge of the grid)" if best in (grid[0], grid[-1]) else ""
        lines.append(
            [algorithm, *(f"{lr:g}: {100 * a:.1f}" for lr, a in zip(grid, values, strict=True)), f"{best:g}{edge}"]
        )
    columns = ["algorithm", *(f"lr: accuracy, % ({i + 1})" for i in range(5)), "best lr"]
    return {"columns": columns, "rows": lines}, {"seed": TUNING_SEED, "accuracy": accuracy, "options": options}


def compare(algorithms: list[str], seeds: int, jobs: int, options: dict[str, Any]) -> tuple[Table, dict[str, Any]]:
    """Accuracy of the committed configurations over seeds, with standard errors."""
    wanted = [(algorithm, {"seed": seed} | options) for algorithm in algorithms for seed in range(seeds)]
    results = run_all(jobs, wanted)
    lines, curves = [], {}
    for index, algorithm in enumerate(algorithms):
        runs = results[index * seeds : (index + 1) * seeds]
        half = [100 * run[len(run) // 2 - 1]["test_accuracy"] for run in runs]
        final = [100 * final_accuracy(run) for run in runs]
        up_bytes = sum(row["protocol_up_bytes"] for row in runs[0])
        lr = load(CONFIGS / f"{algorithm}.yaml", options).lr
        lines.append([algorithm, f"{lr:g}", len(runs[0]), _mean_se(half), _mean_se(final), f"{up_bytes / 1e6:.0f}"])
        curves[algorithm] = [[row["test_accuracy"] for row in run] for run in runs]
    columns = ["algorithm", "lr", "rounds", "accuracy at half, %", "final accuracy, %", "uplink, MB"]
    return {"columns": columns, "rows": lines}, {"seeds": list(range(seeds)), "test_accuracy": curves}


def _mean_se(values: list[float]) -> str:
    se = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.1f} ± {se:.1f}"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), help="names of files in configs/digits")
    parser.add_argument("--tune", action="store_true", help="try the learning rates instead of making the table")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, help="instead of the configurations' own")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    chosen = parser.parse_args()
    options = {"rounds": chosen.rounds} if chosen.rounds else {}
    if chosen.tune:
        table, details = tune(chosen.algorithms, chosen.jobs, options)
    else:
        table, details = compare(chosen.algorithms, chosen.seeds, chosen.jobs, options)
    report("digits-tuning" if chosen.tune else "digits", table, details, chosen.out)


if __name__ == "__main__":
    main()
