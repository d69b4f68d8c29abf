"""Rounds that close before all clients have reported: who counts, what becomes of the others, and that ranks agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES
from rank_checks import closing_on_ranks
from support import CLIENTS, on_ranks, tiny_engine
from torch import Tensor

from fedkernels.algorithms import FedAvg, FedBcgd, Scaffold
from fedkernels.config import ConfigError, load
from fedkernels.contract import Algorithm
from fedkernels.federated import closing
from fedkernels.federated.closing import DropSlowest
from fedkernels.federated.engine import UNHEARD, DeadlineError, Engine
from fedkernels.federated.intake import Upload

HALF_MORE = DropSlowest(over_sampling=0.5)


def waiting_for(
    clients: list[int], algorithm: Algorithm, blocks: list[int | None] | None = None, reduction: str = "fast"
) -> Engine:
    """An engine whose first cohort is given."""
    engine = tiny_engine(algorithm, cohort=len(clients), reduction=reduction)
    engine.draw_cohort = lambda: (clients, blocks or [None] * len(clients))  # type: ignore[method-assign]
    return engine


def by_work(engine: Engine) -> tuple[list[int], list[int | None]]:
    """The first cohort and its blocks, clients with least work first, of equals the later."""
    ids, blocks = engine.draw_cohort()
    steps = engine.batches.steps(ids)
    order = sorted(range(len(ids)), key=lambda p: (steps[p], -p))
    return [ids[p] for p in order], [blocks[p] for p in order]


@pytest.mark.parametrize(("cohort", "over", "sampled"), [(10, 0.3, 13), (7, 0.5, 11), (4, 0.0, 4), (3, 0.01, 4)])
def test_how_many_are_sampled(cohort: int, over: float, sampled: int) -> None:
    assert DropSlowest(over_sampling=over).sampled(cohort) == sampled


@pytest.mark.parametrize("overlap", ["always", "never"])
@pytest.mark.parametrize("together", [1, 2])
def test_those_with_least_work_count(overlap: str, together: int) -> None:
    engine = tiny_engine(FedAvg(), cohort=6, drop_slowest=HALF_MORE, clients_per_batch=together, overlap=overlap)
    ids, _ = by_work(engine)
    assert len(ids) == len(set(ids)) == 9
    row = engine.run_round()
    heard = waiting_for(ids[:6], FedAvg())
    expected = heard.run_round()
    torch.testing.assert_close(engine.server.x, heard.server.x, rtol=1e-12, atol=1e-14)
    assert sorted(engine.late) == sorted(ids[6:])
    assert (row["late"], row["cohort"], row["dropped"]) == (3, 6, 0)
    assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-12)
    d = engine.layout.d
    assert (row["protocol_up_bytes"], row["protocol_down_bytes"]) == (6 * d * 8, 9 * d * 8)


def test_blocks_of_late_clients_are_not_sent() -> None:
    engine = tiny_engine(FedBcgd(blocks=3), cohort=6, drop_slowest=HALF_MORE)
    ids, blocks = by_work(engine)
    row = engine.run_round()
    heard = waiting_for(ids[:6], FedBcgd(blocks=3), blocks[:6])
    assert row["protocol_up_bytes"] == heard.run_round()["protocol_up_bytes"]
    for name in engine.server:
        torch.testing.assert_close(engine.server[name], heard.server[name], rtol=1e-12, atol=1e-14)


def test_late_clients_keep_their_state() -> None:
    engine = tiny_engine(Scaffold(), cohort=6, drop_slowest=HALF_MORE, rounds=9)
    before: dict[int, Tensor] = {}
    ever_late = 0
    for _ in range(5):
        ids, _ = engine.draw_cohort()
        engine.run_round()
        assert set(engine.late) < set(ids)
        for client in ids:
            kept = engine.store.row(client).clone()
            unchanged = torch.equal(kept, before.get(client, torch.zeros_like(kept)))
            assert unchanged == (client in engine.late)
            ever_late += client in before and client in engine.late
            before[client] = kept
    assert ever_late


def after(monkeypatch: pytest.MonkeyPatch, looks: int) -> None:
    """A clock that stands still, and after so many looks is an hour ahead."""
    seen = [0]

    def monotonic() -> float:
        seen[0] += 1
        return 0.0 if seen[0] <= looks else 3600.0

    monkeypatch.setattr(closing.time, "monotonic", monotonic)


# The round begins with a look. A client of K steps looks before its first batch is drawn, before each step, and after.
@pytest.mark.parametrize("within", ["first step", "last step", "last look"])
def test_a_client_is_late_if_the_deadline_comes_before_it_is_done(monkeypatch: pytest.MonkeyPatch, within: str) -> None:
    engine = tiny_engine(FedAvg(), cohort=4, drop_slowest=DropSlowest(over_sampling=0, deadline_s=5.0), overlap="never")
    ids, _ = by_work(engine)
    steps = engine.batches.steps(ids).tolist()
    done = 1 + steps[0] + 2  # the first client's looks
    looks = {"first step": done + 1, "last step": done + 1 + steps[1], "last look": done + 2 + steps[1]}[within]
    after(monkeypatch, looks)
    row = engine.run_round()
    heard = ids[: 2 if within == "last look" else 1]
    assert sorted(engine.late) == sorted(set(ids) - set(heard))
    assert (row["late"], row["cohort"]) == (4 - len(heard), len(heard))
    begun = {"first step": 0, "last step": steps[1], "last look": steps[1]}[within]
    assert engine._worked == steps[0] + begun
    expected = waiting_for(heard, FedAvg())
    expected.run_round()
    torch.testing.assert_close(engine.server.x, expected.server.x, rtol=1e-12, atol=1e-14)


def test_a_round_that_nobody_reports_to_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(FedAvg(), cohort=4, drop_slowest=DropSlowest(over_sampling=0, deadline_s=5.0))
    x = engine.server.x.clone()
    after(monkeypatch, 1)
    row = engine.run_round()
    assert (row["cohort"], row["late"], row["train_loss"], row["protocol_up_bytes"]) == (0, 4, None, 0)
    assert torch.equal(engine.server.x, x)
    assert engine.round == 1


def test_rounds_that_nobody_ever_reports_to_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = DropSlowest(over_sampling=0, deadline_s=5.0)
    engine = tiny_engine(FedAvg(), cohort=4, rounds=50, drop_slowest=policy)
    for _ in range(UNHEARD - 1):
        after(monkeypatch, 1)
        engine.run_round()
    monkeypatch.undo()
    engine.run_round()  # somebody did
    for _ in range(UNHEARD - 1):
        after(monkeypatch, 1)
        engine.run_round()
    after(monkeypatch, 1)
    with pytest.raises(DeadlineError, match=f"deadline_s: 5 s, but in {UNHEARD} rounds nobody had reported"):
        engine.run_round()


def test_who_sends_nan_has_not_reported() -> None:
    """Of nine sampled clients for a cohort of six two send NaN, and the next two take their places."""
    engine = tiny_engine(FedAvg(), cohort=6, drop_slowest=HALF_MORE, on_nonfinite="drop_client", clients_per_batch=1)
    ids, _ = by_work(engine)
    train = engine._train

    def spoilt(positions: list[int], cohort: list[int], *rest: Any) -> Upload:
        upload = train(positions, cohort, *rest)
        if upload.ids[0] in ids[1:3]:
            upload.up["delta"].fill_(torch.nan)
        return upload

    engine._train = spoilt  # type: ignore[method-assign]
    row = engine.run_round()
    assert (row["cohort"], row["dropped"], row["late"]) == (6, 2, 1)
    assert engine.late == ids[8:]
    heard = waiting_for([ids[0], *ids[3:8]], FedAvg())
    heard.run_round()
    torch.testing.assert_close(engine.server.x, heard.server.x, rtol=1e-12, atol=1e-14)


def test_without_the_policy_nobody_is_late() -> None:
    engine = tiny_engine(FedAvg())
    assert "late" not in engine.run_round()
    assert engine.late == []


def test_a_rank_that_is_slow_leaves_its_clients_out() -> None:
    """On two ranks, of which the second sleeps past the deadline: both hear the first one's clients, and only those."""
    one, other = on_ranks(2, closing_on_ranks, 1, {"over_sampling": 0.0, "deadline_s": 1.0}, 1.5)
    assert one["late"] == other["late"] == sorted(one["placed"][1])
    heard = waiting_for(one["placed"][0], FedAvg())
    heard.run_round()
    for found in (one["x"], other["x"]):
        np.testing.assert_allclose(found, heard.server.x.numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("blocks", [0, 3])
def test_exact_sums_of_those_who_are_heard(blocks: int) -> None:
    """The same bits on two ranks, of which one is late with all its clients, as where one rank waits for the others."""
    policy = {"over_sampling": 0.0, "deadline_s": 1.0}
    one, other = on_ranks(2, closing_on_ranks, 1, policy, 1.5, blocks, "exact")
    assert one["late"] == other["late"] == sorted(one["placed"][1])
    clients = one["placed"][0]
    algorithm = FedBcgd(blocks=blocks) if blocks else FedAvg()
    heard = waiting_for(clients, algorithm, [one["blocks"][client] for client in clients], "exact")
    assert heard.run_round()["protocol_up_bytes"] == one["up_bytes"] == other["up_bytes"]
    for name, value in heard.server.items():
        for found in (one, other):
            np.testing.assert_array_equal(found["server"][name], value.numpy(), err_msg=name)


def test_ranks_count_reports_together() -> None:
    """Two ranks stop once they have six together; the other one may by then be training one more."""
    one, other = on_ranks(2, closing_on_ranks, 1, {"over_sampling": 0.5}, 0.0)
    assert one["late"] == other["late"]
    assert 6 <= one["cohort"] <= 7
    assert one["cohort"] + len(one["late"]) == 9
    heard = waiting_for(sorted({*one["placed"][0], *one["placed"][1]} - set(one["late"])), FedAvg())
    heard.run_round()
    np.testing.assert_allclose(one["x"], heard.server.x.numpy(), rtol=1e-12, atol=1e-14)


def test_the_ranks_of_a_group_stop_together() -> None:
    one, other = on_ranks(2, closing_on_ranks, 2, {"over_sampling": 0.5}, 0.0)
    assert one["late"] == other["late"]
    alone = tiny_engine(FedAvg(), cohort=6, drop_slowest=HALF_MORE)
    alone.run_round()
    assert one["late"] == sorted(alone.late)
    np.testing.assert_allclose(one["x"], alone.server.x.numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"drop_slowest.over_sampling": 1.5},
            "samples 15 clients for a cohort of 6, more than the number of clients, 8",
        ),
        ({"drop_slowest.over_sampling": -0.1}, "drop_slowest.over_sampling: -0.1, expected"),
        ({"drop_slowest.deadline_s": 0}, "drop_slowest.deadline_s: 0, expected"),
        ({"drop_slowest.over_sampling": 0.1, "sampling": "poisson"}, "drop_slowest: a Poisson cohort has no size"),
    ],
)
def test_what_cannot_be_is_refused(overrides: dict[str, Any], message: str) -> None:
    common = {"algorithm": "fedavg", "model": "mlp", "data": "digits", "partition": "iid", "run_dir": "unused"}
    sizes = {"clients": 8, "cohort": 6, "rounds": 1, "batch_size": 8, "lr": 0.1, "local_steps": 1}
    with pytest.raises(ConfigError) as error:
        load(None, common | sizes | overrides)
    assert message in str(error.value)


def test_an_engine_samples_no_more_clients_than_there_are() -> None:
    with pytest.raises(ValueError, match=f"drop_slowest: 15 clients to sample for a cohort of 10, of {CLIENTS}"):
        tiny_engine(FedAvg(), cohort=10, drop_slowest=HALF_MORE)


def test_privacy_is_refused() -> None:
    with pytest.raises(ValueError, match="drop_slowest: who is heard would depend on data"):
        CASES["dp_fedavg"].engine(drop_slowest=HALF_MORE)
