"""What ranks of client groups do in tests; importable by processes that start fresh."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import torch
from support import tiny_engine
from torch import Tensor, nn

from fedkernels import checkpoint
from fedkernels.algorithms import ALGORITHMS, FedAvg
from fedkernels.contract import Task, Vectors
from fedkernels.federated.aggregate import Aggregator, ExactSumError
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.codecs import Int8
from fedkernels.federated.collectives import Collectives
from fedkernels.federated.engine import Engine
from fedkernels.federated.parallel import DeepSpeedSettings
from fedkernels.federated.sharding import Cut, ShardedLayout
from fedkernels.layout import Layout, Role, infer_roles
from fedkernels.privacy.mechanism import Privacy
from fedkernels.wire import Wire

# Mini-batches of 7, the last of an epoch partial; at most 3 of a client's 5 samples or so on two ranks.
WORK = LocalWork(7, local_steps=3, local_epochs=2)
# Small enough that gradients are clipped.
SETTINGS: dict[str, Any] = {"rounds": 5, "cohort": 6, "work": WORK, "lr": 0.05, "clip_norm": 0.3}
SECURE: dict[str, Any] = {
    "sampling": "poisson",
    "on_nonfinite": "drop_client",
    "privacy": Privacy(noise_multiplier=1.0, clip=1.0, delta=0.01, noise="secure"),
}
OFFLOAD = {"deepspeed": DeepSpeedSettings(offload="cpu")}


class Odd(nn.Module):
    """Dimensions that no group divides, parameters smaller than a group, one without a dimension, one unused, one that
    lies in a block and outside, and one out-by-in matrix that is stored in by out."""

    def __init__(self, scalar: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 7)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 7)) for _ in range(2))
        self.blocks.append(nn.Sequential(nn.Linear(7, 7), nn.Tanh()))
        self.tied = self.blocks[2][0]
        self.norm = nn.LayerNorm(7)
        self.scale = nn.Parameter(torch.full(() if scalar else (1,), 0.9))
        self.shift = nn.Parameter(torch.full((1,), 0.1))
        self.unused = nn.Parameter(torch.ones(3, 2))
        self.mixer = nn.Parameter(torch.randn(7, 9) / 3)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            x = x + self.scale * block(x)
        x = self.norm(x + self.tied(x)) + self.shift
        return self.head(torch.tanh(x) @ self.mixer)


def odd_model(scalar: bool = True) -> tuple[nn.Module, dict[str, Role]]:
    torch.manual_seed(3)
    module = Odd(scalar)
    # Columns of the mixer: three blocks of two, and three of one; of the head's weight: three of three.
    roles = infer_roles(module)
    roles["mixer"] = Role("matrix", 1, ((0, 6, 3), (6, 9, 3)))
    roles["head.weight"] = Role("head", 1, ((0, 9, 3),))
    return module, roles


def odd_engine(name: str, collectives: Collectives, dtype: torch.dtype, **options: Any) -> Engine:
    """An engine over the odd model, in float32 without a scalar.

    Args:
        options: settings, options of the algorithm as `algorithm={...}`, and whether there is a `scalar`.
    """
    module, roles = odd_model(options.get("scalar", dtype == torch.float64))
    algorithm = ALGORITHMS[name](**options.get("algorithm", {}))
    settings = SETTINGS | {key: value for key, value in options.items() if key not in ("algorithm", "scalar")}
    return tiny_engine(algorithm, module=module, roles=roles, collectives=collectives, dtype=dtype, **settings)


def numbers(engine: Engine) -> dict[str, np.ndarray]:
    """Server vectors, and the state kept at the clients of this rank."""
    kept = {f"client {i} {n}": v[0] for i in engine.store.ids for n, v in engine.store.get([i]).items()}
    return {name: value.detach().clone().numpy() for name, value in ({**engine.server} | kept).items()}


def rounds_of(engine: Engine, rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """Metrics of some rounds, and what the model of each does on the test samples."""
    told = [(engine.run_round(), engine.evaluate()) for _ in range(rounds)]
    return [row for row, _ in told], [tests for _, tests in told]


Runs = Sequence[tuple[str, dict[str, Any]]]


def run_all(
    everyone: Collectives, runs: Runs, shard_size: int, rounds: int, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Final vectors and metrics of `(name, options)` runs in groups of `shard_size` ranks."""
    collectives = Collectives(shard_size=shard_size)
    os.environ.setdefault("LOCAL_RANK", str(everyone.process_rank))  # as launchers do, which DeepSpeed insists on
    out: dict[str, Any] = {"group": collectives.rank, "shard": collectives.group.index}
    for n, (name, options) in enumerate(runs):
        engine = odd_engine(name, collectives, dtype, **options)
        rows, tests = rounds_of(engine, rounds)
        model = {key: value.numpy().copy() for key, value in engine.named_parameters().items()}
        out[str(n)] = {"state": numbers(engine), "rows": rows, "tests": tests, "model": model}
    return out


