"""Identities of block coordinate updates: what one block, full batches and everyone's participation make of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import CLASSES, CLIENTS, run_rounds, tiny_engine, tiny_model
from torch import Tensor, nn

from fedkernels.algorithms import FedAvg, FedBcgd, FedBcgdPlus, Scaffold
from fedkernels.contract import Algorithm, Task, Vectors
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.schedule import assign_blocks, sample_cohort

PLAIN: dict[str, Any] = {"blocks": 1, "momentum": 0.0}
ONE_FULL_BATCH = LocalWork(150, local_steps=1)
SOME_FULL_BATCHES = LocalWork(150, local_steps=4)


def states(algorithm: Algorithm, rounds: int = 3, **options: Any) -> dict[str, Tensor]:
    """Server vectors by parameter name, and what clients keep."""
    engine = tiny_engine(algorithm, **options)
    run_rounds(engine, rounds)
    kept = {f"{n} of {i}": v[0] for i in engine.store.ids for n, v in engine.store.get([i]).items()}
    return {
        f"{n} {name}": view.clone()
        for n, v in ({**engine.server} | kept).items()
        for name, view in engine.layout.views(v).items()
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


PAIRS: dict[str, tuple[Algorithm, Algorithm, dict[str, Any]]] = {
    "fedbcgd_plus of one block without momentum is scaffold": (FedBcgdPlus(**PLAIN), Scaffold(), {"lr": 0.5}),
    "fedbcgd_plus of one block without momentum is scaffold, nothing shared": (
        FedBcgdPlus(**PLAIN, shared=()), Scaffold(), {"lr": 0.5}
    ),
    "fedbcgd_plus of one block without momentum is scaffold, weighted": (
        FedBcgdPlus(**PLAIN), Scaffold(), {"lr": 0.5, "weighting": "samples", "cohort": 5}
    ),
    "fedbcgd_plus of one named block is scaffold": (
        FedBcgdPlus(blocks=(("*",),), momentum=0.0, shared=()), Scaffold(), {"lr": 0.5}
    ),
    "blocks named are blocks counted": (
        FedBcgdPlus(blocks=3, cut_rows=False),
        FedBcgdPlus(blocks=(("1.weight",), ("1.bias", "3.*", "4.weight"), ("4.bias", "6.*"))),
        {"lr": 0.5},
    ),
    "snapshot gradients of full batches are gradients": (
        FedBcgdPlus(blocks=3, svrg=True), FedBcgdPlus(blocks=3), {"lr": 0.5, "work": SOME_FULL_BATCHES}
    ),
    "a snapshot gradient at the snapshot is the full gradient": (
        FedBcgdPlus(**PLAIN, svrg=True), FedBcgdPlus(**PLAIN), {"lr": 0.5, "work": ONE_FULL_BATCH, "clip_norm": 0.2}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_two_algorithms_coincide(name: str) -> None:
    left, right, options = PAIRS[name]
    assert_same(states(left, **options), states(right, **options))


def test_snapshot_gradients_of_small_batches_are_others() -> None:
    assert_different(states(FedBcgdPlus(svrg=True), 1, lr=0.5), states(FedBcgdPlus(), 1, lr=0.5))


def assert_different(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert max(float((one[name] - other[name]).abs().max()) for name in one) > 1e-4


@pytest.mark.parametrize("control", ["exact", "ema"])
@pytest.mark.parametrize("blocks", [1, 3])
def test_the_first_round_is_fedbcgds_and_the_second_is_not(control: Any, blocks: int) -> None:
    """Control variates start at zero."""
    algorithm, baseline = FedBcgdPlus(blocks=blocks, control=control), FedBcgd(blocks=blocks)
    assert_same(states(algorithm, 1, lr=0.5), states(baseline, 1, lr=0.5))
    found, other = states(algorithm, 2, lr=0.5), states(baseline, 2, lr=0.5)
    assert_different({name: found[name] for name in other}, other)


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
@pytest.mark.parametrize("cohort", [2, 5, CLIENTS])
@pytest.mark.parametrize("blocks", [3, 20])
def test_the_servers_control_variate_is_the_mean_of_the_clients(blocks: int, cohort: int, weighting: str) -> None:
    """On every coordinate and of all clients alike, whatever is sent and however it is weighted."""
    engine = tiny_engine(FedBcgdPlus(blocks=blocks), cohort=cohort, weighting=weighting, lr=0.5)
    for _ in range(4):
        engine.run_round()
        mean = engine.store.get(range(CLIENTS))["c_i"].mean(0)
        assert mean.abs().max() > 1e-3
        torch.testing.assert_close(engine.server.c, mean, rtol=1e-12, atol=1e-13)


def test_a_client_keeps_of_its_control_variate_what_it_sent() -> None:
    engine = tiny_engine(FedBcgdPlus(blocks=4), lr=0.5)
    engine.run_round()
    ids = sample_cohort("uniform", 0, 0, CLIENTS, 6).tolist()
    for client, block in zip(ids, assign_blocks(0, 0, 6, 4).tolist(), strict=True):
        c_i = engine.store.get([client])["c_i"][0]
        assert [bool(c_i[engine.layout.block(b)].any()) for b in range(5)] == [b in (block, 4) for b in range(5)]


@pytest.mark.parametrize("rho_c", [0.1, 1.0])
@pytest.mark.parametrize("weighting", ["uniform", "samples"])
def test_the_first_average_is_taken_whole(weighting: str, rho_c: float) -> None:
    """Round 1 of `ema`: `c_b` is the mean of c_i⁺ over the clients of b, which have kept all of it."""
    engine = tiny_engine(FedBcgdPlus(blocks=3, control="ema", rho_c=rho_c), cohort=7, weighting=weighting, lr=0.5)
    engine.run_round()
    ids = sample_cohort("uniform", 0, 0, CLIENTS, 7)
    drawn = assign_blocks(0, 0, 7, 3)
    c_i = engine.store.get(ids.tolist())["c_i"]
    weights = torch.from_numpy(engine.sizes[ids]).double() if weighting == "samples" else torch.ones(7).double()
    for b in range(4):
        senders = torch.from_numpy((drawn == b) | (b == 3))
        part = engine.layout.block(b)
        expected = (weights[senders, None] * c_i[senders][:, part]).sum(0) / weights[senders].sum()
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(engine.server.c[part], expected, rtol=1e-12, atol=1e-13)


def test_averages_of_a_block_start_when_it_is_first_sent() -> None:
    """Of four blocks two are sent a round: the others wait at zero, then start whole; those sent before move by ρ."""
    engine = tiny_engine(FedBcgdPlus(blocks=4, control="ema"), cohort=2, lr=0.5)
    heard = {4: False} | dict.fromkeys(range(4), False)
    starts = 0
    for r in range(4):
        before = engine.server.c.clone()
        engine.run_round()
        ids = sample_cohort("uniform", 0, r, CLIENTS, 2).tolist()
        drawn = assign_blocks(0, r, 2, 4).tolist()
        c_i = engine.store.get(ids)["c_i"]
        for b in range(5):
            part = engine.layout.block(b)
            senders = [p for p in range(2) if b in (drawn[p], 4)]
            rho = (0.1 if heard[b] else 1.0) if senders else 0.0
            mean = c_i[senders][:, part].mean(0) if senders else before[part]
            starts += bool(senders) and not heard[b] and r > 0
            heard[b] |= bool(senders)
            expected = before[part] + rho * (mean - before[part])
            torch.testing.assert_close(engine.server.c[part], expected, rtol=1e-12, atol=1e-13)
    assert starts > 0


def test_averages_of_full_weight_are_the_last_cohorts() -> None:
    engine = tiny_engine(FedBcgdPlus(blocks=1, control="ema", rho_c=1.0), cohort=5, lr=0.5)
    for r in range(3):
        engine.run_round()
        c_i = engine.store.get(sample_cohort("uniform", 0, r, CLIENTS, 5).tolist())["c_i"]
        torch.testing.assert_close(engine.server.c, c_i.mean(0), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("evaluator", ["loop", "batched"])
@pytest.mark.parametrize("together", [1, 2, CLIENTS])
@pytest.mark.parametrize("clip_norm", [0.3, float("inf")])
def test_the_full_gradient_is_that_of_all_samples(clip_norm: float, together: int, evaluator: str) -> None:
    """Against autograd over each client's samples at once, at a point of its own; batches of 8 divide few of them."""
    engine = tiny_engine(FedAvg(), cohort=CLIENTS, clients_per_batch=together, evaluator=evaluator, clip_norm=clip_norm)
    assert len(set(-(-engine.sizes // 8))) > 2
    found: list[Tensor] = []
    points: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)

    class Spy(FedAvg):
        def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
            y = s.x + 0.3 * torch.randn(len(task.steps), len(s.x), generator=generator, dtype=torch.float64)
            points.extend(y)
            gradients = task.full_grad(y)
            assert torch.equal(task.full_grad(y), gradients)
            task.grad(y, next(iter(task.batches())))
            found.extend(gradients)
            return {"delta": torch.zeros_like(y)}

    engine.algorithm = Spy()
    placed = trained_order(engine)
    engine.run_round()
    norms = []
    model = tiny_model()
    for client, y, g in zip(placed, points, found, strict=True):
        leaves = {name: view.clone().requires_grad_() for name, view in engine.layout.views(y).items()}
        own = torch.from_numpy(engine.batches.partition[client])
        inputs, targets = engine.objective.train_batch(own[None], None)
        loss = F.cross_entropy(torch.func.functional_call(model, leaves, (inputs[0],)), targets[0])
        grads = torch.autograd.grad(loss, leaves.values())
        expected = engine.layout.flatten(dict(zip(leaves, grads, strict=True)))
        norms.append(float(expected.norm()))
        expected *= min(1.0, clip_norm / norms[-1])
        torch.testing.assert_close(g, expected, rtol=1e-11, atol=1e-13)
    assert max(norms) > 0.3


def trained_order(engine: Any) -> list[int]:
    """Clients in the order in which they are trained."""
    order: list[int] = []
    train = engine._train

    def watched(positions: list[int], cohort: list[int], *rest: Any) -> Any:
        order.extend(cohort[p] for p in positions)
        return train(positions, cohort, *rest)

    engine._train = watched
    return order


def test_a_sweep_has_every_sample_once_in_order() -> None:
    engine = tiny_engine(FedAvg())
    clients = [3, 0, 7]
    seen: list[list[Tensor]] = [[] for _ in clients]
    for batch in engine.batches.sweep(clients):
        for c in range(3):
            if batch.active is None or batch.active[c]:
                keep = slice(None) if batch.weights is None else batch.weights[c] > 0
                seen[c].append(batch.inputs[c][keep])
    for client, inputs in zip(clients, seen, strict=True):
        own = torch.from_numpy(engine.batches.partition[client])
        assert torch.equal(torch.cat(inputs), engine.objective.train_batch(own[None], None)[0][0])


def test_what_is_sent() -> None:
    """The block of each client and the shared one; everything where wires go whole."""
    masks: list[Tensor] = []

    class Spy(FedBcgd):
        def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
            masks.extend(task.sent)
            return super().client(s, k, task)

    engine = tiny_engine(Spy(blocks=20), cohort=7, clients_per_batch=3)
    order = trained_order(engine)
    engine.run_round()
    assigned = dict(zip(sample_cohort("uniform", 0, 0, CLIENTS, 7).tolist(), assign_blocks(0, 0, 7, 20), strict=True))
    for client, mask in zip(order, masks, strict=True):
        expected = torch.zeros(engine.layout.d, dtype=torch.bool)
        expected[engine.layout.block(assigned[client])] = True
        expected[engine.layout.block(20)] = True
        assert torch.equal(mask, expected)

    class Whole(FedAvg):
        def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
            assert task.sent.shape == (len(task.steps), len(s.x))
            assert task.sent.all()
            return super().client(s, k, task)

    tiny_engine(Whole(), clients_per_batch=3).run_round()


def test_more_blocks_than_rows_are_refused_before_the_first_round() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES)).double()
    with pytest.raises(ValueError, match="9 blocks asked for, but the model has 8 rows of tensors to spread over them"):
        tiny_engine(FedBcgdPlus(blocks=9), module=module)


def test_momentum_carries_an_empty_block_on() -> None:
    """`v_b ← γv_b` where nobody sent b, and c_b as it was."""
    engine = tiny_engine(FedBcgdPlus(blocks=4), cohort=2, lr=0.5)
    for r in range(4):
        x, v, c = (engine.server[name].clone() for name in "xvc")
        engine.run_round()
        drawn = assign_blocks(0, r, 2, 4)
        for b in np.setdiff1d(np.arange(4), drawn):
            part = engine.layout.block(int(b))
            torch.testing.assert_close(engine.server.v[part], 0.45 * v[part], rtol=1e-14, atol=0)
            torch.testing.assert_close(engine.server.x[part], x[part] + 0.45 * v[part], rtol=1e-14, atol=1e-15)
            assert torch.equal(engine.server.c[part], c[part])
