"""FedAdamW: AdamW clients with a global direction and a shared, block-averaged second moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..contract import Algorithm, Round, Task, Vectors
from ..federated.local import run_local
from ..layout import Layout
from ..optim import AdamW
from ..wire import Wire


@dataclass(frozen=True, kw_only=True)
class FedAdamW(Algorithm):
    """Clients start from the mean second moment v̄ of the last cohort and add α times the global direction G.

    Clients from `v = v̄` in every block: `m ← β₁m + (1−β₁)g`, `v ← β₂v + (1−β₂)g²`,
    `y ← y − η(m̂/(√v̂ + ε) + αG + λy)` with `m̂ = m/(1−β₁^k)` and `v̂ = v/(1−β₂^(t+k))`.
    Server `x ← x + Δ̄`, `G = −Δ̄/(Kη)`, `v̄ = mean v` over clients and blocks, `t ← t + K`, the steps v̄ has seen: rK
    where every round has clients and all of them take K steps.

    As in the paper's equations t is one for all coordinates. One (or a block) whose gradient is first nonzero in a late
    round has a v as if it had always been there, and takes a step of up to `√((1−β₂^t)/(1−β₂))` times η.

    Args:
        alpha: α, weight of the global direction; the local term is not scaled by 1 − α.
        beta1: β₁, decay of the first moment.
        beta2: β₂, decay of the second moment.
        eps: ε.
        weight_decay: λ, decoupled.
        second_moment: what of v travels: `hessian` one value per curvature block, `tensor` one per tensor, `full` all
            of it, `none` nothing (v restarts at zero).

    Reference: FedAdamW: A communication-efficient optimizer with convergence and generalization guarantees for
    federated large models, 2025 (arXiv 2510.27486).
    """

    alpha: Annotated[float, Field(ge=0)] = 0.5
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    second_moment: Literal["hessian", "tensor", "full", "none"] = "hessian"

    shardable = True

    @property
    def down(self) -> tuple[str, ...]:
        return ("x", "G") if self.second_moment == "none" else ("x", "G", "v_bar", "t")

    def up(self, layout: Layout) -> dict[str, Wire]:
        wires = {"delta": Wire()}
        if self.second_moment == "full":
            wires["v"] = Wire(state=True)
        elif self.second_moment != "none":
            wires["v"] = Wire(layout.curvature_blocks(self.second_moment).size, state=True)
        return wires

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        state = {"x": x.clone(), "G": torch.zeros_like(x)}
        if self.second_moment != "none":
            state["v_bar"] = x.new_zeros(self.up(layout)["v"].size(layout))
            state["t"] = x.new_zeros(1, dtype=torch.float64)
        return state

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        adamw = AdamW(beta1=self.beta1, beta2=self.beta2, eps=self.eps, weight_decay=self.weight_decay)
        state = {}
        if self.second_moment != "none":
            v_bar = s.v_bar
            if self.second_moment != "full":
                v_bar = task.layout.curvature_blocks(self.second_moment).expand(v_bar)
            # v has seen t steps when this round starts, m none: two counters, or m stays almost uncorrected.
            state = {"v": v_bar, "v_steps": s.t}
        y, end = run_local(task, s.x, adamw, state=state, alpha=self.alpha, G=s.G)
        up = {"delta": y - s.x}
        if self.second_moment == "full":
            up["v"] = end["v"]
        elif self.second_moment != "none":
            up["v"] = task.layout.curvature_blocks(self.second_moment).mean(end["v"])
        return up

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        new = {"x": s.x + agg.delta, "G": agg.delta / -(r.steps * r.lr)}
        return new if self.second_moment == "none" else {**new, "v_bar": agg.v, "t": s.t + r.steps}
