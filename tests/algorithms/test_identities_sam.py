"""Identities of the sharpness-aware family: what is left without a perturbation, and with torch's own Nesterov."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import CLIENTS, run_rounds, tiny_engine, tiny_model
from torch import Tensor

from fedkernels.algorithms import FedAvg, FedGamma, FedLesam, FedNsam, FedSam, FedSmoo, MoFedSam, Scaffold
from fedkernels.contract import Algorithm
from fedkernels.data.partition import Partition
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.engine import Engine
from fedkernels.optim import Sgd

SAMPLES = 150
DECAY = 0.1
DECAYED = Sgd(weight_decay=DECAY)


def trained(algorithm: Algorithm, rounds: int = 3, **options: Any) -> dict[str, Tensor]:
    """The server's state after some rounds."""
    return run_rounds(tiny_engine(algorithm, **({"lr": 0.3} | options)), rounds)[0]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal in every server vector that both have, x among them."""
    for name in found.keys() & expected.keys() | {"x"}:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


def gap(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return float((left["x"] - right["x"]).abs().max())


PAIRS: dict[str, tuple[Algorithm, Algorithm, dict[str, Any]]] = {
    "local fednsam without momentum is fedsam": (
        FedNsam(perturbation="local", gamma=0.0, rho=0.3, weight_decay=DECAY), FedSam(local=DECAYED, rho=0.3), {}
    ),
    "fednsam without perturbation and decay has one form": (
        FedNsam(rho=0.0, weight_decay=0.0), FedNsam(perturbation="local", rho=0.0, weight_decay=0.0), {}
    ),
    "fednsam without perturbation and momentum is fedavg": (
        FedNsam(gamma=0.0, rho=0.0, weight_decay=DECAY), FedAvg(local=DECAYED), {}
    ),
    "fedsam without perturbation is fedavg": (FedSam(rho=0.0, server_lr=0.5), FedAvg(server_lr=0.5), {}),
    "fedsam without perturbation, clipped": (FedSam(rho=0.0), FedAvg(), {"clip_norm": 0.1, "lr": 2.0}),
    "mofedsam of own gradients is fedsam": (MoFedSam(beta=1.0), FedSam(), {}),
    "fedgamma without perturbation is scaffold": (FedGamma(rho=0.0), Scaffold(), {"weighting": "samples"}),
    "fedlesam without perturbation is fedavg": (FedLesam(rho=0.0), FedAvg(), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_two_algorithms_coincide(name: str) -> None:
    left, right, options = PAIRS[name]
    assert_same(trained(left, **options), trained(right, **options))


@pytest.mark.parametrize(
    ("algorithm", "baseline"),
    [
        (FedLesam(), FedAvg()),
        (FedGamma(), FedSam()),
        (FedNsam(weight_decay=0.0), FedAvg()),
        (FedNsam(perturbation="local", rho=0.1, weight_decay=0.0), FedSam()),
    ],
    ids=["fedlesam", "fedgamma", "fednsam", "fednsam-local"],
)
def test_the_first_round_is_the_baselines_and_the_second_is_not(algorithm: Algorithm, baseline: Algorithm) -> None:
    # Everyone takes part: in round 2 every client of FedLESAM has been seen.
    assert gap(trained(algorithm, 1, cohort=CLIENTS), trained(baseline, 1, cohort=CLIENTS)) < 1e-12
    assert gap(trained(algorithm, 2, cohort=CLIENTS), trained(baseline, 2, cohort=CLIENTS)) > 1e-4


def nesterov(gamma: float, lr: float, steps: int) -> Tensor:
    """Torch's Nesterov momentum on all samples; what it calls the parameters is the look-ahead point."""
    engine = tiny_engine(FedAvg())
    inputs, targets = engine.objective.train_batch(torch.arange(SAMPLES)[None], None)
    model = tiny_model()
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=gamma, nesterov=True, weight_decay=DECAY)
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(model(inputs[0]), targets[0]).backward()
        opt.step()
    return engine.layout.flatten(dict(model.named_parameters()))


EVERYTHING: dict[str, Any] = {
    "cohort": CLIENTS, "weighting": "samples", "schedule": "constant", "clip_norm": float("inf"),
    "work": LocalWork(SAMPLES, local_steps=1),
}  # fmt: skip


def test_local_fednsam_of_everyone_and_one_step_is_nesterov() -> None:
    algorithm = FedNsam(perturbation="local", gamma=0.7, rho=0.0, weight_decay=DECAY)
    found = trained(algorithm, 5, **EVERYTHING)["z"]
    torch.testing.assert_close(found, nesterov(0.7, 0.3, 5), rtol=1e-10, atol=1e-12)


def closed_form(algorithm: FedNsam, lr: float, steps: int, rounds: int) -> tuple[Tensor, Tensor]:
    """x and m of one client that has all samples: the recursion of the paper on whole vectors."""
    engine = tiny_engine(FedAvg())
    inputs, targets = engine.objective.train_batch(torch.arange(SAMPLES)[None], None)
    model = tiny_model()

    def gradient(at: Tensor) -> Tensor:
        views = {name: v.requires_grad_() for name, v in engine.layout.views(at.clone()).items()}
        loss = F.cross_entropy(torch.func.functional_call(model, views, (inputs[0],)), targets[0])
        grads = torch.autograd.grad(loss, list(views.values()))
        return engine.layout.flatten(dict(zip(views, grads, strict=True)))

    x = engine.server.x.clone()
    m = torch.zeros_like(x)
    for _ in range(rounds):
        # Back along m from where it points to is uphill.
        e = algorithm.gamma * m - algorithm.rho * m / (m.norm() + 1e-7)
        y = x
        for _ in range(steps):
            y = y - lr * (gradient(y + e) + algorithm.weight_decay * y)
        m = algorithm.gamma * m + (y - x)
        x = x + m
    return x, m


