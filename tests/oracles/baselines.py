"""FedProx and FedAvgM by name, server optimizers, FedCM, FedACG, FedDyn and FedLADA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedkernels.algorithms import (
    FedAcg,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedCm,
    FedDyn,
    FedLada,
    FedProx,
    FedYogi,
)

from .averaging import ADAMW, ORACLE_ADAMW, ORACLE_SGD, SGD, fedavg
from .comparison import Case
from .federation import Direction, Federation, Named, minus
from .optimizers import sgd

Local = Callable[[Federation], Direction]


def descend(f: Federation, i: int, r: int, start: Named, direction: Direction) -> Named:
    """Client i's model after its steps of round r."""
    y = dict(start)
    for k, step in enumerate(f.steps(i, r), start=1):
        p = direction(y, f.gradient(y, step), k)
        y = {n: y[n] - f.lr(r) * p[n] for n in y}
    return y


def adagrad_rule(v: Tensor, delta: Tensor, beta2: float) -> Tensor:
    return v + delta**2


def adam_rule(v: Tensor, delta: Tensor, beta2: float) -> Tensor:
    return beta2 * v + (1 - beta2) * delta**2


def yogi_rule(v: Tensor, delta: Tensor, beta2: float) -> Tensor:
    change = (1 - beta2) * delta**2
    return torch.where(v > delta**2, v - change, torch.where(v < delta**2, v + change, v))


def fedopt(
    f: Federation,
    rounds: int,
    *,
    rule: Callable[[Tensor, Tensor, float], Tensor],
    local: Local = sgd,
    server_lr: float = 0.1,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
) -> dict[str, Any]:
    x, m = f.start(), f.zeros()
    v = {n: torch.ones_like(t) * tau**2 for n, t in x.items()}
    for r in range(rounds):
        delta = f.mean({i: minus(descend(f, i, r, x, local(f)), x) for i in f.cohort(r)})
        m = {n: beta1 * m[n] + (1 - beta1) * delta[n] for n in x}
        v = {n: rule(v[n], delta[n], beta2) for n in x}
        x = {n: x[n] + server_lr * m[n] / (v[n] ** 0.5 + tau) for n in x}
    return {"x": x, "m": m, "v": v}


def fedcm(
    f: Federation, rounds: int, *, local: Local = sgd, alpha: float = 0.1, server_lr: float = 1.0
) -> dict[str, Any]:
    x, G = f.start(), f.zeros()
    for r in range(rounds):
        deltas = {}
        for i in f.cohort(r):
            own = local(f)

            def mixed(y: Named, g: Named, k: int, own: Direction = own, G: Named = G) -> Named:
                p = own(y, g, k)
                return {n: alpha * p[n] + (1 - alpha) * G[n] for n in p}

            deltas[i] = minus(descend(f, i, r, x, mixed), x)
        delta = f.mean(deltas)
        x = {n: x[n] + server_lr * delta[n] for n in x}
        K = f.mean_steps(deltas, r)
        G = {n: -delta[n] / (K * f.lr(r)) for n in x}
    return {"x": x, "G": G}


def fedacg(
    f: Federation, rounds: int, *, local: Local = sgd, momentum: float = 0.85, prox_beta: float = 0.01
) -> dict[str, Any]:
    """The server's step as the paper also has it: the new model is the mean of the clients' models."""
    x, m = f.start(), f.zeros()
    for r in range(rounds):
        z = {n: x[n] + momentum * m[n] for n in x}
        models = {}
        for i in f.cohort(r):
            own = local(f)

            def held(y: Named, g: Named, k: int, own: Direction = own, z: Named = z) -> Named:
                return own(y, {n: g[n] + prox_beta * (y[n] - z[n]) for n in y}, k)

            models[i] = descend(f, i, r, z, held)
        mean = f.mean(models)
        x, m = mean, minus(mean, x)
    return {"x": x, "m": m, "z": {n: x[n] + momentum * m[n] for n in x}}


def feddyn(f: Federation, rounds: int, *, local: Local = sgd, alpha: float = 0.1) -> dict[str, Any]:
    x, h = f.start(), f.zeros()
    kept: dict[int, Named] = {}
    for r in range(rounds):
        models = {}
        for i in f.cohort(r):
            own, h_i = local(f), kept.get(i, f.zeros())

            def regularised(y: Named, g: Named, k: int, own: Direction = own, h_i: Named = h_i, x: Named = x) -> Named:
                return own(y, {n: g[n] - h_i[n] + alpha * (y[n] - x[n]) for n in y}, k)

            y = models[i] = descend(f, i, r, x, regularised)
            kept[i] = {n: h_i[n] - alpha * (y[n] - x[n]) for n in x}
        mean = f.mean(models)
        h = {n: h[n] - alpha * len(models) * (mean[n] - x[n]) / f.population for n in x}
        x = {n: mean[n] - h[n] / alpha for n in x}
    return {"x": x, "h": h, "kept": {"h_i": kept}}


