"""Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..contract import Move
from ..kernels.fused_adamw import fused_adamw
from ..kernels.rows import zero_rows
from ..layout import Layout, Route

_COUNTS = ("m_steps", "v_steps")


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW whose second moment may have a longer past than its first.

    `m ← β₁m + (1−β₁)g`, `v ← β₂v + (1−β₂)g²`, `P = m̂/(√v̂ + ε) + λy` with `m̂ = m/(1−β₁^k)` and
    `v̂ = v/(1−β₂^(k₀+k))`, where `k = state["m_steps"]` counts the steps of this round and `k₀ = state["v_steps"]` those
    that `v` has seen before it. Both counts stay on the device.

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
        counts = {name: torch.zeros(y.shape[0], 1, dtype=torch.float64, device=y.device) for name in _COUNTS}
        return {"m": zero_rows(y), "v": zero_rows(y), **counts}

    def step(self, state: dict[str, Tensor], g: Tensor, y: Tensor, k: int, layout: Layout, move: Move) -> None:
        self.step_runs(state, g, y, [(slice(None), slice(None))], move)

    def step_runs(
        self, state: dict[str, Tensor], g: Tensor, y: Tensor, runs: Iterable[tuple[slice, slice]], move: Move
    ) -> None:
        """Step some of the coordinates: `runs` are where they lie in `y` and `g [C, d]`, and where in `state`."""
        state["m_steps"].add_(1)
        for at, own in runs:
            fused_adamw(
                y[:, at],
                state["m"][:, own],
                state["v"][:, own],
                g[:, at],
                lr=move.lr,
                step=state["m_steps"],
                v_steps=state["v_steps"],
                beta1=self.beta1,
                beta2=self.beta2,
                eps=self.eps,
                weight_decay=self.weight_decay,
                share=move.share,
                alpha=move.alpha,
                G=move.on(at).G,
                active=move.active,
            )
