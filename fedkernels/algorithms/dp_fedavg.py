"""DP-FedAvg: FedAvg with client-level differential privacy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from ..contract import Algorithm, LocalOptimizer, Round, Task, Vectors
from ..federated.local import run_local
from ..layout import Layout
from ..optim import Sgd
from ..wire import Wire


@dataclass(frozen=True, kw_only=True)
class DpFedAvg(Algorithm):
    """Local SGD whose updates are clipped, summed and noised once; needs a `privacy` section.

    Clients `y ← y − η P(∇f_i(y))`; server `x ← x + η_g (Σ_i clip_C(Δ_i) + N(0, σ²C²I)) / (qN)`.

    Of the paper this is the estimator with a fixed divisor, flat clipping and equal weights. Left out are clipping per
    layer, which spends the same C less well, and weights by samples, which would make C one too.

    Args:
        local: the clients' optimizer P, its state reset each round.
        server_lr: η_g, the server's step on the released update.

    Reference: McMahan et al., Learning differentially private recurrent language models, 2018 (arXiv 1710.06963),
    Algorithm 1.
    """

    local: LocalOptimizer = Sgd()
    server_lr: Annotated[float, Field(gt=0)] = 1.0

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"delta": Wire(private=True)}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"x": x.clone()}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        y, _ = run_local(task, s.x, self.local)
        return {"delta": y - s.x}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        return {"x": s.x + self.server_lr * agg.delta}
