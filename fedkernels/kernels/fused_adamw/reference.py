"""Federated AdamW in plain PyTorch: what the kernels must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from ..steps import take_step


def fused_adamw_reference(
    y: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    lr: Tensor,
    step: Tensor,
    v_steps: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
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
    g = g.to(y.dtype)
    if scale is not None:
        g = g * scale.to(y.dtype).view(-1, 1)
    new_m = m.lerp(g, 1 - beta1)
    new_v = (v * beta2).addcmul_(g, g, value=1 - beta2)
    # In float64: 1 − β₂^k loses four digits in float32 at small k.
    k = step.double().view(-1, 1)
    correction1 = (1 - beta1**k).to(y.dtype)
    correction2 = (1 - beta2 ** (v_steps.double().view(-1, 1) + k)).to(y.dtype)
    p = (new_m / correction1) / ((new_v / correction2).sqrt() + eps) + weight_decay * start
    if active is not None:
        new_m, new_v = torch.where(active.view(-1, 1), new_m, m), torch.where(active.view(-1, 1), new_v, v)
    m.copy_(new_m)
    v.copy_(new_v)
    take_step(y, p, lr, share, alpha, G, active, start, x, delta)
