"""Sharpness-aware minimisation at the clients: FedNSAM, FedSAM, MoFedSAM, FedGAMMA, FedLESAM and FedSMOO."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from fedkernels.algorithms import FedGamma, FedLesam, FedNsam, FedSam, FedSmoo, MoFedSam
from fedkernels.optim import Sgd

from .comparison import Case
from .federation import Direction, Federation, Named, minus
from .optimizers import sgd

Step = tuple[Tensor, Tensor, Tensor]


def plus(a: Named, b: Named, scale: float = 1.0) -> Named:
    return {n: a[n] + scale * b[n] for n in a}


def of_length(v: Named, rho: float, eps: float = 1e-12) -> Named:
    norm = math.sqrt(sum(float(t.square().sum()) for t in v.values()))
    return {n: rho * t / (norm + eps) for n, t in v.items()}


def sam(f: Federation, y: Named, step: Step, rho: float) -> Named:
    """The gradient where the loss is highest, to first order, in a ball around y."""
    return f.gradient(plus(y, of_length(f.gradient(y, step), rho)), step)


def fednsam(
    f: Federation,
    rounds: int,
    *,
    perturbation: str = "global",
    gamma: float = 0.85,
    rho: float = 0.05,
    weight_decay: float = 1e-3,
) -> dict[str, Any]:
    x, m = f.start(), f.zeros()
    for r in range(rounds):
        ahead = plus(x, m, gamma)
        deltas = {}
        for i in f.cohort(r):
            start = y = x if perturbation == "global" else ahead
            for step in f.steps(i, r):
                if perturbation == "global":
                    uphill = {n: -t for n, t in m.items()}
                    e = {n: gamma * m[n] + t for n, t in of_length(uphill, rho, 1e-7).items()}
                    g = f.gradient(plus(y, e), step)
                else:
                    g = sam(f, y, step, rho)
                y = {n: y[n] - f.lr(r) * (g[n] + weight_decay * y[n]) for n in y}
            deltas[i] = minus(y, start)
        delta = f.mean(deltas)
        m = {n: gamma * m[n] + delta[n] for n in m}
        x = plus(x, m)
    return {"x": x, "m": m} | ({"z": plus(x, m, gamma)} if perturbation == "local" else {})


def fedsam(
    f: Federation,
    rounds: int,
    *,
    local: Callable[[Federation], Direction] = sgd,
    server_lr: float = 1.0,
    rho: float = 0.1,
    beta: float | None = None,
) -> dict[str, Any]:
    """With `beta`, MoFedSAM."""
    x, G = f.start(), f.zeros()
    own = 1.0 if beta is None else beta
    for r in range(rounds):
        deltas = {}
        for i in f.cohort(r):
            y, direction = dict(x), local(f)
            for k, step in enumerate(f.steps(i, r), start=1):
                g = sam(f, y, step, rho)
                p = direction(y, {n: own * g[n] + (1 - own) * G[n] for n in y}, k)
                y = plus(y, p, -f.lr(r))
            deltas[i] = minus(y, x)
        delta = f.mean(deltas)
        x = plus(x, delta, server_lr)
        K = f.mean_steps(deltas, r)
        G = {n: -delta[n] / (K * f.lr(r)) for n in x}
    return {"x": x} if beta is None else {"x": x, "G": G}


def fedgamma(
    f: Federation,
    rounds: int,
    *,
    local: Callable[[Federation], Direction] = sgd,
    server_lr: float = 1.0,
    rho: float = 0.1,
) -> dict[str, Any]:
    x, c = f.start(), f.zeros()
    kept: dict[int, Named] = {}
    for r in range(rounds):
        deltas, total = {}, f.zeros()
        for i in f.cohort(r):
            c_i = kept.get(i, f.zeros())
            y, direction, taken = dict(x), local(f), 0
            for k, step in enumerate(f.steps(i, r), start=1):
                g = sam(f, y, step, rho)
                p = direction(y, {n: g[n] - c_i[n] + c[n] for n in y}, k)
                y, taken = plus(y, p, -f.lr(r)), k
            kept[i] = {n: c_i[n] - c[n] + (x[n] - y[n]) / (taken * f.lr(r)) for n in x}
            deltas[i], total = minus(y, x), plus(total, minus(kept[i], c_i))
        x = plus(x, f.mean(deltas), server_lr)
        c = plus(c, total, 1 / f.population)
    return {"x": x, "c": c, "kept": {"c_i": kept}}


def fedlesam(
    f: Federation,
    rounds: int,
    *,
    local: Callable[[Federation], Direction] = sgd,
    server_lr: float = 1.0,
    rho: float = 0.1,
) -> dict[str, Any]:
    x = f.start()
    received: dict[int, Named] = {}
    for r in range(rounds):
        deltas = {}
        for i in f.cohort(r):
            e = of_length(minus(received[i], x), rho, 1e-7) if i in received else f.zeros()
            y, direction = dict(x), local(f)
            for k, step in enumerate(f.steps(i, r), start=1):
                y = plus(y, direction(y, f.gradient(plus(y, e), step), k), -f.lr(r))
            deltas[i], received[i] = minus(y, x), x
        x = plus(x, f.mean(deltas), server_lr)
    return {"x": x, "kept": {"x_i": received}}


def fedsmoo(
    f: Federation,
    rounds: int,
    *,
    local: Callable[[Federation], Direction] = sgd,
    rho: float = 0.1,
    beta: float = 10.0,
) -> dict[str, Any]:
    """The paper's λ of the models, returned in units of parameters: `h = −βλ`."""
    x, lam, s = f.start(), f.zeros(), f.zeros()
    lams: dict[int, Named] = {}
    mus: dict[int, Named] = {}
    for r in range(rounds):
        deltas, sent = {}, {}
        for i in f.cohort(r):
            lam_i, mu_i = lams.get(i, f.zeros()), mus.get(i, f.zeros())
            y, direction, s_hat = dict(x), local(f), f.zeros()
            for k, step in enumerate(f.steps(i, r), start=1):
                g = f.gradient(y, step)
                s_hat = of_length({n: g[n] - mu_i[n] - s[n] for n in g}, rho, 1e-7)
                mu_i = {n: mu_i[n] + (s_hat[n] - s[n]) for n in mu_i}
                g = f.gradient(plus(y, s_hat), step)
                p = direction(y, {n: g[n] - lam_i[n] + (y[n] - x[n]) / beta for n in y}, k)
                y = plus(y, p, -f.lr(r))
            deltas[i], sent[i] = minus(y, x), minus(mu_i, s_hat)
            lams[i], mus[i] = plus(lam_i, deltas[i], -1 / beta), mu_i
        delta = f.mean(deltas)
        lam = plus(lam, delta, -len(deltas) / (beta * f.population))
        s = of_length(f.mean(sent), rho, 1e-7)
        x = {n: x[n] + delta[n] - beta * lam[n] for n in x}
    h_i = {i: {n: -beta * t for n, t in lam_i.items()} for i, lam_i in lams.items()}
    return {"x": x, "h": {n: -beta * t for n, t in lam.items()}, "s": s, "kept": {"h_i": h_i, "mu_i": mus}}


