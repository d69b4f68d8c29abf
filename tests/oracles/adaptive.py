"""FedAdamW and FedMuon."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedkernels.algorithms import FedAdamW, FedMuon
from fedkernels.layout import Layout

from .comparison import Case
from .federation import Federation, minus
from .optimizers import (
    ADAMW_OPTIONS,
    MUON_OPTIONS,
    ORACLE_ADAMW_OPTIONS,
    ORACLE_MUON_OPTIONS,
    adamw,
    muon,
    polar_express,
    truncated,
)


def fedadamw(
    f: Federation, rounds: int, *, second_moment: str = "hessian", alpha: float = 0.5, **options: Any
) -> dict[str, Any]:
    """`v_bar` is returned expanded, every coordinate with the value of its block, unless nothing of v travels."""
    x, G, v_bar, t = f.start(), f.zeros(), f.zeros(), 0.0
    for r in range(rounds):
        deltas, moments = {}, {}
        for i in f.cohort(r):
            y, v = dict(x), dict(v_bar)
            direction = adamw(f, v=v, seen=0 if second_moment == "none" else t, **options)
            for k, step in enumerate(f.steps(i, r), start=1):
                p = direction(y, f.gradient(y, step), k)
                y = {n: y[n] - f.lr(r) * (p[n] + alpha * G[n]) for n in y}
            deltas[i], moments[i] = minus(y, x), v
        delta = f.mean(deltas)
        x = {n: x[n] + delta[n] for n in x}
        K = f.mean_steps(deltas, r)
        G = {n: -delta[n] / (K * f.lr(r)) for n in x}
        t += K
        if second_moment != "none":
            v_bar = f.block_mean(f.mean(moments), second_moment)
    shared = {"v_bar": v_bar, "t": torch.tensor([t], dtype=torch.float64)}
    return {"x": x, "G": G} | ({} if second_moment == "none" else shared)


def fedmuon(
    f: Federation,
    rounds: int,
    *,
    alpha: float = 0.5,
    share_momentum: bool = True,
    momentum_rank: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`M_bar` holds the hidden matrices only, and is not there where momentum is not shared."""
    x, G = f.start(), f.zeros()
    M_bar = {n: torch.zeros_like(x[n]) for n in f.hidden}
    for r in range(rounds):
        deltas, momenta = {}, {}
        for i in f.cohort(r):
            y, M = dict(x), dict(M_bar)
            direction = muon(f, M=M, **options)
            for k, step in enumerate(f.steps(i, r), start=1):
                p = direction(y, f.gradient(y, step), k)
                y = {n: y[n] - f.lr(r) * ((1 - alpha) * p[n] + alpha * G[n]) for n in y}
            deltas[i], momenta[i] = minus(y, x), M
            if momentum_rank is not None:
                momenta[i] = {n: truncated(f, n, m, momentum_rank) for n, m in M.items()}
        delta = f.mean(deltas)
        x = {n: x[n] + delta[n] for n in x}
        K = f.mean_steps(deltas, r)
        G = {n: -delta[n] / (K * f.lr(r)) for n in x}
        if share_momentum:
            M_bar = f.mean(momenta)
    return {"x": x, "G": G, "M_bar": M_bar} if share_momentum else {"x": x, "G": G}


def expand_blocks(rule: str) -> dict[str, Callable[[Layout, Tensor], Tensor]]:
    if rule in ("full", "none"):
        return {}
    return {"v_bar": lambda layout, v: layout.curvature_blocks(rule).expand(v)}  # type: ignore[arg-type]


CASES: dict[str, Case] = {
    **{
        f"fedadamw-{rule}": Case(
            FedAdamW(second_moment=rule), partial(fedadamw, second_moment=rule), expand=expand_blocks(rule)
        )
        for rule in ("hessian", "tensor", "full", "none")
    },
    "fedadamw-options": Case(
        FedAdamW(alpha=0.9, **ADAMW_OPTIONS),
        partial(fedadamw, alpha=0.9, **ORACLE_ADAMW_OPTIONS),
        {"weighting": "samples"},
        expand=expand_blocks("hessian"),
    ),
    "fedmuon": Case(FedMuon(), fedmuon),
    "fedmuon-options": Case(
        FedMuon(alpha=0.8, **MUON_OPTIONS),
        partial(fedmuon, alpha=0.8, **ORACLE_MUON_OPTIONS),
        {"weighting": "samples"},
    ),
    "fedmuon-unshared": Case(FedMuon(share_momentum=False), partial(fedmuon, share_momentum=False)),
    "fedmuon-all": Case(FedMuon(route="all_matrices"), fedmuon),
    "fedmuon-low-rank": Case(FedMuon(momentum_rank=0.6), partial(fedmuon, momentum_rank=0.6)),
    "fedmuon-low-rank-all": Case(
        FedMuon(route="all_matrices", momentum_rank=0.3),
        partial(fedmuon, momentum_rank=0.3),
        {"weighting": "samples"},
    ),
    "fedmuon-polar-express": Case(
        FedMuon(orthogonalization="polar_express", **MUON_OPTIONS),
        partial(fedmuon, orthogonal=polar_express, **ORACLE_MUON_OPTIONS),
    ),
}
