"""Stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..layout import Layout


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """SGD with L2 weight decay and optional heavy-ball momentum.

    `m ← μm + g + λy`, `P = m` (without momentum `P = g + λy`).
    """

    momentum: float = 0.0
    weight_decay: float = 0.0

    shared: ClassVar[tuple[str, ...]] = ()

    def init(self, y: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(y)} if self.momentum else {}

    def step(self, state: dict[str, Tensor], g: Tensor, y: Tensor, k: int, layout: Layout) -> Tensor:
        if self.weight_decay:
            g = g.add(y, alpha=self.weight_decay)
        return state["m"].mul_(self.momentum).add_(g) if self.momentum else g
