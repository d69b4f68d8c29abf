"""FedSAM and MoFedSAM: sharpness-aware minimisation at the clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..contract import Algorithm, LocalOptimizer, Round, Task, Vectors
from ..federated.local import run_local, sam_gradient
from ..layout import Layout
from ..optim import Sgd
from ..wire import Wire


@dataclass(frozen=True, kw_only=True)
class FedSam(Algorithm):
    """FedAvg with sharpness-aware gradients.

    Clients `y ← y − η P(g̃)`, `g̃ = ∇f_i(y + ρ g/(‖g‖ + ε))` with `g = ∇f_i(y)` on the same batch;
    server `x ← x + η_g Δ̄`.

    Args:
        local: the clients' optimizer P, its state reset each round.
        server_lr: η_g, the server's step on the averaged update.
        rho: ρ, radius of the perturbation.

    Reference: Qu et al., Generalized federated learning via sharpness aware minimization, 2022 (arXiv 2206.02618).
    """

    local: LocalOptimizer = Sgd()
    server_lr: Annotated[float, Field(gt=0)] = 1.0
    rho: Annotated[float, Field(ge=0)] = 0.1

    shardable = True

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"delta": Wire()}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"x": x.clone()}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        y, _ = run_local(task, s.x, self.local, grad=sam_gradient(task, self.rho))
        return {"delta": y - s.x}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        return {"x": s.x + self.server_lr * agg.delta}


@dataclass(frozen=True, kw_only=True)
class MoFedSam(Algorithm):
    """FedSAM whose clients mix the last round's global direction into every step.

    Clients `y ← y − η P(βg̃ + (1−β)G)` with FedSAM's `g̃`; server `x ← x + η_g Δ̄`, `G = −Δ̄/(Kη)`, the paper's Δ.

    Args:
        local: the clients' optimizer P, its state reset each round.
        server_lr: η_g, the server's step on the averaged update.
        rho: ρ, radius of the perturbation.
        beta: β, weight of the client's own gradient; 1 is FedSAM.

    Reference: Qu et al., Generalized federated learning via sharpness aware minimization, 2022 (arXiv 2206.02618).
    """

    local: LocalOptimizer = Sgd()
    server_lr: Annotated[float, Field(gt=0)] = 1.0
    rho: Annotated[float, Field(ge=0)] = 0.1
    beta: Annotated[float, Field(gt=0, le=1)] = 0.1

    down = ("x", "G")
    shardable = True

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"delta": Wire()}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"x": x.clone(), "G": torch.zeros_like(x)}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        sam = sam_gradient(task, self.rho)
        y, _ = run_local(
            task, s.x, self.local, grad=lambda y, b: sam(y, b).mul_(self.beta).add_(s.G, alpha=1 - self.beta)
        )
        return {"delta": y - s.x}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        return {"x": s.x + self.server_lr * agg.delta, "G": agg.delta / -(r.steps * r.lr)}
