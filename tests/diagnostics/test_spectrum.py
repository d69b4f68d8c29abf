"""Lanczos and Hutchinson on matrices of known spectrum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diagnostics.dense import spectrum_matrix
from torch import Tensor

from fedkernels.diagnostics.spectrum import hutchinson, lanczos


def gaussian(d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(d, generator=generator, dtype=torch.float64).to(dtype)


def signs(d: int, seed: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: (2 * torch.randint(2, (d,), generator=generator) - 1).double()


@pytest.mark.parametrize(
    "eigenvalues",
    [
        [float(v) for v in np.linspace(-3, 5, 30)],
        [-2.0] * 5 + [0.0] * 10 + [1.0, 4.0, 4.0, 4.0],  # repeated, so that Krylov spaces end early
        [7.0],
        [3.0] * 6,
    ],
)
def test_d_iterations_give_the_whole_spectrum(eigenvalues: list[float]) -> None:
    h = spectrum_matrix(eigenvalues)
    ritz = lanczos(lambda v: h @ v, gaussian(len(eigenvalues)), len(eigenvalues), 0.0)
    np.testing.assert_allclose(ritz.values, sorted(eigenvalues), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-5])
def test_the_largest_eigenvalue_settles_within_its_residual(tolerance: float, dtype: torch.dtype) -> None:
    eigenvalues = [-20.0, *np.geomspace(1e-3, 8, 198).tolist(), 10.0]  # the largest is not the one farthest from 0
    h = spectrum_matrix(eigenvalues)
    ritz = lanczos(lambda v: h @ v.double(), gaussian(200, dtype=dtype), 200, tolerance)
    assert len(ritz.values) < 60
    assert ritz.residuals[-1] <= tolerance * 10
    assert abs(ritz.values[-1] - 10) <= ritz.residuals[-1] + 1e-6


def test_too_few_iterations_say_so() -> None:
    h = spectrum_matrix(np.linspace(0, 1, 100).tolist())
    ritz = lanczos(lambda v: h @ v, gaussian(100), 4, 1e-6)
    assert len(ritz.values) == 4
    assert ritz.residuals[-1] > 1e-6
    assert ritz.values[-1] < 1


def test_a_zero_matrix() -> None:
    ritz = lanczos(lambda v: torch.zeros_like(v), gaussian(5), 5, 1e-3)
    assert not ritz.values.any()


def test_the_trace_is_covered_at_its_level() -> None:
    """Intervals of ± 1.96 standard errors from 40 probes hold the trace in about 95 of 100 seeds."""
    d, probes, seeds = 30, 40, 400
    h = spectrum_matrix(np.linspace(-1, 4, d).tolist())
    found = [hutchinson(lambda v: h @ v, signs(d, seed), probes) for seed in range(seeds)]
    values, errors = np.array([[mean.value, mean.standard_error] for mean in found]).T
    covered = np.mean(np.abs(values - float(h.trace())) <= 1.96 * errors)
    assert 0.92 <= covered <= 0.97
    # Var zᵀHz = 2 Σ_{i≠j} H_ij² for Rademacher z; a Gaussian z would add 2 Σ H_ii².
    off_diagonal = float(h.square().sum() - h.diagonal().square().sum())
    assert np.mean(errors**2) == pytest.approx(2 * off_diagonal / probes, rel=0.03)
    assert values.std() == pytest.approx(np.sqrt(2 * off_diagonal / probes), rel=0.1)


def test_the_trace_of_a_diagonal_is_exact() -> None:
    h = torch.diag(torch.tensor([1.0, -2.0, 5.5], dtype=torch.float64))
    found = hutchinson(lambda v: h @ v, signs(3, 0), 2)
    assert (found.value, found.standard_error) == (4.5, 0.0)
