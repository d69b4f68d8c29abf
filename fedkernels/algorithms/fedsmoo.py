"""FedSMOO: dynamic regularisation with perturbations that agree across clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..contract import Algorithm, Batch, LocalOptimizer, Round, Task, Vectors
from ..federated.local import rescale_, run_local
from ..layout import Layout
from ..optim import Sgd
from ..wire import Wire


@dataclass(frozen=True, kw_only=True)
class FedSmoo(Algorithm):
    """Two consensus problems by their dual variables: one of the models, one of the perturbations.

    Clients, at every step with `g = ∇f_i(y)` and `v = g − μ_i − s`, where μ_i outlives the round:
    `ŝ = ρ v/(‖v‖ + ε)`, `μ_i ← μ_i + ŝ − s`, `y ← y − η P(∇f_i(y + ŝ) + (y − x + h_i)/β)`;
    then `h_i ← h_i + y − x`, and `s̃_i = μ_i − ŝ` with the last ŝ is sent.
    Server `h ← h + (|S|/N)·Δ̄`, `x ← x + Δ̄ + h`, `s = ρ s̃/(‖s̃‖ + ε)` with `s̃ = mean s̃_i`.

    `h_i = −βλ_i` and `h = −βλ` are the paper's dual variables λ in units of parameters, as the published code has
    them. That code drops ŝ from s̃_i as small; this is the paper's form. With clients weighted by samples h takes the
    weighted mean Δ̄, and is then not the plain mean of all h_i.

    Args:
        local: the clients' optimizer P, its state reset each round; plain SGD is the paper's.
        rho: ρ, radius of the perturbation, the paper's r.
        beta: β, inverse weight of the penalty `‖y − x‖²/(2β)`.

    Reference: Sun et al., Dynamic regularized sharpness aware minimization in federated learning: Approaching global
    consistency and smooth landscape, 2023 (arXiv 2305.11584), Algorithm 1.
    """

    local: LocalOptimizer = Sgd()
    rho: Annotated[float, Field(ge=0)] = 0.1
    beta: Annotated[float, Field(gt=0)] = 10.0

    down = ("x", "s")
    keep = ("h_i", "mu_i")

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"delta": Wire(), "s_tilde": Wire(state=True)}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"x": x.clone(), "h": torch.zeros_like(x), "s": torch.zeros_like(x)}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        h_i, mu_i = k.h_i, k.mu_i.clone()
        s_hat, ascended = torch.zeros_like(mu_i), torch.empty_like(mu_i)

        def gradient(y: Tensor, batch: Batch) -> Tensor:
            fresh = rescale_(task.grad(y, batch).sub_(mu_i).sub_(s.s), self.rho, eps=1e-7)
            # Clients without a step left keep the μ_i and ŝ of their last.
            live = slice(None) if batch.active is None else batch.active
            s_hat[live] = fresh[live]
            mu_i[live] += fresh[live] - s.s
            torch.add(y, fresh, out=ascended)
            return task.grad(ascended, batch).add_(y - s.x + h_i, alpha=1 / self.beta)

        y, _ = run_local(task, s.x, self.local, grad=gradient)
        delta = y - s.x
        k.h_i, k.mu_i = h_i + delta, mu_i
        return {"delta": delta, "s_tilde": mu_i - s_hat}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        h = s.h + r.cohort / r.population * agg.delta
        return {"x": s.x + agg.delta + h, "h": h, "s": rescale_(agg.s_tilde.clone(), self.rho, eps=1e-7)}
