"""What the fused optimizer steps share: the step along a direction in plain PyTorch, and checks of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import require, require_rows, require_scalars


def take_step(
    y: Tensor,
    p: Tensor,
    lr: Tensor,
    share: float,
    alpha: float,
    G: Tensor | None,
    active: Tensor | None,
    start: Tensor,
    x: Tensor | None,
    delta: Tensor | None,
) -> None:
    """`y ← start − η (share · p + α G)` where active and `y ← start` elsewhere; then `delta ← y − x`."""
    p = share * p if G is None else share * p + alpha * G
    moved = start - lr.to(y.dtype).view(-1, 1) * p
    y.copy_(moved if active is None else torch.where(active.view(-1, 1), moved, start))
    if x is not None and delta is not None:
        delta.copy_(y - x)


def check_step(
    y: Tensor,
    g: Tensor,
    lr: Tensor,
    G: Tensor | None,
    scale: Tensor | None,
    active: Tensor | None,
    source: Tensor | None,
    x: Tensor | None,
    delta: Tensor | None,
) -> None:
    """Refuse what a kernel cannot take.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, is not contiguous where it has to be, or lacks its
            companion.
    """
    if y.dim() != 2:
        raise ValueError(f"y has shape {list(y.shape)}, expected [C, d]")
    clients, d = y.shape
    require_rows("y", y, y, (clients, d), written=True)
    narrow = (torch.bfloat16,) if y.dtype == torch.float32 else ()
    require_rows("g", g, y, (clients, d), y.dtype, *narrow)
    require("G", G, y, (d,), y.dtype)
    require("active", active, y, (clients,), torch.bool)
    require_rows("source", source, y, (clients, d), y.dtype)
    require("x", x, y, (d,), y.dtype)
    require_rows("delta", delta, y, (clients, d), y.dtype, written=True)
    require_scalars("lr", lr, y, clients)
    require_scalars("scale", scale, y, clients)
    if (x is None) != (delta is None):
        raise ValueError(f"{'x' if x is None else 'delta'} is missing: delta = y − x needs both")
