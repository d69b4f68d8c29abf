"""Federated SGD in plain PyTorch: what the kernels must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from ..steps import take_step


def fused_sgd_reference(
    y: Tensor,
    m: Tensor | None,
    g: Tensor,
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    share: float,
    alpha: float,
    G: Tensor | None,
    scale: Tensor | None,
    active: Tensor | None,
    source: Tensor | None,
    x: Tensor | None,
    delta: Tensor | None,
) -> None:
    start = y if source is None else source
    p = g.to(y.dtype)
    if scale is not None:
        p = p * scale.to(y.dtype).view(-1, 1)
    p = p + weight_decay * start
    if m is not None:
        p = momentum * m + p
        m.copy_(p if active is None else torch.where(active.view(-1, 1), p, m))
    take_step(y, p, lr, share, alpha, G, active, start, x, delta)
