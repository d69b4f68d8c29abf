"""FedACG: clients start where the server's momentum points, and are held there."""

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
class FedAcg(Algorithm):
    """Nesterov's look-ahead over rounds: the server sends `z = x + λm` in the place of x, and no momentum.

    Clients from `y = z`: `y ← y − η P(∇f_i(y) + β(y − z))`, `Δ_i = y − z`; server `m ← λm + Δ̄`, `x ← x + m`, which is
    the mean of the clients' models.

    Args:
        local: the clients' optimizer P, its state reset each round.
        momentum: λ, of the momentum and of the look-ahead alike.
        prox_beta: β, weight of the proximal term β/2 ‖y − z‖².

    Reference: Kim et al., Communication-efficient federated learning with accelerated client gradient, CVPR 2024
    (arXiv 2201.03172), Algorithm 1.
    """

    local: LocalOptimizer = Sgd()
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.85
    prox_beta: Annotated[float, Field(ge=0)] = 0.01

    down = ("z",)
    shardable = True

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"delta": Wire()}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"x": x.clone(), "m": torch.zeros_like(x), "z": x.clone()}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        prox = (lambda y, b: task.grad(y, b).add_(y - s.z, alpha=self.prox_beta)) if self.prox_beta else None
        y, _ = run_local(task, s.z, self.local, grad=prox)
        return {"delta": y - s.z}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        m = self.momentum * s.m + agg.delta
        x = s.x + m
        return {"x": x, "m": m, "z": x + self.momentum * m}
