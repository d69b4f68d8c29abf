"""What holds for every algorithm of the table: any ranks, any batching, closed-form bytes, and the engine's checks.

A new algorithm joins by itself with its defaults; it needs its closed forms in `CASES`.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import BLOCKS, CASES, COHORT, ROUNDS, RUNS, WORK, Case, Result, poison, run, run_everything, state
from support import CLIENTS, on_ranks, tiny_engine
from torch import Tensor

from fedkernels.algorithms import ALGORITHMS
from fedkernels.contract import Algorithm, Round, Task, Vectors
from fedkernels.federated import engine as engine_module
from fedkernels.federated.collectives import Collectives
from fedkernels.federated.engine import Engine, NonFiniteUpdateError
from fedkernels.federated.schedule import assign_blocks, place, sample_cohort

every_case = pytest.mark.parametrize("name", CASES)


def test_every_algorithm_is_here() -> None:
    assert {case.algorithm for case in CASES.values()} == set(ALGORITHMS)


Results = dict[str, dict[str, Result]]


@pytest.fixture(scope="module")
def alone() -> Results:
    return run_everything(Collectives())


def merged(states: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Server vectors, equal on all ranks to the last bit, and the client state that lies on exactly one of them."""
    out: dict[str, np.ndarray] = {}
    for found in states:
        for key, value in found.items():
            if key in out:
                assert not key.startswith("client"), f"{key} is on two ranks"
                assert np.array_equal(value, out[key]), f"{key} differs between ranks"
            out[key] = value
    return out


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_change_nothing(world_size: int, alone: Results) -> None:
    ranks = on_ranks(world_size, run_everything)
    for name in CASES:
        for kind in RUNS:
            found, expected = merged([rank[name][kind]["state"] for rank in ranks]), alone[name][kind]["state"]
            assert found.keys() == expected.keys(), name
            for key, value in expected.items():
                tolerance = 0 if kind == "float32" else 1e-12
                np.testing.assert_allclose(
                    found[key], value, rtol=tolerance, atol=tolerance, err_msg=f"{name} {kind} {key}"
                )
            same = ("round", "lr", "cohort", "dropped", "protocol_up_bytes", "protocol_down_bytes")
            expected_rows = alone[name][kind]["rows"]
            for rows in (rank[name][kind]["rows"] for rank in ranks):
                assert [[row[key] for key in same] for row in rows] == [
                    [row[key] for key in same] for row in expected_rows
                ]
                np.testing.assert_allclose(
                    [row["train_loss"] for row in rows],
                    [row["train_loss"] for row in expected_rows],
                    rtol=1e-6 if kind == "float32" else 1e-12,
                )
        for rank in ranks:
            rows = rank[name]["float64"]["rows"]
            assert [row["link_bytes"] for row in rows] == link_bytes(CASES[name], world_size, len(rows)), name


def link_bytes(case: Case, world_size: int, rounds: int) -> list[int]:
    """Client state that moves, one all-reduce of the bucket, and of blocks a reduction at an owner and a broadcast."""
    engine = case.engine(work=WORK)
    sliced = sum(wire.only_block for wire in engine.wires.values())
    float64_bytes = 8  # of parameters and of sums
    owners: dict[int, int] = {}
    expected = []
    for r in range(rounds):
        ids = case.cohort(r).tolist()
        placed = place(ids, engine.batches.steps(ids).tolist(), owners, [1.0] * world_size)
        now = {ids[p]: rank for rank, positions in enumerate(placed) for p in positions}
        moved = sum(owners.get(i, rank) != rank for i, rank in now.items()) if case.kept else 0
        owners |= now if case.kept else {}
        bucket = 7 + 2 * world_size + 1 + int(case.up if case.whole is None else case.whole) + case.diagnostic
        bucket += len(ids) if case.private else 0
        floats = moved * case.kept
        if case.whole is not None:
            bucket += BLOCKS
            blocks = assign_blocks(0, r, COHORT, BLOCKS)
            for b in range(BLOCKS):
                held = engine.layout.block(b)
                holders = sum(any(blocks[p] == b for p in positions) for positions in placed)
                floats += sliced * (held.stop - held.start) * (holders - 1 + world_size - 1)
        expected.append((floats + 2 * (world_size - 1) * bucket) * float64_bytes)
    return expected


def test_one_rank_moves_nothing(alone: Results) -> None:
    assert {row["link_bytes"] for case in alone.values() for kind in case.values() for row in kind["rows"]} == {0}


