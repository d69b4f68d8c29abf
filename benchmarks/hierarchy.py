"""A hierarchical all-reduce against a flat one, on two nodes of two ranks: network namespaces joined by a shaped cable.

The cable is a veth pair whose ends send at most so many Mbit/s (tbf), and late by a delay (netem) where the kernel has
that; neither holds up what stays within a node. Flat and hierarchical take turns on the same ranks, and sums are
checked. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import arguments, report, spread

from fedkernels.federated.collectives import Collectives
from fedkernels.federated.hierarchy import AllReduce

NODES, RANKS, PORT = 2, 2, 29500
ADDRESSES = ("10.78.0.1", "10.78.0.2")
WAYS: tuple[AllReduce, ...] = ("flat", "hierarchical")
SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")


def tool(*command: str, check: bool = True) -> bool:
    done = subprocess.run(command, capture_output=True, text=True)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}; this benchmark needs root and iproute2")
    return done.returncode == 0


class Cable:
    """Two network namespaces joined by a cable, for as long as the context lasts."""

    def __init__(self) -> None:
        self.names = [f"fkb{os.getpid()}-{node}" for node in range(NODES)]

    def __enter__(self) -> Cable:
        one, other = self.names
        for name in self.names:
            tool("ip", "netns", "add", name)
        tool("ip", "link", "add", "eth0", "netns", one, "type", "veth", "peer", "name", "eth0", "netns", other)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            tool("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                tool("ip", "-n", name, "link", "set", device, "up")
        return self

    def __exit__(self, *error: object) -> None:
        for name in self.names:
            tool("ip", "netns", "delete", name, check=False)

    def shape(self, mbit_s: int, delay_ms: float) -> bool:
        """Slow both ends down; whether the kernel can."""
        ends = [("tc", "-n", name, "qdisc") for name in self.names]
        for end in ends:
            tool(*end, "delete", "dev", "eth0", "root", check=False)
        how = ["netem", "delay", f"{delay_ms}ms", "rate", f"{mbit_s}mbit", "limit", "100000"]
        if not delay_ms:
            how = ["tbf", "rate", f"{mbit_s}mbit", "burst", "256kb", "latency", "100ms"]
        return all(tool(*end, "add", "dev", "eth0", "root", *how, check=False) for end in ends)

    def run(self, sizes: Sequence[int], repeats: Sequence[int]) -> list[dict[str, Any]]:
        """What the ranks measure, rank by rank."""
        with tempfile.TemporaryDirectory() as folder:
            ranks = []
            for rank in range(NODES * RANKS):
                node = rank // RANKS
                env = {
                    "RANK": str(rank), "WORLD_SIZE": str(NODES * RANKS), "GROUP_RANK": str(node),
                    "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": "eth0",
                    "OMP_NUM_THREADS": "1",
                }  # fmt: skip
                work = [str(Path(folder) / f"{rank}.json"), json.dumps(list(sizes)), json.dumps(list(repeats))]
                # In a mount namespace of its own, /sys tells of the node's devices rather than the host's.
                inside = f'mount -t sysfs sysfs /sys && exec "{sys.executable}" "$@"'
                command = ["nsenter", f"--net=/run/netns/{self.names[node]}", "unshare", "--mount", "sh", "-c", inside]
                ranks.append(subprocess.Popen([*command, "sh", __file__, "--rank", *work], env=os.environ | env))
            statuses = [rank.wait() for rank in ranks]
            if any(statuses):
                raise SystemExit(f"ranks ended with {statuses}")
            return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(NODES * RANKS)]


def measure(sizes: Sequence[int], repeats: Sequence[int]) -> list[dict[str, Any]]:
    """Seconds of all-reduces of float64 in turns, and the bytes that left this node."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ways = {way: Collectives(all_reduce=way) for way in WAYS}
    assert ways["hierarchical"].hierarchy is not None
    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    for n_bytes, times in zip(sizes, repeats, strict=True):
        bucket = torch.empty(n_bytes // 8, dtype=torch.float64)
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        sent: dict[str, list[int]] = {way: [] for way in WAYS}
        for turn in range(-1, times):  # the first warms up
            for way in WAYS if turn % 2 else reversed(WAYS):
                bucket.fill_(rank + 1)
                dist.barrier()
                before, start = int(SENT.read_text()), time.perf_counter()
                ways[way].all_reduce(bucket)
                seconds = time.perf_counter() - start
                dist.barrier()
                if turn >= 0:
                    taken[way].append(seconds)
                    sent[way].append(int(SENT.read_text()) - before)
                assert bool((bucket == world * (world + 1) // 2).all()), (way, n_bytes)
        found.append({"n_bytes": n_bytes, "seconds": taken, "sent": sent})
    dist.destroy_process_group()
    return found


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(sys.argv[3]), json.loads(sys.argv[4]))))
        return
    parser = arguments(__doc__ or "")
    parser.add_argument("--mbit", nargs="+", type=int, default=[1000, 100], help="of the cable, each way")
    parser.add_argument("--delay", nargs="+", type=float, default=[0.0, 0.2, 2.0], help="one way, in milliseconds")
    parser.add_argument("--bytes", nargs="+", type=int, default=[10_000, 1_000_000, 40_000_000])
    parser.add_argument("--repeats", nargs="+", type=int, default=[200, 30, 5], help="turns for each size")
    options: argparse.Namespace = parser.parse_args()
    if len(options.bytes) != len(options.repeats):
        parser.error(f"--repeats: {len(options.repeats)} numbers for {len(options.bytes)} sizes")
    rows: list[list[Any]] = []
    details: list[dict[str, Any]] = []
    with Cable() as cable:
        for mbit in options.mbit:
            for delay in options.delay:
                if not cable.shape(mbit, delay):
                    print(f"this kernel cannot delay packets (no netem): {delay} ms left out", flush=True)
                    details.append({"mbit_s": mbit, "delay_ms": delay, "left_out": "no netem"})
                    continue
                ranks = cable.run(options.bytes, options.repeats)
                for of_size in zip(*ranks, strict=True):
                    rows.append(row(mbit, delay, of_size))
                    print(*rows[-1], sep="  ", flush=True)
                    details.append({"mbit_s": mbit, "delay_ms": delay, "ranks": list(of_size)})
    columns = [
        "Mbit/s", "delay, ms", "bucket, bytes", "flat, ms", "hierarchical, ms", "flat / hierarchical",
        "sent by a node: flat", "hierarchical",
    ]  # fmt: skip
    report("hierarchy", {"columns": columns, "rows": rows}, {"runs": details}, options.out)


def row(mbit: int, delay: float, ranks: Sequence[dict[str, Any]]) -> list[Any]:
    """A turn lasts as long as its slowest rank; bytes are of the first node."""
    n_bytes = ranks[0]["n_bytes"]
    flat, levels = ([max(turn) for turn in zip(*(rank["seconds"][way] for rank in ranks), strict=True)] for way in WAYS)
    ratios = spread([one / other for one, other in zip(flat, levels, strict=True)])
    sent = [spread(ranks[0]["sent"][way])["median"] / n_bytes for way in WAYS]
    return [
        mbit, delay, f"{n_bytes:,}", f"{1e3 * spread(flat)['median']:.3g}", f"{1e3 * spread(levels)['median']:.3g}",
        f"{ratios['median']:.2f} ({ratios['min']:.2f} to {ratios['max']:.2f})", *(f"{share:.2f} n" for share in sent),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
