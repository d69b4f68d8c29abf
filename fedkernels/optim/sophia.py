"""Sophia-G: momentum over a clipped diagonal of the Gauss–Newton matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from ..contract import Move
from ..kernels.rows import zero_rows
from ..layout import Layout, Route
from .steps import active_rows, step_along

FLOOR = 1e-15  # of the denominator


@dataclass(frozen=True, kw_only=True)
class Sophia:
    """Sophia with the Gauss–Newton–Bartlett estimate of the curvature.

    At local steps 1, 1 + T, 1 + 2T, …: `h ← β₂h + (1−β₂) B ĝ⊙ĝ`, with ĝ the gradient of the mean loss over B labels
    drawn from the model's own softmax, so that `E[B ĝ⊙ĝ]` is the diagonal of the Gauss–Newton matrix.
    h holds `B ĝ⊙ĝ`, as in Sophia's Algorithm 2, so that ρ does not depend on the batch size.
    At every step `m ← β₁m + (1−β₁)g`, `P = clip(m/(ρh), ±1) + λy`.

    Args:
        beta1: β₁, decay of the momentum.
        beta2: β₂, decay of the curvature.
        rho: ρ; the smaller, the more coordinates are clipped to their sign.
        weight_decay: λ, decoupled.
        hessian_every: T, local steps between estimates; each costs one more gradient.

    Reference: Liu et al., Sophia: A scalable stochastic second-order optimizer for language model pre-training, 2023
    (arXiv 2305.14342), Algorithms 2 and 3.
    """

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    rho: Annotated[float, Field(gt=0)] = 0.01
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    hessian_every: Annotated[int, Field(ge=1)] = 10

    shared: ClassVar[tuple[str, ...]] = ("h",)
    counters: ClassVar[tuple[str, ...]] = ()
    shardable: ClassVar[bool] = True
    route: ClassVar[Route] = "hidden"

    def init(self, y: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"m": zero_rows(y), "h": zero_rows(y)}

    def curvature_due(self, k: int) -> bool:
        return (k - 1) % self.hessian_every == 0

    def observe(self, state: dict[str, Tensor], g_hat: Tensor, labels: Tensor) -> None:
        state["h"].lerp_(labels * g_hat.square(), 1 - self.beta2)

    def step(self, state: dict[str, Tensor], g: Tensor, y: Tensor, k: int, layout: Layout, move: Move) -> None:
        with active_rows(move.active, [state["m"]]):
            m = state["m"].lerp_(g, 1 - self.beta1)
            p = m / (self.rho * state["h"]).clamp_(min=FLOOR)
        step_along(p.clamp_(-1, 1), y, move, weight_decay=self.weight_decay)
