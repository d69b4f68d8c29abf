"""What `reduction: exact` costs: adding clients up, and a round's all-reduce on two ranks, each against `fast`.

Both take turns in the same processes; bytes on links are checked.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist
from common import arguments, on_ranks, report, spread

from fedkernels.algorithms import FedAvg
from fedkernels.federated.aggregate import Aggregator
from fedkernels.federated.collectives import Collectives
from fedkernels.wire import Wire

RANKS, SLOTS = 2, 8
Seconds = dict[str, dict[str, list[float]]]


def seconds(d: int, clients: int, repeats: int) -> Seconds:
    """Of adding `clients` updates of `d` numbers, and of reducing what came out, by kind of sum."""
    collectives = Collectives()
    layout = FedAvg().layout(torch.nn.Linear(d, 1, bias=False), None)
    like = torch.zeros(d)
    up = {"delta": torch.randn(clients, d)}
    dtypes = {"fast": torch.float64, "exact": torch.int64}
    aggregators = {kind: Aggregator({"delta": Wire()}, layout, like, dtype, SLOTS) for kind, dtype in dtypes.items()}
    took: Seconds = {part: {kind: [] for kind in dtypes} for part in ("add", "reduce")}
    for turn in range(repeats + 1):  # the first one warms up
        for kind, aggregator in aggregators.items():
            aggregator.reset(RANKS * clients)
            dist.barrier()
            start = time.perf_counter()
            aggregator.add(up, [1.0] * clients, [None] * clients, list(range(clients)))
            added = time.perf_counter()
            dist.barrier()
            begun, before = time.perf_counter(), collectives.link_bytes
            aggregator.reduce(collectives, [[0, 1]])
            reduced = time.perf_counter()
            numbers = SLOTS + 1 + d
            expected = 2 * (RANKS - 1) * 8 * (2 * numbers + 1 if kind == "exact" else numbers)
            assert collectives.link_bytes - before == expected, (collectives.link_bytes - before, expected)
            if turn:
                took["add"][kind].append(added - start)
                took["reduce"][kind].append(reduced - begun)
    return took


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--d", type=int, default=10_000_000, help="numbers of an update")
    parser.add_argument("--clients", type=int, default=4, help="updates added on each rank")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    took = on_ranks(RANKS, seconds, options.d, options.clients, options.repeats)[0]
    rows = []
    for part, by_kind in took.items():
        ratios = spread([exact / fast for fast, exact in zip(by_kind["fast"], by_kind["exact"], strict=True)])
        fast, exact = (1e3 * statistics.median(by_kind[kind]) for kind in ("fast", "exact"))
        rows.append([part, f"{fast:.1f}", f"{exact:.1f}", "{median:.2f} ({min:.2f} to {max:.2f})".format(**ratios)])
    table = {"columns": ["part of a round", "fast, ms", "exact, ms", "exact / fast"], "rows": rows}
    sizes = {"d": options.d, "clients": options.clients, "ranks": RANKS}
    report("reduction", table, {**sizes, "seconds": took}, options.out)


if __name__ == "__main__":
    main()
