"""What ranks of client groups do in tests; importable by processes that start fresh."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from support import tiny_engine
from torch import Tensor, nn

from fedkernels.algorithms import ALGORITHMS
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.collectives import Collectives
from fedkernels.federated.engine import Engine
from fedkernels.layout import Role, infer_roles

# Mini-batches of 7, the last of an epoch partial; at most 3 of a client's 5 samples or so on two ranks.
WORK = LocalWork(7, local_steps=3, local_epochs=2)
# Small enough that gradients are clipped.
SETTINGS: dict[str, Any] = {"rounds": 5, "cohort": 6, "work": WORK, "lr": 0.05, "clip_norm": 0.3}


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
    """An engine over the odd model, in float32 without a scalar; options of the algorithm are `algorithm={...}`."""
    module, roles = odd_model(scalar=dtype == torch.float64)
    algorithm = ALGORITHMS[name](**options.pop("algorithm", {}))
    settings = SETTINGS | options
    return tiny_engine(algorithm, module=module, roles=roles, collectives=collectives, dtype=dtype, **settings)


def numbers(engine: Engine) -> dict[str, np.ndarray]:
    """Server vectors, and the state kept at the clients of this rank."""
    kept = {f"client {i} {n}": v[0] for i in engine.store.ids for n, v in engine.store.get([i]).items()}
    return {name: value.detach().clone().numpy() for name, value in ({**engine.server} | kept).items()}


Runs = Sequence[tuple[str, dict[str, Any]]]


def run_all(
    everyone: Collectives, runs: Runs, shard_size: int, rounds: int, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Final vectors and metrics of `(name, options)` runs in groups of `shard_size` ranks."""
    collectives = Collectives(shard_size)
    os.environ.setdefault("LOCAL_RANK", str(everyone.process_rank))  # as launchers do, which DeepSpeed insists on
    out: dict[str, Any] = {"group": collectives.rank, "shard": collectives.group.index}
    for n, (name, options) in enumerate(runs):
        engine = odd_engine(name, collectives, dtype, **options)
        rows = [engine.run_round() for _ in range(rounds)]
        tests = engine.evaluate()
        model = {key: value.numpy().copy() for key, value in engine.named_parameters().items()}
        out[str(n)] = {"state": numbers(engine), "rows": rows, "tests": tests, "model": model}
    return out
