"""Adam with decoupled weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..layout import Layout


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW whose second moment may have a longer past than its first.

    `m ← β₁m + (1−β₁)g`, `v ← β₂v + (1−β₂)g²`, `P = m̂/(√v̂ + ε) + λy` with `m̂ = m/(1−β₁^k)` and
    `v̂ = v/(1−β₂^(k₀+k))`, where `k₀ = state["v_steps"]` counts the steps `v` has seen before this round.

    Args:
        beta1: β₁, decay of the first moment.
        beta2: β₂, decay of the second moment.
        eps: ε.
        weight_decay: λ, decoupled.

    Reference: Loshchilov and Hutter, Decoupled weight decay regularization, 2019 (arXiv 1711.05101).
    """

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01

    shared: ClassVar[tuple[str, ...]] = ("v",)

    def init(self, y: Tensor, layout: Layout) -> dict[str, Tensor]:
        # The count is float64: 1 − β₂^k loses four digits in float32 at small k.
        steps = torch.zeros(y.shape[0], 1, dtype=torch.float64, device=y.device)
        return {"m": torch.zeros_like(y), "v": torch.zeros_like(y), "v_steps": steps}

    def step(self, state: dict[str, Tensor], g: Tensor, y: Tensor, k: int, layout: Layout) -> Tensor:
        m = state["m"].lerp_(g, 1 - self.beta1)
        v = state["v"].mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        correction = (1 - self.beta2 ** (state["v_steps"] + k)).to(y.dtype)
        denominator = (v / correction).sqrt_().add_(self.eps)
        return (m / (1 - self.beta1**k)).div_(denominator).add_(y, alpha=self.weight_decay)
