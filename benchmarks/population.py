"""A population of a million clients: how long a start takes, what the engine adds to a round, whether memory grows.

The model has 52 parameters and every client one sample. For the overhead clients train nothing and send zeros, so that
a round is all engine; a cohort of one shows what every round pays, larger ones what every client adds. These times are
CPU times of the one thread, which on a free machine are the wall clock's and on a shared one leave out the others.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, on_ranks, process_age_s, report, rss_bytes, spread
from torch import Tensor, nn

from fedkernels.algorithms import FedAvg, Scaffold
from fedkernels.contract import Algorithm, Round, Task, Vectors
from fedkernels.data.datasets import Dataset
from fedkernels.data.partition import Partition
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.engine import Engine
from fedkernels.federated.objective import Objective
from fedkernels.federated.settings import EngineSettings

SHAPE, CLASSES = (1, 2, 6), 4


class Untrained(FedAvg):
    """FedAvg whose clients send zeros without training: what is left of a round is the engine's."""

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        return {"delta": torch.zeros(len(task.steps), len(s.x))}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        return {"x": s.x + agg.delta}


def engine(algorithm: Algorithm, population: int, cohort: int, directory: Path) -> Engine:
    """An engine whose clients have one sample each."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (population, *SHAPE), dtype=np.uint8))
    targets = torch.from_numpy(rng.integers(0, CLASSES, population))
    data = Dataset("image", images, targets, images[:1], targets[:1], CLASSES, targets, None, (0.5,), (0.25,))
    partition = Partition(np.arange(population), np.arange(population + 1))
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))
    settings = EngineSettings(
        rounds=10**6, cohort=cohort, work=LocalWork(1, local_steps=1), lr=0.1, schedule="constant", evaluator="loop"
    )
    return Engine(algorithm, Objective(module, data, torch.device("cpu")), partition, settings, directory=directory)


def measure_overhead(population: int, cohorts: list[int], rounds: int) -> dict[str, Any]:
    """Start time with imports and data, and round times without training; cohort sizes take turns."""
    with tempfile.TemporaryDirectory() as folder:
        engines = {cohorts[0]: engine(Untrained(), population, cohorts[0], Path(folder))}
        engines[cohorts[0]].run_round()
        start_s = process_age_s()
        engines |= {cohort: engine(Untrained(), population, cohort, Path(folder)) for cohort in cohorts[1:]}
        round_s: dict[int, list[float]] = {cohort: [] for cohort in cohorts}
        for job in engines.values():
            job.run_round()
        for _ in range(rounds):
            for cohort in cohorts:
                start = time.process_time()
                engines[cohort].run_round()
                round_s[cohort].append(time.process_time() - start)
    spreads = {cohort: spread(times) for cohort, times in round_s.items()}
    first, *_, last = cohorts
    per_client_s = (spreads[last]["median"] - spreads[first]["median"]) / (last - first)
    return {"population": population, "start_s": start_s, "round_s": spreads, "per_client_s": per_client_s}


def measure_memory(population: int, cohort: int, rounds: int) -> dict[str, Any]:
    """Memory of a process after every hundredth round of real training."""
    with tempfile.TemporaryDirectory() as folder:
        job = engine(FedAvg(), population, cohort, Path(folder))
        held_bytes = []
        for r in range(rounds + 1):
            if r % 100 == 0 and r:
                held_bytes.append(rss_bytes())
            job.run_round()
    # The first hundred rounds fill caches.
    growth = float(np.polyfit(np.arange(len(held_bytes)), held_bytes, 1)[0]) if len(held_bytes) > 1 else 0.0
    return {"rss_bytes": held_bytes, "growth_bytes_per_100_rounds": growth}


def measure_store(population: int, cohort: int, rounds: int) -> dict[str, Any]:
    """Clients that SCAFFOLD's store holds, and its bytes, against clients seen."""
    with tempfile.TemporaryDirectory() as folder:
        job = engine(Scaffold(), population, cohort, Path(folder))
        before = rss_bytes()
        for _ in range(rounds):
            job.run_round()
        held = len(job.store.ids)
        row_bytes = job.store.width * job.server.x.element_size()
        return {
            "clients_seen": len(job.owners),
            "clients_stored": held,
            "row_bytes": row_bytes,
            "store_bytes": held * row_bytes,
            "whole_population_bytes": population * row_bytes,
            "rss_growth_bytes": rss_bytes() - before,
        }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--populations", nargs="+", type=int, default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--cohorts", nargs="+", type=int, default=[1, 10, 100, 1000])
    parser.add_argument("--overhead_rounds", type=int, default=20)
    parser.add_argument("--memory_rounds", type=int, default=1000)
    options = parser.parse_args()
    rows: list[list[Any]] = []
    overheads = []
    for population in options.populations:
        (measured,) = on_ranks(1, measure_overhead, population, options.cohorts, options.overhead_rounds)
        overheads.append(measured)
        name = f"{population:,} clients"
        rows.append([name, "process start to the end of the first round, s", f"{measured['start_s']:.2f}"])
        for cohort, times in measured["round_s"].items():
            rows.append([name, f"round without training, cohort {cohort}, ms", f"{1e3 * times['median']:.2f}"])
        rows.append([name, "every further client of the cohort, ms", f"{1e3 * measured['per_client_s']:.3f}"])
    most = max(options.populations)
    (memory,) = on_ranks(1, measure_memory, most, 10, options.memory_rounds)
    (store,) = on_ranks(1, measure_store, most, 100, 100)
    name = f"{most:,} clients"
    growth_mb = memory["growth_bytes_per_100_rounds"] / 1e6
    rows.append([name, f"memory growth per 100 of {options.memory_rounds} rounds, MB", f"{growth_mb:.3f}"])
    rows.append([name, "SCAFFOLD, 100 rounds: clients seen", store["clients_seen"]])
    rows.append([name, "SCAFFOLD, 100 rounds: clients stored", store["clients_stored"]])
    rows.append([name, "SCAFFOLD, 100 rounds: store, MB", f"{store['store_bytes'] / 1e6:.1f}"])
    rows.append([name, "the same for the whole population, MB", f"{store['whole_population_bytes'] / 1e6:.0f}"])
    table = {"columns": ["population", "what", "value"], "rows": rows}
    report("population", table, {"overheads": overheads, "memory": memory, "store": store}, options.out)


if __name__ == "__main__":
    main()
