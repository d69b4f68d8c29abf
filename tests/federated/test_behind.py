"""Taking uploads in behind the back of who trains: order, errors, the same bits, and that it does overlap."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import run_rounds, tiny_engine
from torch import Tensor

from fedkernels.algorithms import FedAvg, FedBcgd, FedPac, Scaffold
from fedkernels.contract import Algorithm, Task, Vectors
from fedkernels.federated import behind as behind_module
from fedkernels.federated.behind import Behind, spare_core
from fedkernels.federated.codecs import Int8
from fedkernels.federated.engine import Engine
from fedkernels.federated.intake import Upload

CPU = torch.device("cpu")


@pytest.mark.parametrize("on", [True, False])
def test_jobs_run_in_the_order_of_their_calls(on: bool) -> None:
    ran: list[int] = []

    def job(n: int) -> Callable[[], int]:
        return lambda: ran.append(n) or n  # type: ignore[func-returns-value]

    with Behind[int](CPU, on=on) as behind:
        for n in range(20):
            behind(job(n))
    assert behind.results == ran == list(range(20))


def test_a_caller_two_jobs_ahead_waits() -> None:
    gates = [threading.Event() for _ in range(2)]
    began: list[int] = []

    def job(n: int) -> int:
        began.append(n)
        assert gates[n].wait(30)
        return n

    def second() -> None:
        behind(lambda: job(1))
        called.set()

    called = threading.Event()
    with Behind[int](CPU, on=True) as behind:
        behind(lambda: job(0))
        caller = threading.Thread(target=second)
        caller.start()
        assert not called.wait(0.2)
        assert began == [0]
        gates[0].set()
        assert called.wait(30)
        gates[1].set()
        caller.join()
    assert behind.results == [0, 1]


@pytest.mark.parametrize("last", [False, True])
def test_an_error_of_a_job_is_raised_to_its_caller(last: bool) -> None:
    def fail() -> None:
        raise ValueError("job")

    with pytest.raises(ValueError, match="job"), Behind[None](CPU, on=True) as behind:  # noqa: PT012
        behind(fail)
        if not last:
            behind(lambda: None)
            pytest.fail("the second call tells of the first")


def test_an_error_of_the_caller_is_not_hidden_by_one_of_a_job() -> None:
    def fail() -> None:
        raise ValueError("job")

    with pytest.raises(KeyError, match="caller"), Behind[None](CPU, on=True) as behind:  # noqa: PT012
        behind(fail)
        raise KeyError("caller")


def test_jobs_use_as_many_threads_as_their_caller() -> None:
    torch.set_num_threads(1)
    with Behind[int](CPU, on=True) as behind:
        behind(torch.get_num_threads)
    assert behind.results == [1]


@pytest.mark.parametrize(
    ("cores", "ranks", "threads", "spare"),
    [(2, "1", 1, True), (2, "2", 1, False), (8, "2", 4, False), (9, "2", 4, True)],
)
def test_a_core_is_spare_where_ranks_leave_one(
    monkeypatch: pytest.MonkeyPatch, cores: int, ranks: str, threads: int, spare: bool
) -> None:
    monkeypatch.setattr(behind_module.os, "sched_getaffinity", lambda pid: range(cores))
    for launcher in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(launcher, ranks)
        assert spare_core(threads) == spare


@pytest.mark.parametrize("overlap", ["always", "never"])
def test_the_next_clients_train_while_an_upload_is_taken_in(overlap: str) -> None:
    engine = tiny_engine(FedAvg(), overlap=overlap, clients_per_batch=2)
    take, train = engine._intake.take, engine._train
    second_began, waited = threading.Event(), list[bool]()

    def watched_take(upload: Upload, r: int) -> list[str]:
        if not waited:
            waited.append(second_began.wait(2))
        return take(upload, r)

    def watched_train(positions: list[int], *rest: Any) -> Upload:
        if waited or len(calls) > 0:
            second_began.set()
        calls.append(positions)
        return train(positions, *rest)

    calls: list[list[int]] = []
    engine._intake.take = watched_take  # type: ignore[method-assign]
    engine._train = watched_train  # type: ignore[method-assign]
    engine.run_round()
    assert len(calls) == 3
    assert waited == [overlap == "always"]


SETTINGS: dict[str, tuple[Algorithm, dict[str, Any]]] = {
    "state": (Scaffold(), {}),
    "residuals": (Scaffold(), {"codec": Int8(chunk=40, error_feedback=True)}),
    "blocks": (FedBcgd(blocks=3), {"codec": Int8(chunk=40, error_feedback=True)}),
    "exact": (FedPac(), {"reduction": "exact"}),
    "samples": (FedAvg(), {"weighting": "samples"}),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("together", [1, 4])
def test_bits_are_those_of_a_plain_loop(name: str, together: int) -> None:
    algorithm, settings = SETTINGS[name]

    def ran(overlap: str) -> tuple[Engine, dict[str, Tensor], list[dict[str, Any]]]:
        engine = tiny_engine(
            algorithm, overlap=overlap, clients_per_batch=together, cohort=9, dtype=torch.float32, **settings
        )
        return engine, *run_rounds(engine, 4)

    (plain, expected, rows), (overlapped, found, others) = ran("never"), ran("always")
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert plain.store.ids == overlapped.store.ids
    for client in plain.store.ids:
        assert torch.equal(plain.store.row(client), overlapped.store.row(client))
    timed = {"round_s", "clients_per_s", "rank_idle"}
    for row, other in zip(rows, others, strict=True):
        assert {k: v for k, v in row.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


class Borrower(FedAvg):
    """Sends the very memory that gradients are computed in."""

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        for batch in task.batches():
            g = task.grad(s.x.expand(len(task.steps), -1).clone(), batch)
        return {"delta": g}


def test_memory_of_gradients_can_be_sent() -> None:
    """Though the next clients write theirs to it."""
    servers = []
    for overlap in ("never", "always"):
        engine = tiny_engine(Borrower(), overlap=overlap, clients_per_batch=1)
        take = engine._intake.take

        def late_take(upload: Upload, r: int, take: Any = take) -> list[str]:
            torch.arange(10**6).sum().item()  # for the next clients to begin
            return take(upload, r)

        engine._intake.take = late_take  # type: ignore[method-assign]
        servers.append(run_rounds(engine, 2)[0]["x"])
    assert torch.equal(*servers)


def test_an_upload_that_cannot_be_taken_in_ends_the_round() -> None:
    engine = tiny_engine(FedAvg(), overlap="always", clients_per_batch=1)

    def fail(upload: Upload, r: int) -> list[str]:
        raise OSError("no space for client state")

    engine._intake.take = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no space for client state"):
        engine.run_round()
