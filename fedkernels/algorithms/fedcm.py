"""FedCM: the last cohort's mean direction as momentum of every client."""

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
class FedCm(Algorithm):
    """Clients mix their own gradient with the global direction of the last round; they keep nothing.

    Clients `y ← y − η(α P(∇f_i(y)) + (1−α) G)`; server `x ← x + η_g Δ̄`, `G = −Δ̄/(Kη)`. G is the paper's Δ_t: zero
    before the first round, so that the first update is α times that of FedAvg.

    Args:
        local: the clients' optimizer P, its state reset each round.
        alpha: α, the share of a client's own direction.
        server_lr: η_g, the server's step on the averaged update (the paper's divided by Kη).

    Reference: Xu et al., FedCM: Federated learning with client-level momentum, 2021 (arXiv 2106.10874), Algorithm 2.
    """

    local: LocalOptimizer = Sgd()
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.1
    server_lr: Annotated[float, Field(gt=0)] = 1.0

    down = ("x", "G")
    shardable = True

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"delta": Wire()}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"x": x.clone(), "G": torch.zeros_like(x)}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        y, _ = run_local(task, s.x, self.local, share=self.alpha, alpha=1 - self.alpha, G=s.G)
        return {"delta": y - s.x}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        return {"x": s.x + self.server_lr * agg.delta, "G": agg.delta / -(r.steps * r.lr)}
