"""What ranks of a process group do in tests; importable by processes that start fresh."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from cases import CASES
from support import tiny_engine, tiny_model
from torch import Tensor

from fedkernels.algorithms import DpFedAvg, FedAvg, FedBcgd
from fedkernels.config import load
from fedkernels.contract import Task, Vectors
from fedkernels.federated.aggregate import Aggregator, ExactSumError
from fedkernels.federated.closing import DropSlowest
from fedkernels.federated.collectives import Collectives
from fedkernels.federated.schedule import place
from fedkernels.privacy.mechanism import Privacy
from fedkernels.train import build
from fedkernels.wire import Wire


def each_collective(collectives: Collectives) -> dict[str, Any]:
    """Every operation of `Collectives` once, on values that depend on the rank, with the bytes it counted."""
    rank, world = collectives.rank, collectives.world_size
    out: dict[str, Any] = {"rank": rank, "world_size": world}

    def done(name: str, value: Any) -> None:
        out[name] = (value, collectives.link_bytes)
        collectives.link_bytes = 0

    bucket = torch.arange(7, dtype=torch.float64) * 10.0**rank
    same = collectives.all_reduce(bucket)
    done("all_reduce", (bucket.numpy().copy(), same is bucket))

    # Block 0 lies on all ranks, 1 on the last two, 2 on the first alone, 3 on none; elsewhere there is NaN.
    blocks, holders = block_plan()
    sums = torch.full((20,), torch.nan, dtype=torch.float32)
    for block, ranks in zip(blocks, holders, strict=True):
        if rank in ranks:
            sums[block] = 10.0**rank * torch.arange(block.start, block.stop)
    sums[blocks[3]] = -1
    collectives.reduce_blocks(sums, blocks, holders)
    done("reduce_blocks", sums.numpy().copy())

    moves = [(0, 1), (2, 0), (0, 2), (0, 1)]
    outgoing = [torch.full((3,), 100.0 * rank + n) for n, (source, _) in enumerate(moves) if source == rank]
    incoming = [torch.empty(3) for _, target in moves if target == rank]
    collectives.exchange(moves, 12, outgoing, incoming)
    done("exchange", [message.tolist() for message in incoming])

    done("gather", collectives.gather({"rank": rank}))
    return out


def closing_on_ranks(
    everyone: Collectives,
    shard_size: int,
    policy: dict[str, float],
    slow_s: float,
    blocks: int = 0,
    reduction: str = "fast",
) -> dict[str, Any]:
    """A round that may close early, of which the last rank sleeps some seconds; of FedBCGD where there are blocks."""
    collectives = Collectives(shard_size=shard_size)
    at = collectives.at

    def slow_at(round: int, stage: str) -> None:
        at(round, stage)
        if stage == "train" and everyone.rank == everyone.world_size - 1:
            time.sleep(slow_s)

    collectives.at = slow_at  # type: ignore[method-assign]
    engine = tiny_engine(
        FedBcgd(blocks=blocks) if blocks else FedAvg(),
        collectives=collectives,
        cohort=6,
        drop_slowest=DropSlowest(**policy),
        sharding="ddp" if shard_size > 1 else "none",
        reduction=reduction,
    )
    ids, drawn = engine.draw_cohort()
    costs = engine.batches.steps(ids).astype(float).tolist()
    placed = place(ids, costs, {}, [1.0] * collectives.world_size)
    row = engine.run_round()
    return {
        "x": engine.server.x.numpy().copy(),
        "server": {name: value.numpy().copy() for name, value in engine.server.items()},
        "late": sorted(engine.late),
        "cohort": row["cohort"],
        "up_bytes": row["protocol_up_bytes"],
        "blocks": dict(zip(ids, drawn, strict=True)),
        "placed": [[ids[p] for p in positions] for positions in placed],
    }


def block_plan() -> tuple[list[slice], list[list[int]]]:
    return [slice(0, 6), slice(6, 11), slice(11, 18), slice(18, 20)], [[0, 1, 2], [1, 2], [0], []]


LENGTHS = [0, 1, 2, 3, 5, 64, 1001]


def terms_of(rank: int, n: int, dtype: torch.dtype) -> Tensor:
    """What a rank adds to a sum `[n]`: integers that overflow when they meet, floats of which every sum rounds."""
    g = torch.Generator().manual_seed(1000 * rank + n)
    if dtype == torch.int64:
        return torch.randint(-(2**62), 2**62, (n,), generator=g)
    return torch.randn(n, generator=g, dtype=dtype) * 10.0 ** torch.randint(-3, 3, (n,), generator=g)


def on_nodes(collectives: Collectives, nodes: Sequence[int], shard_size: int = 1) -> Collectives:
    """Ranks that sum in levels, the node of each being what torchrun would say."""
    os.environ["GROUP_RANK"] = str(nodes[collectives.process_rank])
    return Collectives(shard_size=shard_size, all_reduce="hierarchical")


def sums_in_levels(everyone: Collectives, cases: Sequence[tuple[Sequence[int], int]]) -> list[dict[str, Any]]:
    """For nodes and a shard size each: sums of every length and type, bytes on links, and torch's collectives."""
    called: list[str] = []
    for name in ("all_reduce", "all_to_all_single"):
        setattr(dist, name, _counted(getattr(dist, name), name, called))
    return [_sums(on_nodes(everyone, nodes, shard_size), called) for nodes, shard_size in cases]


def _sums(collectives: Collectives, called: list[str]) -> dict[str, Any]:
    levels = collectives.hierarchy
    out: dict[str, Any] = {"levels": None if levels is None else (levels.nodes, levels.ranks)}
    for dtype in (torch.int64, torch.float64, torch.float32):
        for n in LENGTHS:
            bucket, collectives.link_bytes = terms_of(collectives.process_rank, n, dtype), 0
            called.clear()
            assert collectives.all_reduce(bucket) is bucket
            out[f"{dtype} {n}"] = (bucket.numpy().copy(), collectives.link_bytes, list(called))
    return out


