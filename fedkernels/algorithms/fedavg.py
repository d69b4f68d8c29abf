"""FedAvg, FedProx and FedAvgM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..contract import Algorithm, LocalOptimizer, Round, Task, Vectors
from ..federated.local import run_local
from ..layout import Layout
from ..optim import Sgd
from ..wire import Wire


@dataclass(frozen=True, kw_only=True)
class FedAvg(Algorithm):
    """Average of local SGD; `prox_mu` makes it FedProx, `server_momentum` FedAvgM.

    Clients `y ← y − η P(∇f_i(y) + μ(y − x))`; server `v ← γv + Δ̄`, `x ← x + η_g v`.

    Args:
        local: the clients' optimizer P, its state reset each round.
        server_lr: η_g, the server's step on the averaged update.
        prox_mu: FedProx's μ.
        server_momentum: FedAvgM's γ.

    References: McMahan et al., Communication-efficient learning of deep networks from decentralized data, 2017
    (arXiv 1602.05629); Li et al., Federated optimization in heterogeneous networks, 2020 (arXiv 1812.06127);
    Hsu et al., Measuring the effects of non-identical data distribution, 2019 (arXiv 1909.06335).
    """

    local: LocalOptimizer = Sgd()
    server_lr: Annotated[float, Field(gt=0)] = 1.0
    prox_mu: Annotated[float, Field(ge=0)] = 0.0
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0

    shardable = True

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"delta": Wire()}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"x": x.clone(), "v": torch.zeros_like(x)} if self.server_momentum else {"x": x.clone()}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        prox = (lambda y, b: task.grad(y, b).add_(y - s.x, alpha=self.prox_mu)) if self.prox_mu else None
        y, _ = run_local(task, s.x, self.local, grad=prox)
        return {"delta": y - s.x}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        if not self.server_momentum:
            return {"x": s.x + self.server_lr * agg.delta}
        v = self.server_momentum * s.v + agg.delta
        return {"x": s.x + self.server_lr * v, "v": v}


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg):
    """FedAvg whose clients are pulled back to x by a proximal term.

    Clients `y ← y − η P(∇f_i(y) + μ(y − x))`, the gradient of `f_i(y) + μ/2 ‖y − x‖²`; server `x ← x + η_g Δ̄`.

    Args:
        prox_mu: μ; the other keys are those of FedAvg.

    Reference: Li et al., Federated optimization in heterogeneous networks, 2020 (arXiv 1812.06127), Algorithm 2.
    """

    prox_mu: Annotated[float, Field(ge=0)] = 0.01


@dataclass(frozen=True, kw_only=True)
class FedAvgM(FedAvg):
    """FedAvg with heavy-ball momentum at the server.

    Clients `y ← y − η P(∇f_i(y))`; server `v ← γv + Δ̄`, `x ← x + η_g v`.

    Args:
        server_momentum: γ; the other keys are those of FedAvg.

    Reference: Hsu et al., Measuring the effects of non-identical data distribution for federated visual classification,
    2019 (arXiv 1909.06335).
    """

    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
