"""The table of places, with ranks that are threads and a store in this process."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from fedkernels.federated import watch
from fedkernels.federated.guard import by_backend
from fedkernels.federated.watch import Watch


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Watch]]:
    """Four ranks in groups of two, that count faster than in a job."""
    monkeypatch.setattr(watch, "BEAT_S", 0.1)
    monkeypatch.setattr(watch, "CONFIRM_S", 3.0)
    store = dist.HashStore()
    ranks = [Watch(store, rank, 4, 10.0, group_size=2) for rank in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(Watch.start, ranks))
        for rank in ranks:
            rank.at(3, "train")
        yield ranks
        list(pool.map(lambda rank: rank.leave(None), ranks))


def lost(rank: Watch) -> str:
    return str(rank.lost(RuntimeError("timed out")))


def come(rank: Watch, group_steps: int, collectives: int = 0) -> None:
    for _ in range(group_steps):
        rank.enter_group_step()
    for _ in range(collectives):
        rank.enter()


def test_within_a_group_whoever_has_begun_less_is_late(ranks: list[Watch]) -> None:
    """However far another group is, which trains on its own."""
    for rank, steps in zip(ranks, (7, 6, 2, 2), strict=True):
        come(rank, steps)
    said = lost(ranks[0])
    assert said.startswith(
        "rank 1 did not join the others of the client group in 'train' of round 3 within 0 s: rank 1 ("
    )
    assert "rank 2" not in said


@pytest.mark.parametrize(("steps", "late"), [((7, 6), "rank 1"), ((6, 7), "rank 0"), ((6, 6), "ranks 0, 1")])
def test_of_a_group_that_is_late_those_are_named_whom_it_waits_for(
    steps: tuple[int, int], late: str, ranks: list[Watch]
) -> None:
    for rank, done in zip(ranks, steps, strict=False):
        come(rank, done)
    for rank in ranks[2:]:
        rank.at(3, "reduce")
        come(rank, 9, 1)
    assert lost(ranks[2]).startswith(f"{late} did not reach 'reduce' of round 3 within 0 s: ")


def test_nobody_is_late_where_all_have_come_as_far(ranks: list[Watch]) -> None:
    for rank in ranks:
        come(rank, 3, 1)
    assert lost(ranks[1]).startswith("a collective failed on rank 1 (host ")


def test_errors_of_backends() -> None:
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:552] Connection closed by peer"
    assert by_backend(RuntimeError(gloo))
    assert by_backend(dist.DistBackendError("NCCL error"))
    assert not by_backend(RuntimeError("shape '[2]' is invalid for input of size 3"))
    assert not by_backend(OSError(gloo))
    assert not by_backend(None)
