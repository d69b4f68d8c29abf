"""What the signs of life cost: rounds of a tiny model on two ranks, with the watch and without it.

Both take turns in the same processes, in stretches of several beats of the watch, so that its thread runs in each.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch
import torch.distributed as dist
from common import arguments, noise_images, on_ranks, report, spread
from torch import nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from fedkernels.algorithms import FedAvg
from fedkernels.data.partition import Partition
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.collectives import Collectives
from fedkernels.federated.engine import Engine
from fedkernels.federated.objective import Objective
from fedkernels.federated.settings import EngineSettings
from fedkernels.federated.watch import Watch

RANKS, CLIENTS, SAMPLES = 2, 8, 20
KINDS = ("without", "with")


def engine() -> Engine:
    """Rounds of milliseconds: two clients on each rank take two steps of a network of 1,210 parameters."""
    samples = CLIENTS * SAMPLES
    partition = Partition(np.arange(samples), np.arange(0, samples + 1, SAMPLES))
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    objective = Objective(module, noise_images(samples, (1, 8, 8)), torch.device("cpu"))
    settings = EngineSettings(
        rounds=10**9, cohort=4, work=LocalWork(10, local_steps=2), lr=0.1, schedule="constant", evaluator="loop"
    )
    return Engine(FedAvg(), objective, partition, settings, Collectives())


def stretch(one: Engine, watch: Watch | None, seconds: float) -> tuple[float, int]:
    """Mean seconds of a round, and how many there were in about so many seconds."""
    with Collectives(watch) as one.collectives:
        begun, first = time.perf_counter(), one.round
        while not one.stop_agreed:
            one.stop_requested = time.perf_counter() - begun > seconds
            one.run_round()
        took, rounds = time.perf_counter() - begun, one.round - first
    one.stop_requested = one.stop_agreed = False
    return took / rounds, rounds


def measure(seconds: float, turns: int) -> dict[str, list[tuple[float, int]]]:
    """`stretch` of both kinds in turns."""
    rank = dist.get_rank()
    holder = TCPStore("127.0.0.1", 0, RANKS, is_master=True, wait_for_workers=False)
    port = Collectives().gather(holder.port)[0]
    store = TCPStore("127.0.0.1", port, RANKS, is_master=False)
    one = engine()
    found: dict[str, list[tuple[float, int]]] = {kind: [] for kind in KINDS}
    for turn in range(turns + 1):  # the first one warms up
        for kind in KINDS if turn % 2 else KINDS[::-1]:
            watch = None
            if kind == "with":
                watch = Watch(PrefixStore(str(turn), store.clone()), rank, RANKS, 60.0)
                watch.start()
            result = stretch(one, watch, seconds)
            if turn:
                found[kind].append(result)
            dist.barrier()
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a stretch")
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    found = on_ranks(RANKS, measure, options.seconds, options.turns)[0]
    took = {kind: [1e3 * mean for mean, _ in results] for kind, results in found.items()}
    ratio = spread([on / off for off, on in zip(took["without"], took["with"], strict=True)])
    row = [f"{statistics.median(took[kind]):.3f}" for kind in KINDS]
    row += ["{median:.3f} ({min:.3f} to {max:.3f})".format(**ratio), sum(n for _, n in found["with"])]
    table = {"columns": ["a round without, ms", "with, ms", "with / without", "rounds with"], "rows": [row]}
    report("watch", table, {"ranks": RANKS, "seconds": options.seconds, "stretches": found}, options.out)


if __name__ == "__main__":
    main()
