"""Ranks of an attempt meet in a store, which may hold what earlier attempts left there."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch.distributed as dist

from fedkernels.federated.attempt import current, meet
from fedkernels.federated.watch import LostRankError


def start(
    pool: ThreadPoolExecutor, store: dist.Store, ranks: list[int], world_size: int, timeout_s: float = 20.0
) -> list[Future[str]]:
    return [pool.submit(meet, store, rank, world_size, timeout_s) for rank in ranks]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_all_ranks_get_one_name(world_size: int) -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(world_size) as pool:
        names = {future.result() for future in start(pool, store, list(range(world_size)), world_size)}
    assert names == {current()}


@pytest.mark.parametrize("early", [[0], [1], [2], [1, 2], [0, 2]])
def test_another_attempt_gets_another_name_whoever_comes_first(early: list[int]) -> None:
    """Those that come first find all that the attempt before has left, and wait nevertheless."""
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:
        before = start(pool, store, [0, 1, 2], 3)[0].result()
    with ThreadPoolExecutor(3) as pool:
        first = start(pool, store, early, 3)
        time.sleep(0.2)
        assert not any(future.done() for future in first)
        late = start(pool, store, [rank for rank in range(3) if rank not in early], 3)
        names = {future.result() for future in [*first, *late]}
    assert len(names) == 1
    assert names != {before}


@pytest.mark.parametrize("remembered", [False, True])
@pytest.mark.parametrize("missing", [0, 2])
def test_who_does_not_come_is_named_once(missing: int, remembered: bool) -> None:
    store = dist.HashStore()
    if remembered:
        with ThreadPoolExecutor(3) as pool:
            [future.result() for future in start(pool, store, [0, 1, 2], 3)]
    present = [rank for rank in range(3) if rank != missing]
    with ThreadPoolExecutor(2) as pool:
        errors = [future.exception() for future in start(pool, store, present, 3, timeout_s=0.3)]
    assert all(isinstance(error, LostRankError) for error in errors)
    assert {str(error) for error in errors} == {f"rank {missing} did not start within 0.3 s"}
    assert [error.first for error in errors if isinstance(error, LostRankError)] == [True, False]


def test_fewer_ranks_than_before_meet() -> None:
    store = dist.HashStore()
    for world_size in (3, 2, 3):
        with ThreadPoolExecutor(world_size) as pool:
            assert len({future.result() for future in start(pool, store, list(range(world_size)), world_size)}) == 1
