"""Small federations for tests, in float64, on one process or on several gloo ranks."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from fedkernels.contract import Algorithm
from fedkernels.data.datasets import Dataset
from fedkernels.data.partition import Partition
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.collectives import Collectives
from fedkernels.federated.engine import Engine
from fedkernels.federated.objective import Objective
from fedkernels.federated.settings import EngineSettings
from fedkernels.layout import Role, infer_roles

CLIENTS, CLASSES = 12, 4


def tiny_data(samples: int = 150, seed: int = 0) -> Dataset:
    """Images `[n, 1, 4, 4]` whose brightness pattern follows the class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, samples)
    patterns = rng.uniform(0, 200, (CLASSES, 1, 4, 4))
    images = torch.from_numpy((patterns[labels] + rng.uniform(0, 55, (samples, 1, 4, 4))).astype(np.uint8))
    targets = torch.from_numpy(labels)
    return Dataset("image", images, targets, images[:60], targets[:60], CLASSES, targets, None, (0.4,), (0.3,))


def uneven_partition(samples: int = 150, clients: int = CLIENTS, seed: int = 0) -> Partition:
    """Clients of very different sizes, some smaller than a batch."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, samples), clients - 1, replace=False))
    return Partition(rng.permutation(samples), np.concatenate([[0], cuts, [samples]]))


def tiny_model(seed: int = 0) -> nn.Module:
    """Two hidden matrices of one shape, a norm, biases and a head, in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8),
        nn.GELU(), nn.Linear(8, CLASSES),
    ).double()  # fmt: skip


def tiny_roles(module: nn.Module) -> dict[str, Role]:
    roles = infer_roles(module)
    return roles | {"8.weight": Role("head", 0, ((0, CLASSES, CLASSES),))}


def tiny_engine(
    algorithm: Algorithm,
    *,
    collectives: Collectives | None = None,
    partition: Partition | None = None,
    module: nn.Module | None = None,
    roles: dict[str, Role] | None = None,
    dtype: torch.dtype = torch.float64,
    objective: type[Objective] = Objective,
    directory: Path = Path("unused"),
    **settings: Any,
) -> Engine:
    """An engine over the tiny data and model, or over another module; settings override the defaults below."""
    torch.set_num_threads(1)
    if module is None:
        module = tiny_model()
        roles = tiny_roles(module)
    defaults = {
        "rounds": 4, "cohort": 6, "work": LocalWork(8, local_steps=5, local_epochs=3), "lr": 0.05, "evaluator": "loop",
    }  # fmt: skip
    return Engine(
        algorithm,
        objective(module.to(dtype), tiny_data(), torch.device("cpu")),
        partition or uneven_partition(),
        EngineSettings(**(defaults | settings)),
        collectives,
        roles=roles,
        directory=directory,
    )


def run_rounds(engine: Engine, rounds: int) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The server state after some rounds, copied, and the metrics of each round."""
    rows = [engine.run_round() for _ in range(rounds)]
    return {name: value.clone() for name, value in engine.server.items()}, rows


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(collectives, *arguments)` on gloo ranks in processes of their own; their results in rank order.

    The processes import `function` by name, so it lives in a module of `tests/`, not in a test file.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, port, queue, function, arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    outcomes: dict[int, Any] = {}
    deadline = time.monotonic() + 300
    try:
        while len(outcomes) < world_size:
            try:
                rank, outcome = queue.get(timeout=0.5)
            except Empty:
                if time.monotonic() > deadline or any(process.exitcode for process in ranks):
                    codes = [process.exitcode for process in ranks]
                    raise AssertionError(f"ranks died or hang, exit codes {codes}") from None
                continue
            if isinstance(outcome, str):
                raise AssertionError(f"rank {rank} failed:\n{outcome}")
            outcomes[rank] = outcome[0]
        for process in ranks:
            process.join(30)
    finally:
        for process in ranks:
            process.terminate()
    return [outcomes[rank] for rank in range(world_size)]


def _rank(rank: int, world_size: int, port: int, queue: Any, function: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        result = function(Collectives(), *arguments)
        # Plain numpy crosses the queue by value; shared tensors would die with this process.
        queue.put((rank, (result,)))
    except BaseException:
        queue.put((rank, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
