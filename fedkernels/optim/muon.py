"""Muon: momentum orthogonalised by Newton–Schulz."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels.newton_schulz import newton_schulz
from ..layout import Layout
from .adamw import AdamW


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon on the layout's matrices, AdamW on everything else.

    `M ← βM + (1−β)g`, `U = (1−β)g + βM` (Nesterov), `O = NS₅(U)·√max(1, out/in)`, `P = ηₘ O + λy`.

    Args:
        lr_multiplier: ηₘ, the learning rate of the matrices relative to that of the other parameters.
        adamw_beta2, adamw_eps: of the AdamW that trains embeddings, norms, biases and the output head.

    Raises:
        ValueError: the model has no matrix.

    Reference: Jordan et al., Muon, 2024.
    """

    momentum: float = 0.95
    weight_decay: float = 0.01
    lr_multiplier: float = 1.0
    ns_steps: int = 5
    adamw_beta1: float = 0.9
    adamw_beta2: float = 0.95
    adamw_eps: float = 1e-10

    shared: ClassVar[tuple[str, ...]] = ("M",)

    def _adamw(self) -> AdamW:
        return AdamW(beta1=self.adamw_beta1, beta2=self.adamw_beta2, eps=self.adamw_eps, weight_decay=self.weight_decay)

    def init(self, y: Tensor, layout: Layout) -> dict[str, Tensor]:
        if not layout.slabs:
            raise ValueError("Muon needs matrices, but no parameter of this model is one; use adamw or sgd")
        return {"M": torch.zeros_like(layout.matrices(y)), **self._adamw().init(layout.vectors(y), layout)}

    def step(self, state: dict[str, Tensor], g: Tensor, y: Tensor, k: int, layout: Layout) -> Tensor:
        g_matrices, y_matrices = layout.matrices(g), layout.matrices(y)
        momentum = state["M"].lerp_(g_matrices, 1 - self.momentum)
        u = torch.lerp(g_matrices, momentum, self.momentum)
        p = torch.empty_like(u)
        for slab in layout.slabs:
            run = slice(slab.matrix_start, slab.matrix_stop)
            batch = u[:, run].unflatten(1, (slab.count, slab.rows, slab.cols))
            p[:, run] = newton_schulz(batch, self.ns_steps).mul_(slab.scale * self.lr_multiplier).flatten(1)
        p.add_(y_matrices, alpha=self.weight_decay)
        return layout.merge(p, self._adamw().step(state, layout.vectors(g), layout.vectors(y), k, layout))
