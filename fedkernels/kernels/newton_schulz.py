"""Newton–Schulz iteration for the orthogonal factor of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(u: Tensor, steps: int = 5) -> Tensor:
    """Approximate polar factor `U V^T` of every matrix in a batch, by an odd quintic polynomial.

    `X ← aX + b(XXᵀ)X + c(XXᵀ)²X` from `X = U/‖U‖_F`, which drives every singular value into about [0.7, 1.2].

    Args:
        u: `[..., rows, cols]`; computed in its own dtype; tall matrices are transposed, to work on the short side.
        steps: quintic steps.

    Example:
        >>> newton_schulz(torch.eye(2)).diagonal().round().tolist()
        [1.0, 1.0]

    Reference: Jordan et al., Muon, 2024 (https://kellerjordan.github.io/posts/muon/).
    """
    a, b, c = QUINTIC
    tall = u.shape[-2] > u.shape[-1]
    x = u.mT if tall else u
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    # In float32 the squares of entries beyond 1e19 overflow, and x / ∞ would be zero.
    wide = torch.linalg.matrix_norm(x, keepdim=True, dtype=torch.float64).to(x.dtype)
    x = x / (torch.where(norm.isinf(), wide, norm) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
