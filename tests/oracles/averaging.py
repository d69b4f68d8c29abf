"""FedAvg and its variants, SCAFFOLD, and averages of other local optimizers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fedkernels.algorithms import FedAvg, LocalAdamW, LocalMuon, Scaffold
from fedkernels.optim import AdamW, Muon, Sgd

from .comparison import Case
from .federation import Direction, Federation, Named, minus
from .optimizers import ADAMW_OPTIONS, ORACLE_ADAMW_OPTIONS, ORACLE_MUON_OPTIONS, adamw, muon, sgd


def fedavg(
    f: Federation,
    rounds: int,
    *,
    local: Callable[[Federation], Direction] = sgd,
    server_lr: float = 1.0,
    prox_mu: float = 0.0,
    server_momentum: float = 0.0,
) -> dict[str, Any]:
    x, v = f.start(), f.zeros()
    for r in range(rounds):
        deltas = {}
        for i in f.cohort(r):
            y, direction = dict(x), local(f)
            for k, step in enumerate(f.steps(i, r), start=1):
                g = f.gradient(y, step)
                p = direction(y, {n: g[n] + prox_mu * (y[n] - x[n]) for n in y}, k)
                y = {n: y[n] - f.lr(r) * p[n] for n in y}
            deltas[i] = minus(y, x)
        delta = f.mean(deltas)
        v = {n: server_momentum * v[n] + delta[n] for n in v}
        x = {n: x[n] + server_lr * v[n] for n in x}
    return {"x": x, "v": v} if server_momentum else {"x": x}


def scaffold(
    f: Federation, rounds: int, *, local: Callable[[Federation], Direction] = sgd, server_lr: float = 1.0
) -> dict[str, Any]:
    x, c = f.start(), f.zeros()
    kept: dict[int, Named] = {}
    for r in range(rounds):
        deltas, changes = {}, {}
        for i in f.cohort(r):
            c_i = kept.get(i, f.zeros())
            y, direction, taken = dict(x), local(f), 0
            for k, step in enumerate(f.steps(i, r), start=1):
                g = f.gradient(y, step)
                p = direction(y, {n: g[n] - c_i[n] + c[n] for n in y}, k)
                y = {n: y[n] - f.lr(r) * p[n] for n in y}
                taken = k
            new = {n: c_i[n] - c[n] + (x[n] - y[n]) / (taken * f.lr(r)) for n in x}
            deltas[i], changes[i], kept[i] = minus(y, x), minus(new, c_i), new
        delta, change = f.mean(deltas), f.mean(changes)
        x = {n: x[n] + server_lr * delta[n] for n in x}
        c = {n: c[n] + len(deltas) / f.population * change[n] for n in c}
    return {"x": x, "c": c, "kept": {"c_i": kept}}


def local_adamw(f: Federation, rounds: int, **options: Any) -> dict[str, Any]:
    return fedavg(f, rounds, local=partial(adamw, **options))


def local_muon(f: Federation, rounds: int, **options: Any) -> dict[str, Any]:
    return fedavg(f, rounds, local=partial(muon, **options))


SGD, ADAMW, MUON = Sgd(momentum=0.9, weight_decay=0.1), AdamW(eps=1e-4, weight_decay=0.3), Muon(weight_decay=0.2)
ORACLE_SGD = partial(sgd, momentum=0.9, decay=0.1)
ORACLE_ADAMW = partial(adamw, eps=1e-4, decay=0.3)
ORACLE_MUON = partial(muon, beta=0.95, decay=0.2)
SERVER_OPTIONS = {"server_lr": 0.5, "prox_mu": 0.3, "server_momentum": 0.9}

CASES: dict[str, Case] = {
    "fedavg": Case(FedAvg(), fedavg, {"lr": 0.5}),
    "fedavg-clipped": Case(FedAvg(), fedavg, {"lr": 2.0, "clip_norm": 0.1}),
    "fedavg-by-samples": Case(FedAvg(), fedavg, {"lr": 0.5, "weighting": "samples"}),
    "fedprox": Case(FedAvg(prox_mu=0.7), partial(fedavg, prox_mu=0.7), {"lr": 0.5}),
    "fedavgm": Case(FedAvg(server_momentum=0.6), partial(fedavg, server_momentum=0.6), {"lr": 0.5}),
    "fedavg-all": Case(FedAvg(**SERVER_OPTIONS), partial(fedavg, **SERVER_OPTIONS), {"lr": 0.5}),
    "fedavg-sgd": Case(FedAvg(local=SGD), partial(fedavg, local=ORACLE_SGD), {"lr": 0.1}),
    "fedavg-adamw": Case(FedAvg(local=ADAMW), partial(fedavg, local=ORACLE_ADAMW)),
    "fedprox-muon": Case(FedAvg(local=MUON, prox_mu=0.7), partial(fedavg, local=ORACLE_MUON, prox_mu=0.7)),
    "scaffold": Case(Scaffold(), scaffold, {"lr": 0.3}),
    "scaffold-slow": Case(Scaffold(server_lr=0.5), partial(scaffold, server_lr=0.5), {"lr": 0.3}),
    "scaffold-poisson": Case(Scaffold(), scaffold, {"lr": 0.3, "sampling": "poisson"}),
    "scaffold-sgd": Case(Scaffold(local=SGD), partial(scaffold, local=ORACLE_SGD), {"lr": 0.05}),
    "local_adamw": Case(LocalAdamW(), local_adamw),
    "local_adamw-options": Case(LocalAdamW(local=AdamW(**ADAMW_OPTIONS)), partial(local_adamw, **ORACLE_ADAMW_OPTIONS)),
    "local_muon": Case(LocalMuon(), local_muon),
    "local_muon-options": Case(
        LocalMuon(local=Muon(momentum=0.9, lr_multiplier=0.5, weight_decay=0.3)),
        partial(local_muon, **ORACLE_MUON_OPTIONS),
    ),
    "local_muon-all": Case(LocalMuon(local=Muon(momentum=0.98, route="all_matrices")), local_muon),
}
