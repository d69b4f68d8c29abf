"""How much the loss can rise within a small ball."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .loss import SampleLoss


@dataclass(frozen=True)
class Sharpness:
    """Rises of the loss in the ball; `ascent` is never below `one_step`."""

    one_step: float
    ascent: float


def sam_sharpness(loss: SampleLoss, x: Tensor, rho: float, steps: int, draw: Callable[[], Tensor]) -> Sharpness:
    """`max f(x+ε) − f(x)` over `‖ε‖₂ ≤ ρ`, from below: by SAM's one step, and by projected gradient ascent from there.

    One step: `ε = ρ ∇f(x)/‖∇f(x)‖`. Ascent: `ε ← Π_ρ(ε + s ∇f(x+ε)/‖∇f(x+ε)‖)` where that rises, else `s ← s/2`, from
    `s = ρ` on. For a convex f the full step never falls.

    Args:
        loss: f.
        x: the centre, `[d]`.
        rho: ρ.
        steps: of the ascent.
        draw: a random vector `[d]`, the direction to start in where the gradient vanishes.

    Reference: Foret et al., Sharpness-aware minimization for efficiently improving generalization, 2021
    (arXiv 2010.01412), eq. 2.
    """

    def step(e: Tensor, length: float) -> Tensor:
        g = loss.gradient((x + e).to(x.dtype))
        if not g.any():
            g = draw().double()
        e = e + length / torch.linalg.vector_norm(g) * g
        return e * (rho / torch.linalg.vector_norm(e)).clamp(max=1)

    base, length = loss(x), rho
    e = step(torch.zeros_like(x, dtype=torch.float64), length)
    one_step = best = loss((x + e).to(x.dtype)) - base
    for _ in range(steps):
        tried = step(e, length)
        rise = loss((x + tried).to(x.dtype)) - base
        if rise > best:
            e, best = tried, rise
        else:
            length /= 2
    return Sharpness(one_step, best)
