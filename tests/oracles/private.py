"""Algorithms under client-level differential privacy, with the noise that the engine draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from fedkernels.algorithms import DpFedAdamW, DpFedAvg, DpFedPgn, DpFedSam
from fedkernels.privacy.mechanism import Privacy

from .averaging import ORACLE_SGD, SGD
from .comparison import Case
from .federation import Direction, Federation, Named, minus
from .optimizers import ADAMW_OPTIONS, ORACLE_ADAMW_OPTIONS, adamw, sgd


def norm(named: Named) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in named.values()))


def released(f: Federation, r: int, sent: Mapping[int, Named]) -> Named:
    """`(Σ_i clip_C(r_i) + σC z) / (qN)`."""
    privacy = f.settings.privacy
    assert privacy is not None
    assert f.normal is not None
    out = {n: privacy.noise_multiplier * privacy.clip * z for n, z in f.normal(r).items()}
    for named in sent.values():
        scale = min(1.0, privacy.clip / norm(named))
        out = {n: out[n] + scale * named[n] for n in out}
    return {n: t / f.settings.cohort for n, t in out.items()}


def ascended(f: Federation, y: Named, step: Any, rho: float, eps: float) -> Named:
    """The gradient at `y + ρ g/(‖g‖ + ε)`, on the batch of g."""
    g = f.gradient(y, step)
    length = norm(g) + eps
    return f.gradient({n: y[n] + rho * g[n] / length for n in y}, step)


def dp_fedavg(
    f: Federation,
    rounds: int,
    *,
    local: Callable[[Federation], Direction] = sgd,
    server_lr: float = 1.0,
    rho: float | None = None,
) -> dict[str, Any]:
    """DP-FedSAM where ρ is given."""
    x = f.start()
    for r in range(rounds):
        deltas = {}
        for i in f.cohort(r):
            y, direction = dict(x), local(f)
            for k, step in enumerate(f.steps(i, r), start=1):
                g = f.gradient(y, step) if rho is None else ascended(f, y, step, rho, 1e-12)
                p = direction(y, g, k)
                y = {n: y[n] - f.lr(r) * p[n] for n in y}
            deltas[i] = minus(y, x)
        delta = released(f, r, deltas)
        x = {n: x[n] + server_lr * delta[n] for n in x}
    return {"x": x}


def dp_fedadamw(f: Federation, rounds: int, *, alpha: float = 0.5, **options: Any) -> dict[str, Any]:
    x, G = f.start(), f.zeros()
    K = f.nominal_steps
    for r in range(rounds):
        public = {n: -alpha * K * f.lr(r) * G[n] for n in x}
        sent = {}
        for i in f.cohort(r):
            y, direction = dict(x), adamw(f, **options)
            for k, step in enumerate(f.steps(i, r), start=1):
                p = direction(y, f.gradient(y, step), k)
                y = {n: y[n] - f.lr(r) * (p[n] + alpha * G[n]) for n in y}
            sent[i] = minus(minus(y, x), public)
        u = released(f, r, sent)
        delta = {n: u[n] + public[n] for n in x}
        x = {n: x[n] + delta[n] for n in x}
        G = {n: -delta[n] / (K * f.lr(r)) for n in x}
    return {"x": x, "G": G}


def largest(named: Named, share: float) -> Named:
    flat = torch.cat([t.flatten() for t in named.values()]).abs().sort(descending=True).values
    least = float(flat[max(1, round(share * len(flat))) - 1])
    return {n: t * (t.abs() >= least) for n, t in named.items()}


def dp_fedpgn(
    f: Federation, rounds: int, *, penalty: bool = False, gamma: float = 0.2, rho: float = 0.1, share: float = 1.0
) -> dict[str, Any]:
    x, g = f.start(), f.zeros()
    K = f.nominal_steps
    for r in range(rounds):
        length = math.sqrt(sum(float(t.square().sum()) for t in g.values()))
        e = {n: (rho if penalty else 0) * g[n] / (length + 1e-7) for n in x}
        public = {n: (1 - gamma) * K * f.lr(r) * g[n] for n in x}
        sent = {}
        for i in f.cohort(r):
            y = dict(x)
            for step in f.steps(i, r):
                own = f.gradient({n: y[n] + e[n] for n in y}, step)
                y = {n: y[n] - f.lr(r) * (gamma * own[n] + (1 - gamma) * g[n]) for n in y}
            sent[i] = largest(minus(minus(x, y), public), share)
        u = released(f, r, sent)
        bracket = {n: u[n] + public[n] for n in x}
        x = minus(x, bracket)
        g = {n: bracket[n] / (K * f.lr(r)) for n in x}
    return {"x": x, "g": g}


def private(clip: float, sigma: float = 0.5, **settings: Any) -> dict[str, Any]:
    """A clip that some updates exceed and some do not, under Poisson sampling."""
    privacy = Privacy(noise_multiplier=sigma, clip=clip, delta=0.01, noise_seed=11)
    return {"sampling": "poisson", "on_nonfinite": "drop_client", "privacy": privacy, **settings}


CASES: dict[str, Case] = {
    "dp_fedavg": Case(DpFedAvg(), dp_fedavg, private(0.3, lr=0.5)),
    "dp_fedavg-options": Case(
        DpFedAvg(local=SGD, server_lr=0.5), partial(dp_fedavg, local=ORACLE_SGD, server_lr=0.5), private(0.2, lr=0.1)
    ),
    "dp_fedsam": Case(DpFedSam(), partial(dp_fedavg, rho=0.5), private(0.3, lr=0.5)),
    "dp_fedsam-near": Case(DpFedSam(rho=0.05), partial(dp_fedavg, rho=0.05), private(0.3, lr=0.5)),
    "dp_fedadamw": Case(DpFedAdamW(), dp_fedadamw, private(0.3)),
    "dp_fedadamw-options": Case(
        DpFedAdamW(alpha=0.9, **ADAMW_OPTIONS), partial(dp_fedadamw, alpha=0.9, **ORACLE_ADAMW_OPTIONS), private(0.3)
    ),
    "dp_fedpgn": Case(DpFedPgn(), dp_fedpgn, private(0.1, lr=0.5)),
    "dp_fedpgn-few": Case(DpFedPgn(), dp_fedpgn, private(0.1, lr=0.5, cohort=1)),
    "dp_fedpgn-penalty": Case(DpFedPgn(variant="penalty"), partial(dp_fedpgn, penalty=True), private(0.1, lr=0.5)),
    "dp_fedpgn-options": Case(
        DpFedPgn(variant="penalty", gamma=0.6, rho=0.4, sparsify=0.3),
        partial(dp_fedpgn, penalty=True, gamma=0.6, rho=0.4, share=0.3),
        private(0.1, lr=0.5),
    ),
}
