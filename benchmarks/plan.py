"""The plan of a run against the run itself, on gloo ranks of this machine.

Costs are measured on one rank, the network by all-reduces of one number and of the round's bucket on as many ranks as
are predicted. Where ranks share cores, training is expected to take as many times longer as there are ranks for a core.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import arguments, on_ranks, report, spread

from fedkernels.config import Config, load
from fedkernels.federated.collectives import Collectives
from fedkernels.planning.network import Network
from fedkernels.planning.planner import Costs, Planner
from fedkernels.train import build

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ["digits/fedavg", "digits/fedmuon", "digits/scaffold"]


def configuration(name: str, cohort: int) -> Config:
    overrides = {"cohort": cohort, "rounds": 1000, "evaluator": "loop", "run_dir": "unused"}
    return load(ROOT / f"configs/{name}.yaml", overrides)


def costs_here(config: Config) -> Costs:
    return Planner(config, config.data.load()).measure()


def all_reduce_s(n_bytes: int, repeats: int = 30) -> float:
    """Median seconds of an all-reduce of so many bytes."""
    bucket = torch.zeros(max(1, n_bytes // 8), dtype=torch.float64)
    taken = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(bucket)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def network_here(ranks: int, n_bytes: int) -> Network:
    """Latency and bandwidth that explain both sizes on a ring."""
    if ranks == 1:
        return Network()
    small, large = on_ranks(ranks, _both, n_bytes)[0]
    latency_s = small / (2 * (ranks - 1))
    gb_s = 2 * (ranks - 1) / ranks * n_bytes / max(large - small, 1e-9) / 1e9
    return Network(ranks_per_node=ranks, node_gb_s=gb_s, latency_us=1e6 * latency_s)


def _both(n_bytes: int) -> tuple[float, float]:
    return all_reduce_s(8), all_reduce_s(n_bytes)


def rounds(config: Config, count: int) -> list[float]:
    """Seconds of rounds after one to warm up; ranks leave a round together."""
    engine, _, _ = build(config, Collectives())
    taken = [engine.run_round()["round_s"] for _ in range(1 + count)]
    return [float(t or 0) for t in taken[1:]]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--configs", nargs="+", default=CONFIGS, help="under configs/, without .yaml")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds")
    parser.add_argument("--cohort", type=int, default=20)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    rows: list[list[Any]] = []
    details: list[dict[str, Any]] = []
    for name in options.configs:
        config = configuration(name, options.cohort)
        costs = on_ranks(1, costs_here, config)[0]
        planner = Planner(config, config.data.load())
        for ranks in options.ranks:
            shared = max(1.0, ranks / cores)
            slowed = Costs(**{key: value * shared for key, value in asdict(costs).items()})
            bucket = planner.predict(max(2, ranks), costs, Network()).link_bytes / (2 * (max(2, ranks) - 1))
            network = network_here(ranks, int(bucket))
            predicted = planner.predict(ranks, slowed, network)
            measured = spread(on_ranks(ranks, rounds, replace(config, rounds=1000), options.rounds)[0])
            ratio = measured["median"] / predicted.round_s
            rows.append([
                name, ranks, f"{1e3 * predicted.round_s:.1f}", f"{1e3 * measured['median']:.1f}", f"{ratio:.2f}",
                f"{1e3 * predicted.reduce_s:.2f}",
            ])  # fmt: skip
            print(*rows[-1], sep="  ", flush=True)
            details.append({
                "config": name, "ranks": ranks, "costs": asdict(costs), "cores_shared_by": shared,
                "network": asdict(network), "predicted": asdict(predicted), "round_s": measured,
            })  # fmt: skip
    columns = ["configuration", "ranks", "predicted, ms", "measured, ms", "measured / predicted", "of it reduction, ms"]
    report("plan", {"columns": columns, "rows": rows}, {"runs": details}, options.out)


if __name__ == "__main__":
    main()
