"""Stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from ..contract import Move
from ..kernels.fused_sgd import fused_sgd
from ..kernels.rows import zero_rows
from ..layout import Layout, Route


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """SGD with L2 weight decay and optional heavy-ball momentum.

    `m ← μm + g + λy`, `P = m` (without momentum `P = g + λy`).

    Args:
        momentum: μ.
        weight_decay: λ, coupled: it enters the momentum.

    Example:
        >>> import torch
        >>> g, y = torch.ones(1, 2), torch.ones(1, 2)
        >>> Sgd(weight_decay=0.5).step({}, g, y, 1, Layout({}, {}), Move(torch.tensor(0.5)))
        >>> y.tolist()
        [[0.25, 0.25]]
    """

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0

    shared: ClassVar[tuple[str, ...]] = ()
    counters: ClassVar[tuple[str, ...]] = ()
    shardable: ClassVar[bool] = True
    route: ClassVar[Route] = "hidden"

    def init(self, y: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"m": zero_rows(y)} if self.momentum else {}

    def step(self, state: dict[str, Tensor], g: Tensor, y: Tensor, k: int, layout: Layout, move: Move) -> None:
        fused_sgd(
            y,
            state.get("m"),
            g,
            lr=move.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            share=move.share,
            alpha=move.alpha,
            G=move.G,
            active=move.active,
        )
