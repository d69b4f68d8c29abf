"""FedGAMMA: sharpness-aware minimisation with SCAFFOLD's control variates."""

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
class FedGamma(Algorithm):
    """Control variates of sharpness-aware gradients, so that clients head for one flat region; each keeps `c_i`.

    Clients `y ← y − η(g̃ − c_i + c)`, `g̃ = ∇f_i(y + ρ g/(‖g‖ + ε))` with the client's own `g = ∇f_i(y)`, then
    `c_i⁺ = c_i − c + (x − y)/(Kη)`; server `x ← x + η_g Δ̄`, `c ← c + (|S|/N)·mean(c_i⁺ − c_i)`.

    The mean of Δ is weighted as the run says. That of c_i⁺ − c_i is not, so that `c` stays the plain mean of all c_i.

    Args:
        local: the clients' optimizer; plain SGD is the paper's, and the one for which `c_i` is a mean gradient.
        server_lr: the global step size η_g.
        rho: ρ, radius of the perturbation.

    Reference: Dai et al., FedGAMMA: Federated learning with global sharpness-aware minimization, IEEE TNNLS 2023
    (doi 10.1109/TNNLS.2023.3304453).
    """

    local: LocalOptimizer = Sgd()
    server_lr: Annotated[float, Field(gt=0)] = 1.0
    rho: Annotated[float, Field(ge=0)] = 0.1

    down = ("x", "c")
    keep = ("c_i",)
    shardable = True

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"delta": Wire(), "delta_c": Wire(reduce="sum")}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"x": x.clone(), "c": torch.zeros_like(x)}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        sam, correction = sam_gradient(task, self.rho), s.c - k.c_i
        y, _ = run_local(task, s.x, self.local, grad=lambda y, b: sam(y, b).add_(correction))
        delta = y - s.x
        delta_c = -s.c - delta / (task.steps * task.lr)  # c_i⁺ − c_i, SCAFFOLD's option II
        k.c_i = k.c_i + delta_c
        return {"delta": delta, "delta_c": delta_c}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        # |S|/N times the mean is the sum over N.
        return {"x": s.x + self.server_lr * agg.delta, "c": s.c + agg.delta_c / r.population}
