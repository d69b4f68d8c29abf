"""FedDyn: dynamic regularisation that moves the clients' optima to the global one."""

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
class FedDyn(Algorithm):
    """Every client keeps h_i, its estimate of ∇f_i where it ended, and takes it off its loss.

    Clients `y ← y − η P(∇f_i(y) − h_i + α(y − x))`, then `h_i ← h_i − α(y − x)`, which is ∇f_i(y) where y is optimal;
    server `h ← h − α(|S|/N)Δ̄`, `x ← x + Δ̄ − h/α`.

    Where nothing moves any more, every y is x, `h_i = ∇f_i(x)` and h, the mean of all h_i, is zero: x is stationary for
    the mean of all f_i, which no FedAvg with several local steps reaches. With clients weighted by samples h and x take
    the weighted mean Δ̄; if all clients train, the weighted mean of all f_i is then stationary.

    Args:
        local: the clients' optimizer P, its state reset each round.
        alpha: α, weight of the regulariser.

    Reference: Acar et al., Federated learning based on dynamic regularization, 2021 (arXiv 2111.04263), Algorithm 1,
    where h_i is written ∇L_k(θ_k) and N is m.
    """

    local: LocalOptimizer = Sgd()
    alpha: Annotated[float, Field(gt=0)] = 0.1

    keep = ("h_i",)
    shardable = True

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"delta": Wire()}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"x": x.clone(), "h": torch.zeros_like(x)}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        h_i = k.h_i
        y, _ = run_local(
            task, s.x, self.local, grad=lambda y, b: task.grad(y, b).sub_(h_i).add_(y - s.x, alpha=self.alpha)
        )
        delta = y - s.x
        k.h_i = h_i - self.alpha * delta
        return {"delta": delta}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        h = s.h - self.alpha * r.cohort / r.population * agg.delta  # over all N, not over the cohort
        return {"x": s.x + agg.delta - h / self.alpha, "h": h}
