"""FedLADA: locally adaptive steps, amended by the last cohort's mean direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..contract import Algorithm, Move, Round, Task, Vectors
from ..federated.local import run_local
from ..kernels.rows import zero_rows
from ..layout import Layout, Route
from ..optim.steps import active_rows, step_along
from ..wire import Wire


@dataclass(frozen=True, kw_only=True)
class AmsGrad:
    """The local optimizer of FedLADA: AMSGrad without bias correction, and without ε, which is where v̂ starts.

    `m ← β₁m + (1−β₁)g`, `v ← β₂v + (1−β₂)g²`, `v̂ ← max(v̂, v)`, `P = m/√v̂`.

    Args:
        beta1: β₁, decay of the first moment.
        beta2: β₂, decay of the second moment.

    Reference: Reddi et al., On the convergence of Adam and beyond, 2018 (arXiv 1904.09237).
    """

    beta1: float
    beta2: float

    shared: ClassVar[tuple[str, ...]] = ("v", "v_hat")
    counters: ClassVar[tuple[str, ...]] = ()
    shardable: ClassVar[bool] = True
    route: ClassVar[Route] = "hidden"

    def init(self, y: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {name: zero_rows(y) for name in ("m", "v", "v_hat")}

    def step(self, state: dict[str, Tensor], g: Tensor, y: Tensor, k: int, layout: Layout, move: Move) -> None:
        m, v, v_hat = state["m"], state["v"], state["v_hat"]
        with active_rows(move.active, [m, v, v_hat]):
            m.lerp_(g, 1 - self.beta1)
            v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            p = m / torch.maximum(v_hat, v, out=v_hat).sqrt()
        step_along(p, y, move)


@dataclass(frozen=True, kw_only=True)
class FedLada(Algorithm):
    """Clients start from the mean second moment v̂ of the last cohort and add its mean direction G to each step.

    Clients from `m = 0`, `v = v̂ = v̄`: `m ← β₁m + (1−β₁)g`, `v ← β₂v + (1−β₂)g²`, `v̂ ← max(v̂, v)`,
    `y ← y − η(α m/√v̂ + (1−α) G)`. Server `x ← x + η_g Δ̄`, `G = −Δ̄/(Kη)` (the paper's g_a), `v̄ = mean v̂`.

    v̄ starts at ε² and no coordinate of it ever falls below that, so nothing is added to the denominator.

    Args:
        alpha: α, the share of a client's own step.
        beta1: β₁, decay of the first moment.
        beta2: β₂, decay of the second moment.
        eps: ε.
        server_lr: η_g, the server's step on the averaged update.

    Reference: Sun et al., Efficient federated learning via local adaptive amended optimizer with linear speedup, 2023
    (arXiv 2308.00522).
    """

    alpha: Annotated[float, Field(gt=0, le=1)] = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    eps: Annotated[float, Field(gt=0)] = 1e-8
    server_lr: Annotated[float, Field(gt=0)] = 1.0

    down = ("x", "G", "v_bar")
    shardable = True

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"delta": Wire(), "v_hat": Wire(state=True)}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"x": x.clone(), "G": torch.zeros_like(x), "v_bar": torch.full_like(x, self.eps**2)}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        amsgrad = AmsGrad(beta1=self.beta1, beta2=self.beta2)
        state = {"v": s.v_bar, "v_hat": s.v_bar}
        y, end = run_local(task, s.x, amsgrad, state=state, share=self.alpha, alpha=1 - self.alpha, G=s.G)
        return {"delta": y - s.x, "v_hat": end["v_hat"]}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        return {
            "x": s.x + self.server_lr * agg.delta,
            "G": agg.delta / -(r.steps * r.lr),
            "v_bar": agg.v_hat.clamp(min=self.eps**2),  # the mean may round below
        }