def exact_in_groups(everyone: Collectives, names: Sequence[str]) -> dict[str, Any]:
    """Server vectors of algorithms in groups of two, with exact sums, and in float64 with fast ones too."""
    out: dict[str, Any] = {"shard": Collectives(shard_size=2).group.index}
    for dtype, reduction in ((torch.float32, "exact"), (torch.float64, "exact"), (torch.float64, "fast")):
        options = {"sharding": "fsdp2", "clients_per_batch": 1, "weighting": "samples", "reduction": reduction}
        found = run_all(everyone, [(name, options) for name in names], 2, 3, dtype)
        for n, name in enumerate(names):
            state = {key: value for key, value in found[str(n)]["state"].items() if not key.startswith("client")}
            losses = [row["train_loss"] for row in found[str(n)]["rows"]]
            out[f"{name} {dtype} {reduction}"] = (state, found[str(n)]["model"], losses)
    return out


def too_large_in_groups(everyone: Collectives) -> str:
    """What every rank raises where one shard of one group alone meets a term that does not fit an exact sum."""
    collectives = Collectives(shard_size=2)
    layout = FedAvg().layout(odd_model()[0], None)
    x = torch.zeros(layout.d)
    aggregator = Aggregator({"delta": Wire()}, layout, x, torch.int64, 3, group=collectives.group)
    aggregator.reset(2)
    huge = 2.0**35 if collectives.process_rank == 3 else 1.0
    aggregator.add({"delta": torch.full((1, layout.d), huge)}, [1.0], [None], [0])
    try:
        aggregator.reduce(collectives, [[0, 1]])
    except ExactSumError as error:
        return str(error)
    return ""


def save_all(everyone: Collectives, runs: Runs, shard_size: int, rounds: int, folder: Path) -> None:
    """Checkpoints of some runs after some rounds."""
    collectives = Collectives(shard_size=shard_size)
    for n, (name, options) in enumerate(runs):
        engine = odd_engine(name, collectives, torch.float64, **options)
        for _ in range(rounds):
            engine.run_round()
        checkpoint.save(folder / str(n), engine, {"run": name}, {"time_s": 1.0}, 1)


def continue_all(everyone: Collectives, runs: Runs, shard_size: int, rounds: int, folder: Path) -> dict[str, Any]:
    """What `run_all` tells, of runs that go on from the checkpoints of `save_all`."""
    collectives = Collectives(shard_size=shard_size)
    out: dict[str, Any] = {"group": collectives.rank, "shard": collectives.group.index}
    for n, (name, options) in enumerate(runs):
        engine = odd_engine(name, collectives, torch.float64, **options)
        assert checkpoint.restore(folder / str(n), engine, {"run": name}) == ({"time_s": 1.0}, [])
        rows, tests = rounds_of(engine, rounds)
        model = {key: value.numpy().copy() for key, value in engine.named_parameters().items()}
        out[str(n)] = {"state": numbers(engine), "rows": rows, "tests": tests, "model": model}
    return out


def each_group_operation(everyone: Collectives) -> dict[str, Any]:
    """Everything that groups of two exchange, inside and among each other, on values that depend on the rank."""
    collectives = Collectives(shard_size=2)
    group, rank, shard = collectives.group, collectives.process_rank, collectives.group.index
    out: dict[str, Any] = {
        "rank": collectives.rank,
        "world_size": collectives.world_size,
        "processes": collectives.processes,
        "leader": collectives.leader,
    }

    def counted(value: Any) -> tuple[Any, int]:
        moved, collectives.link_bytes = collectives.link_bytes, 0
        return value, moved

    out["sum"] = group.sum(torch.tensor([10.0**rank])).tolist()
    swapped = group.swap([torch.full((j + 1,), 10.0 * rank + j) for j in range(2)], [shard + 1] * 2)
    out["swap"] = [part.tolist() for part in swapped]
    collected = group.collect(torch.full((shard + 1,), 10.0 * rank), [1, 2])
    out["collect"] = None if collected is None else [part.tolist() for part in collected]
    own = torch.full((3,), 10.0**rank, dtype=torch.float64)
    out["all_reduce"] = counted(collectives.all_reduce(own).tolist())
    # Group 0 sends to group 1 and the other way round; each shard to its own.
    incoming = [torch.empty(2, dtype=torch.float64)]
    outgoing = [torch.full((2,), 100.0 * collectives.rank + rank, dtype=torch.float64)]
    collectives.exchange([(0, 1), (1, 0)], 16, outgoing, incoming)
    out["exchange"] = counted([part.tolist() for part in incoming])
    # The first block lies in both groups, the second in group 1 alone.
    sums = torch.full((3,), 10.0**rank, dtype=torch.float64)
    collectives.reduce_blocks(sums, [slice(0, 2), slice(2, 3)], [[0, 1], [1]])
    out["reduce_blocks"] = counted(sums.tolist())
    out["gather"] = collectives.gather(rank)
    try:
        Collectives(shard_size=3)
    except ValueError as error:
        out["uneven"] = str(error)
    return out


