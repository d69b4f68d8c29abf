"""What ranks of a process group do in tests; importable by processes that start fresh."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import CASES
from support import tiny_engine, tiny_model
from torch import Tensor

from fedkernels.algorithms import DpFedAvg, FedAvg
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


def closing_on_ranks(everyone: Collectives, shard_size: int, policy: dict[str, float], slow_s: float) -> dict[str, Any]:
    """A round that may close early, of which the last rank sleeps some seconds."""
    collectives = Collectives(shard_size=shard_size)
    at = collectives.at

    def slow_at(round: int, stage: str) -> None:
        at(round, stage)
        if stage == "train" and everyone.rank == everyone.world_size - 1:
            time.sleep(slow_s)

    collectives.at = slow_at  # type: ignore[method-assign]
    engine = tiny_engine(
        FedAvg(),
        collectives=collectives,
        cohort=6,
        drop_slowest=DropSlowest(**policy),
        sharding="ddp" if shard_size > 1 else "none",
    )
    ids, _ = engine.draw_cohort()
    costs = engine.batches.steps(ids).astype(float).tolist()
    placed = place(ids, costs, {}, [1.0] * collectives.world_size)
    row = engine.run_round()
    return {
        "x": engine.server.x.numpy().copy(),
        "late": sorted(engine.late),
        "cohort": row["cohort"],
        "placed": [[ids[p] for p in positions] for positions in placed],
    }


def block_plan() -> tuple[list[slice], list[list[int]]]:
    return [slice(0, 6), slice(6, 11), slice(11, 18), slice(18, 20)], [[0, 1, 2], [1, 2], [0], []]


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