@every_case
@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float64, 8), (torch.float32, 4)])
def test_protocol_bytes(name: str, dtype: torch.dtype, itemsize: int) -> None:
    case = CASES[name]
    for row in run(case, dtype=dtype)["rows"]:
        up_bytes = case.up_bytes(itemsize) if case.up_bytes else case.up * itemsize
        assert row["protocol_up_bytes"] == round(row["cohort"] * up_bytes)
        assert row["protocol_down_bytes"] == row["cohort"] * case.down * itemsize
        assert row["cohort"] == len(case.cohort(row["round"] - 1))


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clients_per_batch_change_nothing(name: str, dtype: torch.dtype) -> None:
    options = {"dtype": dtype, "evaluator": "loop"}
    alone = run(CASES[name], clients_per_batch=1, **options)["state"]
    for together in (2, COHORT):
        found = run(CASES[name], clients_per_batch=together, **options)["state"]
        assert found.keys() == alone.keys()
        assert [key for key in alone if not np.array_equal(found[key], alone[key])] == [], together


@every_case
def test_batched_gradients_change_nothing(name: str) -> None:
    expected = run(CASES[name])["state"]
    found = run(CASES[name], evaluator="batched", clients_per_batch=4)["state"]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-12, atol=1e-12, err_msg=key)


def test_some_clients_of_a_batch_are_masked() -> None:
    """The suite above compares something: clients trained together differ in their numbers of steps."""
    engine = tiny_engine(CASES["fedavg"].build(), work=WORK)
    for r in range(ROUNDS):
        cohort = sample_cohort("uniform", 0, r, CLIENTS, COHORT)
        assert len(set(engine.batches.steps(cohort).tolist())) > 1


@every_case
def test_an_empty_cohort_changes_nothing(name: str) -> None:
    """But under privacy, where it is a round of noise alone."""
    case = CASES[name]
    engine = case.engine(work=WORK, rounds=8, sampling="poisson", cohort=1)
    sizes = [len(sample_cohort("poisson", case.cohort_seed, r, CLIENTS, 1)) for r in range(8)]
    assert 0 in sizes
    assert max(sizes) > 1
    for r, size in enumerate(sizes):
        before = state(engine)
        row = engine.run_round()
        assert (row["round"], row["cohort"], row["train_loss"] is None) == (r + 1, size, size == 0)
        after = state(engine)
        assert np.array_equal(before["x"], after["x"]) == (size == 0 and not case.private)
        if size == 0:
            assert row["protocol_up_bytes"] == row["protocol_down_bytes"] == 0
        if size == 0 and not case.private:
            assert all(np.array_equal(before[key], after[key]) for key in before)
        assert all(np.isfinite(value).all() for value in after.values())


Client = Callable[[Algorithm, Vectors, Vectors, Task], dict[str, Tensor]]


def with_client(case: Case, monkeypatch: pytest.MonkeyPatch, change: Callable[[Client], Client]) -> Engine:
    """An engine whose algorithm has its `client` changed."""
    algorithm = case.build()
    monkeypatch.setattr(type(algorithm), "client", change(type(algorithm).client))
    return tiny_engine(algorithm, **case.settings)


@every_case
def test_writing_to_a_server_vector_raises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for vector in CASES[name].build().down:

        def change(client: Client, vector: str = vector) -> Client:
            def writes(self: Algorithm, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
                s[vector][:1].mul_(2)
                return client(self, s, k, task)

            return writes

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=f"wrote to {vector} in place"):
            with_client(CASES[name], patch, change).run_round()


WRITES: dict[str, Callable[[Vectors, str, Tensor], Any]] = {
    "attribute": setattr,
    "item": lambda s, name, value: s.__setitem__(name, value),
    "update": lambda s, name, value: s.update(**{name: value}),
    "merge": lambda s, name, value: s.update({name: value}),
    "pop": lambda s, name, value: s.pop(name),
    "popitem": lambda s, name, value: s.popitem(),
    "del": lambda s, name, value: s.__delitem__(name),
    "clear": lambda s, name, value: s.clear(),
}


