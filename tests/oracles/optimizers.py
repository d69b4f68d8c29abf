"""Local optimizers on named tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .federation import Direction, Federation, Named


def newton_schulz(u: Tensor, steps: int = 5) -> Tensor:
    """Quintic steps on one matrix."""
    if u.shape[0] > u.shape[1]:
        return newton_schulz(u.T, steps).T
    o = u / (u.square().sum().sqrt() + 1e-7)
    for _ in range(steps):
        a = o @ o.T
        o = 3.4445 * o - 4.7750 * a @ o + 2.0315 * a @ a @ o
    return o


def polar_express(u: Tensor) -> Tensor:
    """Five quintics, composed on the singular values; arXiv 2505.16932, Algorithm 1."""
    left, s, right = torch.linalg.svd(u, full_matrices=False)
    s = s / (1.01 * s.square().sum().sqrt() + 1e-7)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    ):
        t = s / 1.01
        s = a * t + b * t**3 + c * t**5
    return left * s @ right


def truncated(f: Federation, name: str, m: Tensor, rho: float) -> Tensor:
    """A parameter as a matrix of rank `max(1, ⌊ρmn/(m+n+1)⌋)`; unchanged where that saves nothing."""
    matrix = as_matrix(f, name, m)
    rows, cols = matrix.shape
    rank = max(1, int(rho * rows * cols / (rows + cols + 1)))
    if rank * (rows + cols + 1) >= rows * cols:
        return m
    _, vectors = torch.linalg.eigh(matrix.T @ matrix)
    leading = vectors[:, -rank:]
    return from_matrix(f, name, matrix @ leading @ leading.T, m)


def as_matrix(f: Federation, name: str, u: Tensor) -> Tensor:
    """One parameter as a matrix `(out, in)`."""
    if name in f.transposed:
        return u.T
    return u[0] if name in f.tokens else u.flatten(1)


def from_matrix(f: Federation, name: str, matrix: Tensor, like: Tensor) -> Tensor:
    return (matrix.T if name in f.transposed else matrix).reshape(like.shape)


def orthogonalised(
    f: Federation, name: str, u: Tensor, orthogonal: Callable[[Tensor], Tensor] = newton_schulz
) -> Tensor:
    """`NS₅(u)·√max(1, out/in)` of one parameter as a matrix `(out, in)`."""
    matrix = as_matrix(f, name, u)
    o = orthogonal(matrix) * math.sqrt(max(1, matrix.shape[0] / matrix.shape[1]))
    return from_matrix(f, name, o, u)


def sgd(f: Federation, *, momentum: float = 0.0, decay: float = 0.0) -> Direction:
    m = f.zeros()

    def direction(y: Named, g: Named, k: int) -> Named:
        for n in y:
            m[n] = momentum * m[n] + g[n] + decay * y[n]
        return dict(m)

    return direction


def adamw(
    f: Federation,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    decay: float = 0.01,
    v: Named | None = None,
    seen: float = 0,
) -> Direction:
    """`v` is updated in place; it has seen that many steps."""
    m = f.zeros()
    v = f.zeros() if v is None else v

    def direction(y: Named, g: Named, k: int) -> Named:
        p = {}
        for n in y:
            m[n] = betas[0] * m[n] + (1 - betas[0]) * g[n]
            v[n] = betas[1] * v[n] + (1 - betas[1]) * g[n] ** 2
            m_hat, v_hat = m[n] / (1 - betas[0] ** k), v[n] / (1 - betas[1] ** (seen + k))
            p[n] = m_hat / (v_hat.sqrt() + eps) + decay * y[n]
        return p

    return direction


def muon(
    f: Federation,
    *,
    beta: float = 0.98,
    decay: float = 0.01,
    multiplier: float = 1.0,
    M: Named | None = None,
    orthogonal: Callable[[Tensor], Tensor] = newton_schulz,
) -> Direction:
    """`M` is updated in place."""
    M = f.zeros() if M is None else M
    other = adamw(f, betas=(0.9, 0.95), eps=1e-10, decay=decay)

    def direction(y: Named, g: Named, k: int) -> Named:
        p = other(y, g, k)
        for n in f.hidden:
            M[n] = beta * M[n] + (1 - beta) * g[n]
            u = (1 - beta) * g[n] + beta * M[n]
            p[n] = multiplier * orthogonalised(f, n, u, orthogonal) + decay * y[n]
        return p

    return direction


# The same options for the package and for the oracles.
ADAMW_OPTIONS = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-4, "weight_decay": 0.3}
ORACLE_ADAMW_OPTIONS = {"betas": (0.8, 0.95), "eps": 1e-4, "decay": 0.3}
MUON_OPTIONS = {"beta": 0.9, "lr_multiplier": 0.5, "weight_decay": 0.3}
ORACLE_MUON_OPTIONS = {"beta": 0.9, "multiplier": 0.5, "decay": 0.3}
