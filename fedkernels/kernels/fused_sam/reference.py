"""Norms and perturbations of sharpness-aware minimisation in plain PyTorch: what the kernels must equal."""

from __future__ import annotations

import torch
from torch import Tensor


def row_norm_reference(g: Tensor) -> Tensor:
    # In float64: squares of float32 values beyond 1e19 overflow, and below 1e-19 they vanish.
    dtype = g.dtype if g.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(g, dim=-1, dtype=torch.float64).to(dtype).view(-1)


def fused_sam_reference(
    w: Tensor,
    direction: Tensor,
    source: Tensor | None,
    saved: Tensor | None,
    coefficient: Tensor | None,
    rho: float,
    eps: float,
) -> None:
    start = w if source is None else source
    if saved is not None:
        saved.copy_(start)
    if coefficient is None:
        coefficient = rho / (row_norm_reference(direction) + eps)
    w.copy_(start + coefficient.to(w.dtype).view(-1, 1) * direction.to(w.dtype))