@every_case
def test_assigning_a_server_vector_raises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for write in WRITES.values():

        def change(client: Client, write: Callable[[Vectors, str, Tensor], Any] = write) -> Client:
            def writes(self: Algorithm, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
                vector = self.down[0]
                write(s, vector, s[vector] + 1)
                return client(self, s, k, task)

            return writes

        with monkeypatch.context() as patch, pytest.raises(AttributeError, match=r"the down wires: '\w+' is read-only"):
            with_client(CASES[name], patch, change).run_round()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_vectors_can_be_copied(copied: Callable[[Vectors], Vectors]) -> None:
    again = copied(Vectors({"x": torch.arange(3)}, what="it", read_only=True))
    assert again.x.tolist() == [0, 1, 2]
    with pytest.raises(AttributeError, match="it: 'x' is read-only"):
        again.x = torch.zeros(3)


@pytest.mark.parametrize("name", WRITES)
def test_vectors_are_written_to_unless_read_only(name: str) -> None:
    x, value = torch.zeros(2), torch.ones(2)
    vectors = Vectors({"x": x})
    WRITES[name](vectors, "x", value)
    assert vectors.get("x") is (value if name in ("attribute", "item", "update", "merge") else None)
    guarded = Vectors({"x": x}, what="this", read_only=True)
    with pytest.raises(AttributeError, match="this: 'x' is read-only"):
        WRITES[name](guarded, "x", value)
    assert list(guarded) == ["x"]
    assert guarded.x is guarded["x"] is x


def test_vectors_name_what_they_have() -> None:
    with pytest.raises(AttributeError, match="the server has no 'y'; it has x, c"):
        _ = Vectors({"x": torch.zeros(1), "c": torch.zeros(1)}, what="the server").y


@every_case
@pytest.mark.parametrize(
    "spoil",
    [
        lambda up: up | {"extra": next(iter(up.values()))},
        lambda up: dict(list(up.items())[1:]),
        lambda up: {wire: value[:, 1:] for wire, value in up.items()},
        lambda up: {wire: value[0] for wire, value in up.items()},
    ],
    ids=["undeclared", "missing", "short", "no client axis"],
)
def test_other_wires_than_declared_raise(name: str, spoil: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(client: Client) -> Client:
        return lambda self, s, k, task: spoil(client(self, s, k, task))

    with pytest.raises(RuntimeError, match="must return exactly its up wires"):
        with_client(CASES[name], monkeypatch, change).run_round()


@every_case
def test_undeclared_server_state_raises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = CASES[name].build()
    server = type(algorithm).server

    def changed(self: Algorithm, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        return server(self, s, agg, r) | {"surprise": s.x}

    monkeypatch.setattr(type(algorithm), "server", changed)
    with pytest.raises(RuntimeError, match=r"surprise.*init did not declare"):
        tiny_engine(algorithm, **CASES[name].settings).run_round()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.private])
@pytest.mark.parametrize("together", [1, COHORT])
def test_a_non_finite_update_names_client_and_round(name: str, together: int) -> None:
    engine = CASES[name].engine(clients_per_batch=together)
    client = int(CASES[name].cohort(1)[2])
    poison(engine, {1: {client}})
    engine.run_round()
    before = {key: value.clone() for key, value in engine.server.items()}
    with pytest.raises(NonFiniteUpdateError, match=f"^client {client} sent NaN or infinity in round 2$"):
        engine.run_round()
    assert all(torch.equal(before[key], value) for key, value in engine.server.items())


@every_case
@pytest.mark.parametrize("together", [1, COHORT])
def test_a_dropped_client_was_never_there(name: str, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Client 9 drops out in every round where it is drawn."""
    case, rounds = CASES[name], 4
    absent = {r: {9} for r in range(rounds)}
    dropped = run(case, stop=rounds, poisoned=absent, on_nonfinite="drop_client", clients_per_batch=together)
    drawn = [9 in case.cohort(r) for r in range(rounds)]
    assert [row["dropped"] for row in dropped["rows"]] == [int(there) for there in drawn]
    assert set(drawn) == {True, False}

    def without_9(sampling: Any, seed: int, r: int, population: int, cohort: int) -> np.ndarray:
        ids = sample_cohort(sampling, seed, r, population, cohort)
        return ids[ids != 9]

    def blocks_without_9(seed: int, r: int, cohort: int, n_blocks: int) -> np.ndarray:
        ids = sample_cohort("uniform", seed, r, CLIENTS, COHORT)
        return assign_blocks(seed, r, COHORT, n_blocks)[ids != 9]

    monkeypatch.setattr(engine_module, "sample_cohort", without_9)
    monkeypatch.setattr(engine_module, "assign_blocks", blocks_without_9)
    expected = run(case, stop=rounds)
    for key in dropped["state"].keys() - expected["state"].keys():
        assert key.startswith("client 9 ")
        assert not dropped["state"].pop(key).any()
    assert dropped["state"].keys() == expected["state"].keys()
    for key, value in expected["state"].items():
        assert np.array_equal(dropped["state"][key], value), key
    for one, other in zip(dropped["rows"], expected["rows"], strict=True):
        assert one["cohort"] == other["cohort"]
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-12)
