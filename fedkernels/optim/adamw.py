"""Adam with decoupled weight decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..layout import Layout, Route


def adam_step(
    m: Tensor, v: Tensor, g: Tensor, *, beta1: float, beta2: float, eps: float, k: int | Tensor, seen: Tensor | int = 0
) -> Tensor:
    """One step of Adam without weight decay; updates `m` and `v` in place.

    `m ← β₁m + (1−β₁)g`, `v ← β₂v + (1−β₂)g²`, the result `m̂/(√v̂ + ε)` with `m̂ = m/(1−β₁^k)` and
    `v̂ = v/(1−β₂^(seen+k))`.

    Args:
        m, v, g: `[C, n]`.
        k: steps of `m` with this one, a number or `[C, 1]` float64.
        seen: steps that `v` had already seen when `m` was zero, a number or `[C, 1]` float64.
    """
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (v / _bias(beta2, seen + k, v)).sqrt_().add_(eps)
    return (m / _bias(beta1, k, m)).div_(denominator)


def _bias(beta: float, steps: float | Tensor, like: Tensor) -> float | Tensor:
    # Counts are float64: 1 − β^k loses four digits in float32 at small k.
    bias = 1 - beta**steps
    return bias.to(like.dtype) if isinstance(bias, Tensor) else bias


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
    counters: ClassVar[tuple[str, ...]] = ("v_steps",)
    shardable: ClassVar[bool] = True
    route: ClassVar[Route] = "hidden"

    def init(self, y: Tensor, layout: Layout) -> dict[str, Tensor]:
        steps = torch.zeros(y.shape[0], 1, dtype=torch.float64, device=y.device)
        return {"m": torch.zeros_like(y), "v": torch.zeros_like(y), "v_steps": steps}

    def step(self, state: dict[str, Tensor], g: Tensor, y: Tensor, k: int, layout: Layout) -> Tensor:
        betas = {"beta1": self.beta1, "beta2": self.beta2}
        p = adam_step(state["m"], state["v"], g, **betas, eps=self.eps, k=k, seen=state["v_steps"])
        return p.add_(y, alpha=self.weight_decay)
