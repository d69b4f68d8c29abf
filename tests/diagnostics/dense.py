"""What diagnostics measure, computed the slow way: named tensors, whole Hessians, float64."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from support import tiny_data, tiny_model
from torch import Tensor, nn
from torch.func import functional_call

from fedkernels.layout import Layout


class DenseLoss:
    """A model's mean loss of some tiny samples, as a function of the flat vector of a layout."""

    def __init__(self, layout: Layout, indices: np.ndarray, module: nn.Module | None = None) -> None:
        self.entries = layout.entries
        self.module = module or tiny_model()
        data = tiny_data()
        self.inputs = (data.train_inputs[indices].double() / 255 - 0.4) / 0.3
        self.targets = data.train_targets[indices]

    def __call__(self, x: Tensor) -> Tensor:
        named = {entry.name: x[entry.start : entry.stop].view(entry.shape) for entry in self.entries}
        return F.cross_entropy(functional_call(self.module, named, (self.inputs,)), self.targets)

    def hessian(self, x: Tensor) -> Tensor:
        return torch.autograd.functional.hessian(self, x)  # type: ignore[no-untyped-call]


class Quadratic:
    """`½ xᵀHx + gᵀx` with what `SampleLoss` has."""

    def __init__(self, h: Tensor, g: Tensor) -> None:
        self.h, self.g = h, g

    def __call__(self, x: Tensor) -> float:
        return float(x @ self.h @ x / 2 + self.g @ x)

    def gradient(self, x: Tensor) -> Tensor:
        return self.h @ x + self.g

    def highest_rise(self, rho: float) -> float:
        """The maximum of `½ eᵀHe + gᵀe` over `‖e‖ ≤ ρ` for a positive definite H, by its secular equation.

        At the maximum `(μI − H)e = g` with `μ > λ_max` and `‖e‖ = ρ`.
        """
        values, vectors = torch.linalg.eigh(self.h)
        g = vectors.T @ self.g
        low, high = float(values[-1]), float(values[-1]) + float(g.norm()) / rho
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if float((g / (middle - values)).norm()) > rho else (low, middle)
        e = vectors @ (g / (high - values))
        assert math.isclose(float(e.norm()), rho, rel_tol=1e-9)
        return self(e)


def spectrum_matrix(eigenvalues: list[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    d = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T
