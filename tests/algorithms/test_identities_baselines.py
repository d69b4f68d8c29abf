"""Identities of the baselines: between each other, with torch's own optimizers, and with optima in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from algorithms.test_identities import ALONE, SAMPLES, LinearLoss, assert_same, centralised, trained
from support import CLASSES, CLIENTS, run_rounds, tiny_engine
from torch import Tensor, nn

from fedkernels.algorithms import (
    FedAcg,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedCm,
    FedDyn,
    FedLada,
    FedProx,
    FedYogi,
)
from fedkernels.contract import Algorithm, Round, Vectors
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.engine import Engine
from fedkernels.federated.objective import Objective
from fedkernels.optim import Sgd

DECAYED = Sgd(momentum=0.5, weight_decay=0.1)
PAIRS: dict[str, tuple[Algorithm, Algorithm, dict[str, Any]]] = {
    "fedprox is fedavg with a pull": (FedProx(), FedAvg(prox_mu=0.01), {}),
    "fedprox without a pull is fedavg": (FedProx(prox_mu=0.0), FedAvg(), {}),
    "fedavgm is fedavg with momentum": (FedAvgM(), FedAvg(server_momentum=0.9), {}),
    "fedavgm without momentum is fedavg": (FedAvgM(server_momentum=0.0), FedAvg(), {}),
    "fedcm of own gradients is fedavg": (FedCm(alpha=1.0, server_lr=0.5), FedAvg(server_lr=0.5), {}),
    "fedcm of own directions, weighted": (
        FedCm(alpha=1.0, local=DECAYED), FedAvg(local=DECAYED), {"weighting": "samples", "lr": 0.1}
    ),
    "fedacg without look-ahead and pull is fedavg": (FedAcg(momentum=0.0, prox_beta=0.0), FedAvg(), {}),
    "fedacg without look-ahead is fedprox": (FedAcg(momentum=0.0, prox_beta=0.7), FedProx(prox_mu=0.7), {}),
    "fedadagrad that does not adapt is fedavg": (FedAdagrad(tau=1e8, server_lr=2e8), FedAvg(), {}),
    # v̂ stays at ε² and both directions scale by 1/ε, which the learning rate takes back.
    "fedlada that does not adapt is fedcm": (
        FedLada(alpha=0.3, beta1=0.0, eps=128.0), FedCm(alpha=0.3), {"lr": (128 * 0.3, 0.3)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_two_algorithms_coincide(name: str) -> None:
    left, right, options = PAIRS[name]
    rates = options.get("lr", 0.5)
    left_lr, right_lr = rates if isinstance(rates, tuple) else (rates, rates)
    assert_same(trained(left, **options | {"lr": left_lr}), trained(right, **options | {"lr": right_lr}))


@pytest.mark.parametrize("alpha", [0.1, 0.6])
def test_fedcm_and_fedacg_start_without_momentum(alpha: float) -> None:
    assert_same(trained(FedCm(alpha=alpha), 1, lr=0.5), trained(FedAvg(), 1, lr=0.5 * alpha))
    assert_same(trained(FedAcg(), 1, lr=0.5), trained(FedProx(), 1, lr=0.5))


def test_yogi_adds_like_adagrad_while_squares_exceed_v_and_then_takes_off() -> None:
    def trajectory(algorithm: Algorithm) -> list[dict[str, Tensor]]:
        engine = tiny_engine(algorithm, lr=0.5, schedule="constant")
        return [run_rounds(engine, 1)[0] for _ in range(2)]

    yogi = trajectory(FedYogi(beta1=0.0, beta2=0.0, tau=1e-12))
    adagrad = trajectory(FedAdagrad(tau=1e-12))
    torch.testing.assert_close(yogi[0], adagrad[0], rtol=1e-12, atol=1e-12)
    before, after = yogi[0]["v"], yogi[1]["v"]
    assert (after < before).any()
    assert (after > before).any()


# The rounds of these are the steps of a centralised optimizer: everyone takes one step of size 1, so that −Δ̄ is the
# gradient of all samples.
ONE_STEP: dict[str, Any] = {
    "cohort": CLIENTS,
    "schedule": "constant",
    "clip_norm": float("inf"),
    "weighting": "samples",
    "work": LocalWork(SAMPLES, local_steps=1),
}


def running_adam(
    parameters: Iterable[nn.Parameter], *, floor: float, amsgrad: bool = False, **options: Any
) -> torch.optim.Adam:
    """Torch's Adam as if it had run for ever, so that it corrects no bias, with `v = floor²`."""
    optimizer = torch.optim.Adam(parameters, amsgrad=amsgrad, **options)
    for p in optimizer.param_groups[0]["params"]:
        state = {"step": torch.tensor(1e6), "exp_avg": torch.zeros_like(p)}
        names = ("exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg_sq",)
        optimizer.state[p] = state | {name: torch.full_like(p, floor**2) for name in names}
    return optimizer


