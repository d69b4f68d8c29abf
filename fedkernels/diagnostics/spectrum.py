"""Eigenvalues and trace of a symmetric matrix that is known by its products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""`H v [d]` in float64, from `v [d]`."""


@dataclass(frozen=True)
class Ritz:
    """Lanczos' approximate eigenvalues.

    Args:
        values: ascending, `[iterations]`.
        residuals: `‖Hu − θu‖` of each; an eigenvalue of H lies within it.
    """

    values: np.ndarray
    residuals: np.ndarray


def lanczos(product: Product, draw: Callable[[], Tensor], iterations: int, tolerance: float) -> Ritz:
    """Lanczos with full reorthogonalisation, until the largest eigenvalue has settled.

    `H Q_k = Q_k T_k + β_k q_{k+1} e_kᵀ` with tridiagonal `T_k = S Θ Sᵀ`; the Ritz value θ_j has residual
    `β_k |S_{kj}|`.
    Where the Krylov space ends early, as it does at repeated eigenvalues, the recursion goes on from a new random
    vector: d iterations give the whole spectrum.

    Args:
        product: H.
        draw: a random vector `[d]`; its dtype is that of the stored basis, inner products are float64.
        iterations: most products with H, `k ≤ d`.
        tolerance: stop when the residual of the largest θ is less than this fraction of |θ|; 0 to go on to the end.

    Example:
        >>> h = torch.diag(torch.tensor([1.0, 2.0, 2.0, 5.0], dtype=torch.float64))
        >>> generator = torch.Generator().manual_seed(0)
        >>> draw = lambda: torch.randn(4, generator=generator, dtype=torch.float64)
        >>> lanczos(lambda v: h @ v, draw, 4, 0.0).values.round(6).tolist()
        [1.0, 2.0, 2.0, 5.0]
    """
    basis: list[Tensor] = []
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    q = draw()
    q = q / _norm(q)
    for k in range(1, min(iterations, q.numel()) + 1):
        basis.append(q)
        w = product(q)
        diagonal.append(float(w @ q.double()))
        w = _orthogonal(w, basis)
        beta = float(_norm(w))
        values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1))
        ritz = Ritz(values, beta * np.abs(vectors[-1]))
        if ritz.residuals[-1] < tolerance * abs(values[-1]) or k == q.numel():
            break
        if beta <= math.sqrt(q.numel()) * torch.finfo(q.dtype).eps * np.abs(values).max():
            beta, w = 0.0, _orthogonal(draw().double(), basis)
        q = (w / _norm(w)).to(q.dtype)
        off_diagonal.append(beta)
    return ritz


@dataclass(frozen=True)
class Mean:
    """A sample mean with its standard error."""

    value: float
    standard_error: float


def hutchinson(product: Product, draw: Callable[[], Tensor], probes: int) -> Mean:
    """`tr H = E zᵀHz`, the mean over probes z, with its standard error.

    Args:
        product: H.
        draw: a vector of independent ±1 (Rademacher), `[d]`; for them the variance is `2 Σ_{i≠j} H_ij²`.
        probes: how many, at least 2.
    """
    forms = np.array([float(product(z) @ z.double()) for z in (draw() for _ in range(probes))])
    return Mean(float(forms.mean()), float(forms.std(ddof=1) / math.sqrt(probes)))


def _orthogonal(w: Tensor, basis: list[Tensor]) -> Tensor:
    """`w [d]` (overwritten) without its part in the basis; twice, as once leaves the rounding of cancellation."""
    for _ in range(2):
        for q in basis:
            q64 = q.double()
            w.sub_(q64 * (w @ q64))
    return w


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dtype=torch.float64)