LOCAL_NSAM = {"perturbation": "local", "gamma": 0.6, "rho": 0.3, "weight_decay": 0.1}
GLOBAL_NSAM = {"perturbation": "global", "gamma": 0.6, "rho": 0.3, "weight_decay": 0.1}
SGD, ORACLE_SGD = Sgd(momentum=0.5, weight_decay=0.1), partial(sgd, momentum=0.5, decay=0.1)
OPTIONS = {"server_lr": 0.5, "rho": 0.4}

CASES: dict[str, Case] = {
    "fednsam": Case(FedNsam(), fednsam, {"lr": 0.3}),
    "fednsam-options": Case(FedNsam(**GLOBAL_NSAM), partial(fednsam, **GLOBAL_NSAM), {"weighting": "samples"}),
    "fednsam-local": Case(FedNsam(perturbation="local"), partial(fednsam, perturbation="local"), {"lr": 0.3}),
    "fednsam-local-options": Case(
        FedNsam(**LOCAL_NSAM), partial(fednsam, **LOCAL_NSAM), {"lr": 0.3, "clip_norm": 0.1, "weighting": "samples"}
    ),
    "fedsam": Case(FedSam(), fedsam, {"lr": 0.5}),
    "fedsam-options": Case(
        FedSam(local=SGD, **OPTIONS), partial(fedsam, local=ORACLE_SGD, **OPTIONS), {"weighting": "samples"}
    ),
    "fedsam-clipped": Case(FedSam(), fedsam, {"lr": 2.0, "clip_norm": 0.1}),
    "mofedsam": Case(MoFedSam(), partial(fedsam, beta=0.1), {"lr": 0.5}),
    "mofedsam-options": Case(
        MoFedSam(local=SGD, beta=0.6, **OPTIONS), partial(fedsam, local=ORACLE_SGD, beta=0.6, **OPTIONS)
    ),
    "fedgamma": Case(FedGamma(), fedgamma, {"lr": 0.3}),
    "fedgamma-options": Case(
        FedGamma(local=SGD, **OPTIONS),
        partial(fedgamma, local=ORACLE_SGD, **OPTIONS),
        {"lr": 0.1, "weighting": "samples"},
    ),
    "fedlesam": Case(FedLesam(), fedlesam, {"lr": 0.3}),
    "fedlesam-options": Case(FedLesam(local=SGD, **OPTIONS), partial(fedlesam, local=ORACLE_SGD, **OPTIONS)),
    "fedsmoo": Case(FedSmoo(), fedsmoo, {"lr": 0.3}),
    "fedsmoo-options": Case(
        FedSmoo(local=SGD, rho=0.4, beta=0.7),
        partial(fedsmoo, local=ORACLE_SGD, rho=0.4, beta=0.7),
        {"weighting": "samples"},
    ),
    "fedsmoo-poisson": Case(FedSmoo(), fedsmoo, {"lr": 0.3, "sampling": "poisson"}),
}