def _counted(function: Callable[..., Any], name: str, called: list[str]) -> Callable[..., Any]:
    def count(*arguments: Any, **options: Any) -> Any:
        called.append(name)
        return function(*arguments, **options)

    return count


def refused_levels(everyone: Collectives, cases: Sequence[tuple[Sequence[int], int]]) -> list[str]:
    """What a rank says of nodes and shard sizes that do not go with a hierarchical sum."""
    said = []
    for nodes, shard_size in cases:
        try:
            on_nodes(everyone, nodes, shard_size)
        except ValueError as error:
            said.append(str(error))
    return said


def exact_in_levels(everyone: Collectives, nodes: Sequence[int], names: list[str]) -> dict[str, Any]:
    """`exact_on_ranks` with hierarchical sums."""
    return exact_on_ranks(on_nodes(everyone, nodes), names)


def engine_on_ranks(collectives: Collectives) -> dict[str, Any]:
    """Agreement of an engine's ranks: evaluation, a stop that one rank asks for, errors, measured placement."""
    engine = tiny_engine(FedAvg(), collectives=collectives, lr=0.5, placement="measured")
    engine.run_round()
    out: dict[str, Any] = {"evaluate": engine.evaluate(), "stop before": engine.stop_agreed}
    engine.stop_requested = collectives.rank == 1
    row = engine.run_round()
    out |= {"stop after": engine.stop_agreed, "rank_idle": row["rank_idle"]}
    engine.stop_requested = False
    engine.run_round()
    out |= {"stop later": engine.stop_agreed, "x": engine.server.x.numpy().copy()}
    auto = tiny_engine(FedAvg(), collectives=collectives, evaluator="auto")
    out["choice"] = auto.settle()
    try:
        tiny_engine(FedAvg(), collectives=collectives, cohort=collectives.world_size - 1)
    except ValueError as error:
        out["too few"] = str(error)
    broken = tiny_engine(FedAvg(), collectives=collectives, lr=1e200, clip_norm=float("inf"))
    try:
        for _ in range(3):
            broken.run_round()
    except FloatingPointError as error:
        out["error"] = sorted(int(client) for client in re.findall(r"client (\d+) sent NaN", str(error)))
    assert np.isfinite(out["x"]).all()
    return out


class Silent(DpFedAvg):
    """Clients that send zeros."""

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        return {"delta": torch.zeros(len(task.steps), len(s.x), dtype=s.x.dtype)}


def noise_on_ranks(collectives: Collectives) -> list[np.ndarray]:
    """What every round adds to x when clients send zeros."""
    privacy = Privacy(noise_multiplier=0.7, clip=0.05, delta=0.01, noise_seed=7)
    options = {"sampling": "poisson", "on_nonfinite": "drop_client", "privacy": privacy}
    engine = tiny_engine(Silent(), collectives=collectives, **options)
    steps = []
    for _ in range(3):
        before = engine.server.x.clone()
        row = engine.run_round()
        assert ("epsilon" in row) == (collectives.rank == 0)
        steps.append((engine.server.x - before).numpy().copy())
    return steps


def secrets_on_ranks(collectives: Collectives, noise: str) -> dict[str, Any]:
    """What each rank draws where no seed is given, and what it goes on with."""
    privacy = Privacy(noise_multiplier=0.7, clip=0.05, delta=0.01, noise=noise)  # type: ignore[arg-type]
    options = {"sampling": "poisson", "on_nonfinite": "drop_client", "privacy": privacy}
    engine = tiny_engine(Silent(), collectives=collectives, **options)
    assert engine.mechanism is not None
    drawn = engine.mechanism.seed
    engine.run_round()
    return {"drawn": drawn, "settled": engine.mechanism.seed, "x": engine.server.x.numpy().copy()}


def exact_on_ranks(collectives: Collectives, names: list[str]) -> dict[str, Any]:
    """Server state in float64, losses and link bytes of algorithms after two rounds, with exact sums and without."""
    out: dict[str, Any] = {}
    for name in names:
        for reduction in ("exact", "fast"):
            case = CASES[name]
            options = {"reduction": reduction, "clients_per_batch": 1}
            if not case.private:
                options["weighting"] = "samples"
            engine = case.engine(collectives=collectives, **options)
            rows = [engine.run_round() for _ in range(2)]
            state = torch.cat([engine.server[key].flatten() for key in sorted(engine.server)])
            told = [(row["train_loss"], row["cohort"]) for row in rows]
            out[name, reduction] = (state.numpy().copy(), told, rows[0]["link_bytes"])
    return out


def too_large_on_ranks(collectives: Collectives) -> str:
    """What every rank raises where one meets a term that does not fit an exact sum."""
    layout = FedAvg().layout(tiny_model(), None)
    aggregator = Aggregator({"delta": Wire()}, layout, torch.zeros(layout.d), torch.int64, 3)
    aggregator.reset(2)
    huge = 2.0**35 if collectives.rank == 1 else 1.0
    aggregator.add({"delta": torch.full((1, layout.d), huge)}, [1.0], [None], [0])
    try:
        aggregator.reduce(collectives, [[0, 1]])
    except ExactSumError as error:
        return str(error)
    return ""


def planned_rounds(collectives: Collectives, path: str, overrides: dict[str, Any]) -> list[dict[str, Any]]:
    """The rounds of a configuration, with the bytes that ranks counted."""
    engine, _, _ = build(load(Path(path), overrides), collectives)
    return [engine.run_round() for _ in range(engine.settings.rounds)]
