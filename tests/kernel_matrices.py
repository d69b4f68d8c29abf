"""What the tests of kernels over matrices share: random matrices, spectra, the polynomial of the singular values."""

from __future__ import annotations

import torch
from kernel_rows import DEVICE
from torch import Tensor

from fedkernels.kernels.newton_schulz import POLAR_EXPRESS, Orthogonalization

SHAPES = [(1, 1), (1, 9), (9, 1), (2, 2), (3, 7), (7, 3), (5, 5), (33, 17), (16, 65)]
SPECTRA = ["gaussian", "log3", "log7", "rank16"]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def matrix_of(spectrum: str, rows: int = 256, cols: int = 1024) -> Tensor:
    """A matrix with the singular values of one, in float64: decades of them evenly in their logarithm, or 16 at all."""
    if spectrum == "gaussian":
        return random(rows, cols)
    if spectrum == "rank16":
        return random(rows, 16) @ random(16, cols, seed=1)
    left, s, right = torch.linalg.svd(random(rows, cols), full_matrices=False)
    return left * torch.logspace(0, -int(spectrum[3:]), len(s), dtype=s.dtype, device=s.device) @ right


def composed(s: Tensor, steps: int, method: Orthogonalization) -> Tensor:
    """The steps' polynomials, one of the other, of singular values."""
    for t in range(steps):
        if method == "newton_schulz":
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        elif t < 7:
            a, b, c = POLAR_EXPRESS[t]
            s = a * (s / 1.01) + b * (s / 1.01) ** 3 + c * (s / 1.01) ** 5
        else:
            s = (15 * s - 10 * s**3 + 3 * s**5) / 8
    return s


def oracle(u: Tensor, steps: int = 5, method: Orthogonalization = "newton_schulz") -> Tensor:
    """`U p⁽⁵⁾(S/‖S‖) Vᵀ` in float64: an odd polynomial of a matrix is that polynomial of its singular values."""
    left, s, right = torch.linalg.svd(u.double(), full_matrices=False)
    polar = method == "polar_express"
    s = s / (s.square().sum(-1, keepdim=True).sqrt() * (1.01 if polar else 1.0) + 1e-7)
    return left * composed(s, steps, method).unsqueeze(-2) @ right


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest of a batch, in the Frobenius norm."""
    assert found.shape == expected.shape
    error = torch.linalg.matrix_norm(found.double() - expected) / torch.linalg.matrix_norm(expected)
    return error.max().item()
