"""The engine around an algorithm: batches, checks of its settings, rounds, evaluation, agreement of ranks."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import poison
from rank_checks import engine_on_ranks
from support import CLIENTS, on_ranks, run_rounds, tiny_engine, uneven_partition
from torch import Tensor

from fedkernels.algorithms import FedAvg, FedBcgd, Scaffold
from fedkernels.contract import Round, Task, Vectors
from fedkernels.data.partition import Partition
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.collectives import Collectives
from fedkernels.federated.schedule import sample_cohort


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (LocalWork(8, local_steps=5), [5, 5, 5, 5]),
        (LocalWork(8, local_epochs=2), [2, 2, 4, 14]),
        (LocalWork(8, local_steps=5, local_epochs=2), [2, 2, 4, 5]),
        (LocalWork(100, local_steps=3, local_epochs=1), [1, 1, 1, 1]),
    ],
)
def test_local_steps(work: LocalWork, expected: list[int]) -> None:
    assert work.steps(np.array([1, 8, 9, 50])).tolist() == expected


def test_local_work_must_be_given() -> None:
    with pytest.raises(ValueError, match="set local_steps, local_epochs or both"):
        LocalWork(8)


def drawn(partition: Partition, work: LocalWork, clients: list[int], r: int) -> list[list[list[int]]]:
    """Per client and step the sample numbers that count, read off the images themselves."""
    engine = tiny_engine(FedAvg(), partition=partition, work=work, cohort=1)
    everything, _ = engine.objective.train_batch(torch.arange(150)[None], None)
    number = {image.numpy().tobytes(): i for i, image in enumerate(everything[0])}
    out: list[list[list[int]]] = [[] for _ in clients]
    for batch in engine.batches.draw(clients, r):
        for c in range(len(clients)):
            if batch.active is None or batch.active[c]:
                keep = torch.ones(work.batch_size) if batch.weights is None else batch.weights[c]
                images = batch.inputs[c][keep > 0]
                out[c].append([number[image.numpy().tobytes()] for image in images])
                targets = engine.objective._targets[out[c][-1]]
                assert torch.equal(batch.targets[c][keep > 0], targets)
    return out


WORK = LocalWork(8, local_epochs=3)


def test_epochs_are_shuffled_and_complete() -> None:
    partition = uneven_partition()
    everyone = list(range(CLIENTS))
    orders = []
    for client, steps in zip(everyone, drawn(partition, WORK, everyone, 0), strict=True):
        n = len(partition[client])
        per_epoch = math.ceil(n / 8)
        assert len(steps) == 3 * per_epoch
        for epoch in range(3):
            own = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
            assert [len(step) for step in own] == [8] * (n // 8) + ([n % 8] if n % 8 else [])
            order = list(itertools.chain(*own))
            assert sorted(order) == sorted(partition[client].tolist())
            orders += [tuple(order)] if n > 8 else []
    assert len(set(orders)) == len(orders) > 9


def test_steps_cut_an_epoch_short() -> None:
    work = LocalWork(8, local_steps=4)
    partition = Partition(np.arange(150), np.array([0, 20, 150]))
    small, large = drawn(partition, work, [0, 1], 0)
    assert [len(step) for step in small] == [8, 8, 4, 8]
    assert [len(step) for step in large] == [8, 8, 8, 8]
    assert len(set(itertools.chain(*large))) == 32


def test_draws_do_not_depend_on_who_else_is_drawn() -> None:
    partition = uneven_partition()
    together = drawn(partition, WORK, [2, 7, 5, 11], 3)
    assert [drawn(partition, WORK, [client], 3)[0] for client in (2, 7, 5, 11)] == together
    assert drawn(partition, WORK, [2, 7, 5, 11], 4) != together


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cohort": CLIENTS + 1}, "cohort is 13, expected 1 to the number of clients, 12"),
        ({"cohort": 0}, "cohort is 0"),
        (
            {"partition": Partition(np.arange(150), np.array([0, 75, 75, 150, 150])), "cohort": 2},
            r"client 1 has no sample \(2 of 4 clients are empty\)",
        ),
    ],
)
def test_bad_federations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_engine(FedAvg(), **options)


def test_runs_repeat_to_the_last_bit_and_differ_between_seeds() -> None:
    runs = [run_rounds(tiny_engine(Scaffold(), seed=seed), 3)[0]["x"] for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_metrics_of_a_round() -> None:
    engine = tiny_engine(FedAvg(), lr=0.4, rounds=3)
    for r in range(3):
        row = engine.run_round()
        assert row["round"] == engine.round == r + 1
        assert row["lr"] == pytest.approx(0.2 * (1 + math.cos(math.pi * r / 3)), rel=1e-14)
        assert (row["cohort"], row["dropped"], row["link_bytes"]) == (6, 0, 0)
        assert row["rank_idle"] == 0
        assert row["clients_per_s"] == pytest.approx(6 / row["round_s"])


def test_the_train_loss_is_the_mean_over_clients_and_steps() -> None:
    """At learning rate 0 every loss is one of the start, where clients with more steps count more often."""
    engine = tiny_engine(FedAvg(), lr=0.0)
    losses = []
    for client in sample_cohort("uniform", 0, 0, CLIENTS, 6).tolist():
        for batch in engine.batches.draw([client], 0):
            weights = None if batch.weights is None else batch.weights[0]
            losses.append(
                engine.objective.loss(engine.objective.module, batch.inputs[0], batch.targets[0], weights).item()
            )
    assert engine.run_round()["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-13)


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
def test_what_an_algorithm_is_told(weighting: str) -> None:
    """Round, lr and steps of the task; the server and the metrics get the cohort that counted and what it did."""
    seen: list[Any] = []

    class Spy(FedAvg):
        def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
            seen.append((task.round, task.lr, task.steps.flatten().tolist()))
            assert list(s) == ["x"]
            return super().client(s, k, task)

        def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
            seen.append(r)
            return super().server(s, agg, r)

        def metrics(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, float]:
            seen.append(r)
            return {}

    ids = sample_cohort("uniform", 0, 0, CLIENTS, 6).tolist()
    for dropped in (set[int](), {ids[2]}):
        seen.clear()
        engine = tiny_engine(Spy(), clients_per_batch=6, weighting=weighting, on_nonfinite="drop_client")
        poison(engine, {0: dropped})
        engine.run_round()
        (task_round, lr, steps), *server_rounds = seen
        nominal = Round(index=0, cohort=6, population=CLIENTS, steps=5, lr=0.05)
        assert task_round == nominal
        assert lr == 0.05
        K = {i: min(5, 3 * math.ceil(len(engine.batches.partition[i]) / 8)) for i in ids}
        assert sorted(steps) == sorted(K.values())
        weights = {
            i: len(engine.batches.partition[i]) if weighting == "samples" else 1 for i in ids if i not in dropped
        }
        mean = sum(weight * K[i] for i, weight in weights.items()) / sum(weights.values())
        assert 3 < mean < 5
        assert server_rounds == [replace(nominal, cohort=len(weights), steps=mean)] * 2


def test_the_model_is_left_in_training_mode_with_the_server_parameters() -> None:
    engine = tiny_engine(FedAvg(), lr=0.5)
    engine.run_round()
    engine.evaluate()
    module = engine.objective.module
    assert module.training
    for name, p in engine.named_parameters().items():
        assert torch.equal(module.get_parameter(name), p)
        assert p.data_ptr() == engine.server.x[engine.layout[name].start :].data_ptr()


@pytest.mark.parametrize("evaluator", ["loop", "batched"])
def test_evaluating_between_rounds_changes_nothing(evaluator: str) -> None:
    plain, watched = (tiny_engine(FedAvg(), evaluator=evaluator) for _ in range(2))
    watched.evaluate()
    for _ in range(3):
        plain.run_round()
        watched.run_round()
        assert watched.evaluate() == watched.evaluate()
    assert torch.equal(plain.server.x, watched.server.x)


def test_empty_blocks_keep_still_without_momentum() -> None:
    engine = tiny_engine(FedBcgd(blocks=4, momentum=0.0), cohort=2, lr=0.5)
    x = engine.server.x.clone()
    engine.run_round()
    moved = [bool((engine.server.x - x)[engine.layout.block(b)].any()) for b in range(5)]
    assert sum(moved[:4]) == 2
    assert moved[4]


@pytest.mark.parametrize(("reduce_dtype", "tolerance"), [("float64", 0.0), ("float32", 1e-6)])
def test_reduce_dtype(reduce_dtype: str, tolerance: float) -> None:
    """Sums in float32 are the float64 ones to rounding."""
    exact = run_rounds(tiny_engine(FedAvg(), dtype=torch.float32, lr=0.5), 1)[0]["x"]
    found = run_rounds(tiny_engine(FedAvg(), dtype=torch.float32, lr=0.5, reduce_dtype=reduce_dtype), 1)[0]["x"]
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(2, engine_on_ranks)


def test_ranks_evaluate_together(ranks: list[dict[str, Any]]) -> None:
    engine = tiny_engine(FedAvg(), lr=0.5)
    engine.run_round()
    for found in ranks:
        assert found["evaluate"] == pytest.approx(engine.evaluate(), rel=1e-12)


def test_one_rank_stops_all(ranks: list[dict[str, Any]]) -> None:
    stops = [(found["stop before"], found["stop after"], found["stop later"]) for found in ranks]
    assert stops == [(False, True, False)] * 2


def test_measured_placement_changes_nothing(ranks: list[dict[str, Any]]) -> None:
    expected = run_rounds(tiny_engine(FedAvg(), lr=0.5), 3)[0]["x"].numpy()
    for found in ranks:
        np.testing.assert_allclose(found["x"], expected, rtol=1e-12, atol=1e-12)
        assert 0 <= found["rank_idle"] < 1


def test_ranks_agree_on_the_evaluator(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["choice"] == ranks[1]["choice"]
    assert "measured" in ranks[0]["choice"].why


def test_every_rank_needs_a_client(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["too few"] == "2 ranks for a cohort of 1: some would have no client; start fewer ranks"


def test_all_ranks_raise_for_all_clients(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["error"] == ranks[1]["error"]
    assert len(ranks[0]["error"]) == 6


def test_state_moves_with_its_client() -> None:
    """Every rank's part of `_move`, on one process: what leaves is dropped, what arrives is stored."""
    sent: list[Any] = []

    class Recorder(Collectives):
        def exchange(self, moves: Any, message_bytes: int, outgoing: Any, incoming: Any) -> None:
            sent.append((list(moves), message_bytes, [row.clone() for row in outgoing]))
            for buffer in incoming:
                buffer.fill_(42)

    collectives = Recorder()
    collectives.world_size, collectives.rank = 2, 0
    engine = tiny_engine(Scaffold(), collectives=collectives)
    d = engine.layout.d
    engine.store.put([3, 8], {"c_i": torch.stack([torch.full((d,), 3.0), torch.full((d,), 8.0)])})
    engine.placement.owners.update({3: 0, 8: 0, 5: 1})
    engine.placement.move([3, 5, 6, 8], [[1, 2, 3], [0]], engine.objective.device)
    assert sent[0][:2] == ([(1, 0), (0, 1)], 8 * d)
    assert [row.unique().tolist() for row in sent[0][2]] == [[3.0]]
    assert set(engine.store.ids) == {5, 8}
    assert engine.store.get([5])["c_i"].unique().tolist() == [42.0]
    assert engine.placement.owners == {3: 1, 5: 0, 6: 0, 8: 0}