SERVERS: dict[str, tuple[Algorithm, Callable[[Any], torch.optim.Optimizer]]] = {
    "fedavgm": (FedAvgM(), partial(torch.optim.SGD, lr=1.0, momentum=0.9)),
    "fedadagrad": (
        FedAdagrad(server_lr=0.05, tau=0.1),
        partial(torch.optim.Adagrad, lr=0.05, initial_accumulator_value=0.1**2, eps=0.1),
    ),
    "fedadam": (
        FedAdam(server_lr=0.05, tau=0.1, beta2=0.8),
        partial(running_adam, floor=0.1, lr=0.05, betas=(0.9, 0.8), eps=0.1),
    ),
}


@pytest.mark.parametrize("name", SERVERS)
def test_the_servers_optimizer_is_torchs(name: str) -> None:
    algorithm, optimizer = SERVERS[name]
    assert_same(trained(algorithm, 5, lr=1.0, **ONE_STEP), centralised(optimizer, 1, 5))


def test_the_look_ahead_point_of_fedacg_is_the_iterate_of_nesterov() -> None:
    engine = tiny_engine(FedAcg(momentum=0.7), lr=0.3, **ONE_STEP)
    run_rounds(engine, 5)
    expected = centralised(partial(torch.optim.SGD, lr=0.3, momentum=0.7, nesterov=True), 1, 5)
    assert_same(engine.layout.views(engine.server.z), expected)


def test_fedlada_of_one_client_in_one_round_is_amsgrad() -> None:
    algorithm = FedLada(alpha=1.0, beta1=0.8, beta2=0.9, eps=1e-3)
    found = trained(algorithm, 1, lr=0.02, work=LocalWork(40, local_steps=9), **ALONE)
    optimizer = partial(running_adam, floor=1e-3, amsgrad=True, lr=0.02, betas=(0.8, 0.9), eps=0.0)
    assert_same(found, centralised(optimizer, 9, 1, batch=40), 1e-10)


def test_the_second_moment_of_fedlada_never_falls_below_its_start() -> None:
    """However the mean over clients rounds: the next round divides by its root."""
    engine = tiny_engine(FedLada(eps=1e-3))
    floor = engine.server.v_bar.clone()
    assert (floor > 0).all()
    agg = Vectors({"delta": torch.zeros_like(floor), "v_hat": floor * (torch.arange(len(floor)) % 3)})
    r = Round(index=0, cohort=6, population=CLIENTS, steps=5, lr=0.05)
    found = engine.algorithm.server(engine.server, agg, r)["v_bar"]
    assert torch.equal(found, torch.maximum(agg.v_hat, floor))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES)).double()


@pytest.mark.parametrize("alpha", [0.3, 0.9])
@pytest.mark.parametrize("method", [FedCm, FedLada])
def test_recursion_of_the_update(method: Callable[..., Algorithm], alpha: float) -> None:
    """`Δ̄_r = αL_r + (1−α)(η_r/η_{r−1})Δ̄_{r−1}`, with L_r the update of the run with α = 1, where gradients are those
    of any parameters."""

    def updates(algorithm: Algorithm) -> tuple[list[Tensor], list[float]]:
        work = LocalWork(8, local_steps=3)
        engine = tiny_engine(algorithm, module=linear(), objective=LinearLoss, work=work, clip_norm=float("inf"))
        deltas, rates = [], []
        for _ in range(4):
            x = engine.server.x.clone()
            rates.append(engine.run_round()["lr"])
            deltas.append(engine.server.x - x)
        return deltas, rates

    local, rates = updates(method(alpha=1.0))
    whole, _ = updates(method(alpha=alpha))
    previous, previous_rate = torch.zeros_like(whole[0]), rates[0]
    for delta, own, rate in zip(whole, local, rates, strict=True):
        expected = alpha * own + (1 - alpha) * rate / previous_rate * previous
        torch.testing.assert_close(delta, expected, rtol=1e-10, atol=1e-12)
        previous, previous_rate = delta, rate


