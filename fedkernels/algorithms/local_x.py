"""Local X: FedAvg around an optimizer whose state restarts each round, the baselines of adaptive methods."""

from __future__ import annotations

from dataclasses import dataclass

from ..contract import LocalOptimizer
from ..optim import AdamW, Muon, Shampoo, Soap, Sophia
from .fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class LocalAdamW(FedAvg):
    """FedAvg of `AdamW` clients. Reference: arXiv 1602.05629 around Loshchilov and Hutter, 2019 (arXiv 1711.05101)."""

    local: LocalOptimizer = AdamW()


@dataclass(frozen=True, kw_only=True)
class LocalMuon(FedAvg):
    """FedAvg of `Muon` clients with FedMuon's momentum. Reference: the baseline of FedMuon (arXiv 2510.27403)."""

    local: LocalOptimizer = Muon(momentum=0.98)


@dataclass(frozen=True, kw_only=True)
class LocalSoap(FedAvg):
    """FedAvg of `Soap` clients, which only build their factors in the first step of every round.

    Reference: a baseline of FedPAC (arXiv 2602.19271).
    """

    local: LocalOptimizer = Soap()


@dataclass(frozen=True, kw_only=True)
class LocalSophia(FedAvg):
    """FedAvg of `Sophia` clients. Reference: a baseline of FedPAC (arXiv 2602.19271)."""

    local: LocalOptimizer = Sophia()


@dataclass(frozen=True, kw_only=True)
class LocalShampoo(FedAvg):
    """FedAvg of `Shampoo` clients. Reference: a baseline of FedPAC (arXiv 2602.19271)."""

    local: LocalOptimizer = Shampoo()
