"""A hierarchical sum that a rank does not come to, or stays in: the ranks that wait for those that wait name it too."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from typing import Any

import pytest
import torch

from fedkernels.federated.collectives import join
from fedkernels.federated.watch import LostRankError

TIMEOUT_S, HANGS = 8.0, 3  # the first also holds for the start, on machines that do other things


def rank_that_waits(rank: int, port: int, entered: int, told: Any) -> None:
    """One of two nodes of two ranks; the last of them hangs before it enters the next of a sum's collectives."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["GROUP_RANK"] = str(rank // 2)
    try:
        with join(torch.device("cpu"), TIMEOUT_S, all_reduce="hierarchical") as collectives:
            assert collectives.hierarchy is not None
            collectives.at(3, "reduce")
            if rank == HANGS:
                named, count = collectives._guard.named, 0

                def hang(**options: Any) -> Any:
                    nonlocal count
                    count += 1
                    time.sleep(0 if count <= entered else 60)
                    return named(**options)

                collectives._guard.named = hang  # type: ignore[method-assign]
            for _ in range(2):
                collectives.all_reduce(torch.ones(7))
    except LostRankError as error:
        told.put((rank, str(error)))


@pytest.mark.parametrize("entered", [0, 1, 2])
def test_who_hangs_in_a_sum_is_named_alone(entered: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults.preload"])
    told = context.Queue()
    ranks = [context.Process(target=rank_that_waits, args=(rank, port, entered, told)) for rank in range(4)]
    for process in ranks:
        process.start()
    try:
        said = dict(told.get(timeout=60) for _ in range(3))
    finally:
        for process in ranks:
            process.kill()
    assert sorted(said) == [0, 1, 2]
    (line,) = set(said.values())
    assert line.startswith(f"rank {HANGS} did not reach 'reduce' of round 3 within ")
    assert line.endswith("was last seen in 'reduce' of round 3")