@pytest.mark.parametrize("cohort", [5, CLIENTS])
def test_the_servers_h_is_the_mean_of_the_clients(cohort: int) -> None:
    """Of all clients, those never asked included."""
    engine = tiny_engine(FedDyn(alpha=0.4), cohort=cohort, lr=0.5)
    for _ in range(3):
        engine.run_round()
        mean = engine.store.get(range(CLIENTS))["h_i"].mean(0)
        assert mean.abs().max() > 1e-3
        torch.testing.assert_close(engine.server.h, mean, rtol=1e-12, atol=1e-12)


class Squares(Objective):
    """Least squares on one-hot targets: every client's loss is a convex quadratic of a linear model."""

    def loss(
        self,
        forward: Callable[[Tensor], Tensor],
        inputs: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        count: Tensor | float | None = None,
    ) -> Tensor:
        one_hot = (targets[:, None] == torch.arange(CLASSES)).double()
        residuals = (forward(inputs) - one_hot).square().sum(-1) / 2
        weights = torch.ones_like(residuals) if weights is None else weights
        return (residuals * weights).sum() / (weights.sum() if count is None else count)


RIDGE, ROUNDS = 0.1, 250


def normal_equations(engine: Engine, client: int) -> tuple[Tensor, Tensor]:
    """Of a client's loss and RIDGE/2 ‖W‖²: its gradient at `W [17, classes]` is `A W − B`, the last row the bias."""
    inputs, targets = engine.objective.train_batch(torch.from_numpy(engine.batches.partition[client])[None], None)
    features = torch.cat([inputs[0].flatten(1), torch.ones(len(targets[0]), 1).double()], dim=1)
    a = features.T @ features / len(features) + RIDGE * torch.eye(17).double()
    return a, features.T @ F.one_hot(targets[0], CLASSES).double() / len(features)


def as_matrix(engine: Engine, vector: Tensor) -> Tensor:
    named = engine.layout.views(vector)
    return torch.cat([named["1.weight"].T, named["1.bias"][None]])


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
def test_feddyn_reaches_the_optimum_of_all_clients_and_fedavg_does_not(weighting: str) -> None:
    def settled(algorithm: Algorithm) -> Engine:
        engine = tiny_engine(
            algorithm, module=linear(), objective=Squares, work=LocalWork(SAMPLES, local_steps=5), lr=0.1,
            cohort=CLIENTS, schedule="constant", clip_norm=float("inf"), weighting=weighting, rounds=ROUNDS,
            evaluator="batched", clients_per_batch=CLIENTS,
        )  # fmt: skip
        run_rounds(engine, ROUNDS)
        return engine

    local = Sgd(weight_decay=RIDGE)
    engine = settled(FedDyn(local=local, alpha=1.0))
    equations = [normal_equations(engine, i) for i in range(CLIENTS)]
    shares = torch.from_numpy(engine.sizes).double() if weighting == "samples" else torch.ones(CLIENTS).double()
    shares /= shares.sum()
    a = sum(share * a for share, (a, _) in zip(shares, equations, strict=True))
    b = sum(share * b for share, (_, b) in zip(shares, equations, strict=True))
    optimum = torch.linalg.solve(a, b)
    x = as_matrix(engine, engine.server.x)
    torch.testing.assert_close(x, optimum, rtol=0, atol=1e-9)
    assert engine.server.h.abs().max() < 1e-9
    for i, (a_i, b_i) in enumerate(equations):
        h_i = as_matrix(engine, engine.store.get([i])["h_i"][0])
        torch.testing.assert_close(h_i, a_i @ optimum - b_i, rtol=0, atol=1e-9)
        assert h_i.abs().max() > 1e-3

    drifted = settled(FedAvg(local=local))
    assert (as_matrix(drifted, drifted.server.x) - optimum).abs().max() > 1e-3