def map_matrices_on_ranks(everyone: Collectives) -> dict[str, Any]:
    """Sums of rows and columns before every entry, which need matrices whole, of two clients' shards."""
    collectives = Collectives(shard_size=2)
    module, roles = odd_model()
    whole = Layout.of(module, roles, route="all_matrices")
    layout = ShardedLayout(whole, Cut("row", 2), collectives.group)
    vectors = torch.arange(2.0 * whole.d, dtype=torch.float64).view(2, -1)
    shard = torch.stack([layout.flatten(whole.views(row)) for row in vectors])
    part = layout.matrix_part
    assert part is not None
    seen = []

    def function(matrices: Tensor) -> Tensor:
        seen.extend([(len(matrices), *matrix.shape[1:]) for matrix in matrices.unbind(1)])
        return matrices.cumsum(-1).cumsum(-2)

    mapped = part.map(shard[:, part.start : part.stop], function)
    return {"seen": seen, "mapped": mapped.numpy()}


def spoilt_on_ranks(everyone: Collectives, sharding: str) -> dict[str, Any]:
    """Rounds in which one rank alone finds a client spoilt, and one alone is asked to stop."""
    collectives = Collectives(shard_size=2)
    client = FedAvg.client

    def spoilt(self: FedAvg, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        up = client(self, s, k, task)
        if collectives.process_rank == 1 and not spoilt.done:  # type: ignore[attr-defined]
            spoilt.done = True  # type: ignore[attr-defined]
            up["delta"][0, 0] = torch.nan
        return up

    spoilt.done = False  # type: ignore[attr-defined]
    FedAvg.client = spoilt  # type: ignore[method-assign]
    engine = odd_engine("fedavg", collectives, torch.float64, sharding=sharding, on_nonfinite="drop_client")
    keys = ("train_loss", "cohort", "dropped", "link_bytes")
    rows, stops = [engine.run_round()], [engine.stop_agreed]
    dropped = "; ".join(engine.dropped)
    engine.stop_requested = collectives.process_rank == 3
    rows.append(engine.run_round())
    stops.append(engine.stop_agreed)
    return {"dropped": dropped, "stops": stops, "rows": [[row[key] for key in keys] for row in rows]}


def refused_on_ranks(everyone: Collectives) -> dict[str, str]:
    """What an engine says of settings that do not go with shards."""
    collectives = Collectives(shard_size=2)
    os.environ.setdefault("LOCAL_RANK", str(everyone.process_rank))
    out = {}
    tries: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
        "evaluator": ("fedavg", torch.float64, {"sharding": "fsdp2", "evaluator": "batched"}),
        "codec": ("fedavg", torch.float64, {"sharding": "fsdp2", "codec": Int8()}),
        "low rank": ("fedmuon", torch.float64, {"sharding": "fsdp2", "algorithm": {"momentum_rank": 0.5}}),
        "cohort": ("fedavg", torch.float64, {"sharding": "fsdp2", "cohort": 0}),
        "scalar": ("fedavg", torch.float32, {"sharding": "deepspeed", "scalar": True}),
        "double": ("fedavg", torch.float64, {"sharding": "deepspeed", "scalar": False}),
        "noise": ("dp_fedavg", torch.float64, {"sharding": "ddp", **SECURE}),
    }
    for what, (name, dtype, options) in tries.items():
        try:
            odd_engine(name, collectives, dtype, **options).run_round()
            out[what] = "nothing"
        except ValueError as error:
            out[what] = str(error)
    return out


def adapters_in_groups(everyone: Collectives, shard_size: int, sharding: str) -> dict[str, Any]:
    """Three rounds of low-rank adapters on tiny transformers: trained and frozen parameters, and metrics."""
    collectives = Collectives(shard_size=shard_size)
    out = {}
    for model in adapters.MODELS:
        for algorithm in adapters.ALGORITHMS:
            engine = adapters.adapter_engine(model, algorithm, collectives, sharding=sharding)
            rows = [engine.run_round() | engine.evaluate() for _ in range(3)]
            parts = {"trained": engine.named_parameters(), "frozen": engine.frozen_parameters()}
            whole = {kind: {k: v.numpy().copy() for k, v in tensors.items()} for kind, tensors in parts.items()}
            out[f"{model} {algorithm}"] = {"rows": rows, "d": engine.layout.d, **whole}
    return out
