"""What `reduction: exact` costs: adding clients up, and a round's all-reduce on two ranks, each against `fast`.

    python benchmarks/reduction.py [--d 10000000] [--clients 4] [--repeats 7]

Both are timed in turns in the same processes; medians and their ratio are printed, and bytes on links are checked.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fedkernels.algorithms import FedAvg
from fedkernels.federated.aggregate import Aggregator
from fedkernels.federated.collectives import Collectives
from fedkernels.wire import Wire

RANKS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=10_000_000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, args=(port, options.d, options.clients, options.repeats), nprocs=RANKS)


def _rank(rank: int, port: int, d: int, clients: int, repeats: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    collectives = Collectives()
    module = torch.nn.Linear(d, 1, bias=False)
    layout = FedAvg().layout(module, None)
    like = torch.zeros(d)
    up = {"delta": torch.randn(clients, d)}
    aggregators = {
        "fast": Aggregator({"delta": Wire()}, layout, like, torch.float64, 8),
        "exact": Aggregator({"delta": Wire()}, layout, like, torch.int64, 8),
    }
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(repeats):
        for name, aggregator in aggregators.items():
            aggregator.reset(RANKS * clients)
            start = time.perf_counter()
            aggregator.add(up, [1.0] * clients, [None] * clients, list(range(clients)))
            added = time.perf_counter()
            dist.barrier()
            begun = time.perf_counter()
            collectives.link_bytes = 0
            aggregator.reduce(collectives, [[0, 1]])
            times.setdefault((name, "add"), []).append(added - start)
            times.setdefault((name, "reduce"), []).append(time.perf_counter() - begun)
            numbers = 8 + 1 + d
            expected = 2 * (RANKS - 1) * 8 * (2 * numbers + 1 if name == "exact" else numbers)
            assert collectives.link_bytes == expected, (collectives.link_bytes, expected)
    if rank == 0:
        medians = {key: statistics.median(values) for key, values in times.items()}
        print(f"d = {d:,}, {clients} clients a rank, {RANKS} ranks, medians of {repeats}")
        for what in ("add", "reduce"):
            fast, exact = medians["fast", what], medians["exact", what]
            print(f"{what:<8} fast {1e3 * fast:8.1f} ms   exact {1e3 * exact:8.1f} ms   {exact / fast:5.2f} x")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