@pytest.mark.parametrize("rho", [0.0, 0.4])
def test_global_fednsam_of_one_client_is_the_recursion(rho: float) -> None:
    algorithm = FedNsam(gamma=0.7, rho=rho, weight_decay=DECAY)
    alone = {"partition": Partition(np.arange(SAMPLES), np.array([0, SAMPLES])), "cohort": 1}
    found = trained(algorithm, 4, **(EVERYTHING | alone | {"work": LocalWork(SAMPLES, local_steps=3)}))
    x, m = closed_form(algorithm, 0.3, 3, 4)
    torch.testing.assert_close(found["x"], x, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found["m"], m, rtol=1e-10, atol=1e-12)


def test_global_perturbation_is_uphill_of_the_lookahead() -> None:
    """Where m descends the loss, x + e lies above x + γm."""
    engine = tiny_engine(FedNsam(rho=0.1), **EVERYTHING)
    run_rounds(engine, 2)
    inputs, targets = engine.objective.train_batch(torch.arange(SAMPLES)[None], None)

    def loss(at: Tensor) -> float:
        logits = torch.func.functional_call(tiny_model(), engine.layout.views(at), (inputs[0],))
        return float(F.cross_entropy(logits, targets[0]))

    x, m = engine.server.x, engine.server.m
    ahead = x + 0.85 * m
    assert loss(ahead - 0.1 * m / m.norm()) > loss(ahead)


def feddyn(engine: Engine, beta: float, rounds: int) -> tuple[Tensor, Tensor]:
    """x and h of FedDyn: `x ← mean w_i + h`, with h the mean over all clients of their `h_i ← h_i + w_i − x`."""
    module, layout = tiny_model(), engine.layout
    x = engine.server.x.clone()
    h = torch.zeros(CLIENTS, layout.d, dtype=x.dtype)
    for r in range(rounds):
        lr = 0.5 * engine.settings.lr * (1 + np.cos(np.pi * r / engine.settings.rounds))
        models = {}
        for i in range(CLIENTS):
            w = x
            for batch in engine.batches.draw([i], r):
                keep = slice(None) if batch.weights is None else batch.weights[0] > 0
                views = {name: v.requires_grad_() for name, v in layout.views(w.clone()).items()}
                logits = torch.func.functional_call(module, views, (batch.inputs[0][keep],))
                grads = torch.autograd.grad(F.cross_entropy(logits, batch.targets[0][keep]), list(views.values()))
                g = layout.flatten(dict(zip(views, grads, strict=True)))
                w = w - lr * (g + (w - x) / beta + h[i] / beta)
            models[i] = w
        for i, w in models.items():
            h[i] += w - x
        x = torch.stack(list(models.values())).mean(0) + h.mean(0)
    return x, h.mean(0)


def test_fedsmoo_without_perturbation_is_feddyn() -> None:
    engine = tiny_engine(FedSmoo(rho=0.0, beta=2.0), cohort=CLIENTS, lr=0.3)
    x, h = feddyn(engine, 2.0, 3)
    run_rounds(engine, 3)
    assert h.abs().max() > 1e-2
    torch.testing.assert_close(engine.server.x, x, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(engine.server.h, h, rtol=1e-10, atol=1e-12)
    assert not engine.server.s.any()


@pytest.mark.parametrize("cohort", [5, CLIENTS])
def test_fedsmoos_h_is_the_mean_of_the_clients(cohort: int) -> None:
    """Of all clients; h_i = 0 before a client's first round. Its s is as long as every client's perturbation."""
    engine = tiny_engine(FedSmoo(rho=0.2), cohort=cohort, lr=0.3)
    for _ in range(3):
        engine.run_round()
        mean = engine.store.get(range(CLIENTS))["h_i"].mean(0)
        assert mean.abs().max() > 1e-3
        torch.testing.assert_close(engine.server.h, mean, rtol=1e-12, atol=1e-12)
        assert float(engine.server.s.norm()) == pytest.approx(0.2, rel=1e-5)


def test_one_client_agrees_with_itself_on_the_control_variate() -> None:
    """Alone, FedGAMMA's c is its c_i, and it is FedSAM."""
    alone = {"partition": Partition(np.arange(SAMPLES), np.array([0, SAMPLES])), "cohort": 1}
    assert_same(trained(FedGamma(), **alone), trained(FedSam(), **alone))


@pytest.mark.parametrize(
    "algorithm", [FedSam(rho=0.3), MoFedSam(rho=0.3), FedGamma(rho=0.3), FedLesam(rho=0.3), FedSmoo(rho=0.3)]
)
def test_the_perturbation_counts(algorithm: Algorithm) -> None:
    without = type(algorithm)(rho=0.0)
    assert gap(trained(algorithm, cohort=CLIENTS), trained(without, cohort=CLIENTS)) > 1e-4
