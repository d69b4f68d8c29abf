"""FedLESAM: sharpness-aware minimisation along a locally estimated global perturbation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..contract import Algorithm, LocalOptimizer, Round, Task, Vectors
from ..federated.local import ascent, run_local, shifted_gradient
from ..layout import Layout
from ..optim import Sgd
from ..wire import Wire


@dataclass(frozen=True, kw_only=True)
class FedLesam(Algorithm):
    """From the model a client received last time to the one it receives now is downhill for everyone; one gradient.

    Clients `y ← y − η P(∇f_i(y + e))` with `e = ρ(x_i − x)/(‖x_i − x‖ + ε)` for the whole round, then `x_i ← x`; a
    client's first round has `e = 0`. Server `x ← x + η_g Δ̄`.

    The published code differs: there every client takes the server's last update for `x − x_i`, divided by the sum of
    its tensors' norms. This is the paper's form.

    Args:
        local: the clients' optimizer P, its state reset each round.
        server_lr: η_g, the server's step on the averaged update.
        rho: ρ, radius of the perturbation.

    Reference: Fan et al., Locally estimated global perturbations are better than local perturbations for federated
    sharpness-aware minimization, 2024 (arXiv 2405.18890).
    """

    local: LocalOptimizer = Sgd()
    server_lr: Annotated[float, Field(gt=0)] = 1.0
    rho: Annotated[float, Field(ge=0)] = 0.1

    keep = ("x_i",)

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"delta": Wire()}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"x": x.clone()}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        # What a client keeps starts at zero, which no received model is.
        seen = k.x_i.any(1, keepdim=True)
        uphill = torch.where(seen, k.x_i - s.x, 0)
        y, _ = run_local(task, s.x, self.local, grad=shifted_gradient(task, uphill, ascent(uphill, self.rho)))
        k.x_i = s.x.expand_as(k.x_i)
        return {"delta": y - s.x}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        return {"x": s.x + self.server_lr * agg.delta}
