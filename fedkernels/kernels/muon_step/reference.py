"""Muon's step on matrices in plain PyTorch: what the kernels must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from ..newton_schulz.reference import newton_schulz_reference


def muon_step_reference(
    y: Tensor,
    M: Tensor,
    g: Tensor,
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    scale: float,
    share: float,
    alpha: float,
    G: Tensor | None,
    active: Tensor | None,
    coefficients: list[float],
    margin: float,
) -> None:
    per_client = (-1, 1, 1, 1)
    moved = torch.lerp(M, g, 1 - momentum)
    o = newton_schulz_reference(torch.lerp(g, moved, momentum), coefficients, margin)
    p = share * (scale * o + weight_decay * y)
    new = y - lr.to(y.dtype).view(per_client) * (p if G is None else p + alpha * G)
    M.copy_(moved if active is None else torch.where(active.view(per_client), moved, M))
    y.copy_(new if active is None else torch.where(active.view(per_client), new, y))
