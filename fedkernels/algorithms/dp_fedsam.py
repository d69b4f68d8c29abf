"""DP-FedSAM: sharpness-aware clients with client-level differential privacy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from ..contract import Algorithm, Round, Task, Vectors
from ..federated.local import run_local, sam_gradient
from ..layout import Layout
from ..optim import Sgd
from ..wire import Wire


@dataclass(frozen=True, kw_only=True)
class DpFedSam(Algorithm):
    """Clients take gradients at the worst point of a ρ-ball; flatter models lose less to clip and noise.

    Clients `y ← y − η ∇f_i(y + ρ g/‖g‖)` with `g = ∇f_i(y)` on the same batch; server
    `x ← x + (Σ_i clip_C(Δ_i) + N(0, σ²C²I)) / (qN)`. Needs a `privacy` section.

    Left out is the paper's DP-FedSAM-top_k, which sends the largest coordinates only.

    Args:
        rho: ρ, the radius of the perturbation.

    Reference: Shi et al., Make landscape flatter in differentially private federated learning, 2023
    (arXiv 2303.11242), Algorithm 1.
    """

    rho: Annotated[float, Field(ge=0)] = 0.5

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"delta": Wire(private=True)}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"x": x.clone()}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        y, _ = run_local(task, s.x, Sgd(), grad=sam_gradient(task, self.rho))
        return {"delta": y - s.x}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        return {"x": s.x + agg.delta}
