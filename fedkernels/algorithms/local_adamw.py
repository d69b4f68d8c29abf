"""Local AdamW: the baseline that averages the parameters of AdamW clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from ..contract import Algorithm, Round, Task, Vectors, Wire
from ..federated.local import run_local
from ..layout import Layout
from ..optim import AdamW


@dataclass(frozen=True, kw_only=True)
class LocalAdamW(Algorithm):
    """AdamW at the clients with moments reset each round, plain averaging at the server.

    Clients `m ← β₁m + (1−β₁)g`, `v ← β₂v + (1−β₂)g²`, `y ← y − η(m̂/(√v̂ + ε) + λy)`; server `x ← x + Δ̄`.

    Args:
        beta1: β₁, decay of the first moment.
        beta2: β₂, decay of the second moment.
        eps: ε.
        weight_decay: λ, decoupled.

    References: FedAvg of McMahan et al., 2017 (arXiv 1602.05629) around Loshchilov and Hutter, Decoupled weight decay
    regularization, 2019 (arXiv 1711.05101).
    """

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"delta": Wire()}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"x": x.clone()}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        adamw = AdamW(beta1=self.beta1, beta2=self.beta2, eps=self.eps, weight_decay=self.weight_decay)
        y, _ = run_local(task, s.x, adamw)
        return {"delta": y - s.x}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        return {"x": s.x + agg.delta}