def fedlada(
    f: Federation,
    rounds: int,
    *,
    alpha: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    server_lr: float = 1.0,
) -> dict[str, Any]:
    x, G = f.start(), f.zeros()
    v_bar = {n: torch.ones_like(t) * eps**2 for n, t in x.items()}
    for r in range(rounds):
        deltas, maxima = {}, {}
        for i in f.cohort(r):
            m, v, v_hat = f.zeros(), dict(v_bar), dict(v_bar)

            def amended(
                y: Named, g: Named, k: int, m: Named = m, v: Named = v, v_hat: Named = v_hat, G: Named = G
            ) -> Named:
                for n in y:
                    m[n] = betas[0] * m[n] + (1 - betas[0]) * g[n]
                    v[n] = betas[1] * v[n] + (1 - betas[1]) * g[n] ** 2
                    v_hat[n] = torch.where(v[n] > v_hat[n], v[n], v_hat[n])
                return {n: alpha * m[n] / v_hat[n] ** 0.5 + (1 - alpha) * G[n] for n in y}

            deltas[i], maxima[i] = minus(descend(f, i, r, x, amended), x), v_hat
        delta, v_bar = f.mean(deltas), f.mean(maxima)
        x = {n: x[n] + server_lr * delta[n] for n in x}
        K = f.mean_steps(deltas, r)
        G = {n: -delta[n] / (K * f.lr(r)) for n in x}
    return {"x": x, "G": G, "v_bar": v_bar}


FEDOPT_OPTIONS = {"server_lr": 0.2, "beta1": 0.6, "tau": 0.05}
LADA_OPTIONS = {"alpha": 0.4, "eps": 1e-3, "server_lr": 0.7}
BY_SAMPLES: dict[str, Any] = {"weighting": "samples", "lr": 0.1}

CASES: dict[str, Case] = {
    "fedprox-default": Case(FedProx(), partial(fedavg, prox_mu=0.01), {"lr": 0.5}),
    "fedprox-options": Case(
        FedProx(prox_mu=0.7, local=SGD, server_lr=0.5, server_momentum=0.4),
        partial(fedavg, prox_mu=0.7, local=ORACLE_SGD, server_lr=0.5, server_momentum=0.4),
        BY_SAMPLES,
    ),
    "fedavgm-default": Case(FedAvgM(), partial(fedavg, server_momentum=0.9), {"lr": 0.5}),
    "fedavgm-options": Case(
        FedAvgM(server_momentum=0.6, local=ADAMW, server_lr=0.5),
        partial(fedavg, server_momentum=0.6, local=ORACLE_ADAMW, server_lr=0.5),
        {"weighting": "samples"},
    ),
    "fedadam": Case(FedAdam(), partial(fedopt, rule=adam_rule), {"lr": 0.5}),
    "fedadam-options": Case(
        FedAdam(beta2=0.7, local=SGD, **FEDOPT_OPTIONS),
        partial(fedopt, rule=adam_rule, beta2=0.7, local=ORACLE_SGD, **FEDOPT_OPTIONS),
        BY_SAMPLES,
    ),
    "fedyogi": Case(FedYogi(), partial(fedopt, rule=yogi_rule), {"lr": 0.5}),
    "fedyogi-options": Case(
        FedYogi(beta2=0.7, local=SGD, **FEDOPT_OPTIONS),
        partial(fedopt, rule=yogi_rule, beta2=0.7, local=ORACLE_SGD, **FEDOPT_OPTIONS),
        BY_SAMPLES,
    ),
    "fedadagrad": Case(FedAdagrad(), partial(fedopt, rule=adagrad_rule, beta1=0.0), {"lr": 0.5}),
    "fedadagrad-options": Case(
        FedAdagrad(local=SGD, **FEDOPT_OPTIONS),
        partial(fedopt, rule=adagrad_rule, local=ORACLE_SGD, **FEDOPT_OPTIONS),
        BY_SAMPLES,
    ),
    "fedcm": Case(FedCm(), fedcm, {"lr": 0.5}),
    "fedcm-options": Case(
        FedCm(alpha=0.6, local=SGD, server_lr=0.5),
        partial(fedcm, alpha=0.6, local=ORACLE_SGD, server_lr=0.5),
        BY_SAMPLES,
    ),
    "fedcm-adamw": Case(FedCm(local=ADAMW), partial(fedcm, local=ORACLE_ADAMW)),
    "fedacg": Case(FedAcg(), fedacg, {"lr": 0.5}),
    "fedacg-options": Case(
        FedAcg(momentum=0.4, prox_beta=0.8, local=SGD),
        partial(fedacg, momentum=0.4, prox_beta=0.8, local=ORACLE_SGD),
        BY_SAMPLES,
    ),
    "feddyn": Case(FedDyn(), feddyn, {"lr": 0.3}),
    "feddyn-options": Case(
        FedDyn(alpha=0.7, local=SGD), partial(feddyn, alpha=0.7, local=ORACLE_SGD), BY_SAMPLES
    ),
    "feddyn-poisson": Case(FedDyn(), feddyn, {"lr": 0.3, "sampling": "poisson"}),
    "fedlada": Case(FedLada(), fedlada),
    "fedlada-options": Case(
        FedLada(beta1=0.7, beta2=0.8, **LADA_OPTIONS),
        partial(fedlada, betas=(0.7, 0.8), **LADA_OPTIONS),
        {"weighting": "samples"},
    ),
}  # fmt: skip
