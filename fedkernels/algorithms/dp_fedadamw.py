"""DP-FedAdamW: FedAdamW's local work with client-level differential privacy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..contract import Algorithm, Round, Task, Vectors
from ..federated.local import run_local
from ..layout import Layout
from ..optim import AdamW
from ..wire import Wire


@dataclass(frozen=True, kw_only=True)
class DpFedAdamW(Algorithm):
    """AdamW clients with α times the global direction G, which is public: it comes from noised aggregates alone.

    Clients from `m = v = 0`: `y ← y − η(m̂/(√v̂ + ε) + αG + λy)`. Private is `r_i = (y_i − x) + αKηG`, the update
    without its public term, so the clip is not spent on that. Server `Δ = (Σ_i clip_C(r_i) + N(0, σ²C²I))/(qN) − αKηG`,
    `x ← x + Δ`, `G = −Δ/(Kη)`. Needs a `privacy` section.

    Of FedAdamW the shared second moment v̄ is left out. It would be a second private release: either it takes its part
    of C, and v, being a mean of squares, is far smaller than the noise on it, or it takes ε of its own. Corrections for
    noise in v are not needed then: each client's v is of its own clean gradients.

    Args:
        alpha: α, weight of the global direction; the local term is not scaled by 1 − α.
        beta1: β₁, decay of the first moment.
        beta2: β₂, decay of the second moment.
        eps: ε.
        weight_decay: λ, decoupled.

    Reference: FedAdamW, 2025 (arXiv 2510.27486), under the mechanism of McMahan et al., 2018 (arXiv 1710.06963).
    """

    alpha: Annotated[float, Field(ge=0)] = 0.5
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01

    down = ("x", "G")

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"r": Wire(private=True)}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"x": x.clone(), "G": torch.zeros_like(x)}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        adamw = AdamW(beta1=self.beta1, beta2=self.beta2, eps=self.eps, weight_decay=self.weight_decay)
        y, _ = run_local(task, s.x, adamw, alpha=self.alpha, G=s.G)
        return {"r": y - s.x + self._public(s, task.round)}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        delta = agg.r - self._public(s, r)
        return {"x": s.x + delta, "G": delta / -(r.steps * r.lr)}

    def _public(self, s: Vectors, r: Round) -> Tensor:
        """αKηG with the nominal K: a client's own number of steps may depend on its data."""
        return self.alpha * r.steps * r.lr * s.G
