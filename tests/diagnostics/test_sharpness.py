"""Sharpness of quadratics against its closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diagnostics.dense import Quadratic, spectrum_matrix

from fedkernels.diagnostics.sharpness import sam_sharpness

EIGENVALUES = [0.1, 0.5, 1.0, 1.5, 6.0]
G = torch.tensor([0.3, -0.2, 0.1, 0.5, 0.05], dtype=torch.float64)


def no_draw() -> Any:
    raise AssertionError("a direction was drawn where there is a gradient")


@pytest.mark.parametrize("rho", [0.01, 0.3, 5.0])
def test_a_convex_quadratic(rho: float) -> None:
    h = spectrum_matrix(EIGENVALUES)
    f: Any = Quadratic(h, G)
    x = torch.zeros(5, dtype=torch.float64)
    found = sam_sharpness(f, x, rho, 200, no_draw)
    unit = G / G.norm()
    assert found.one_step == pytest.approx(float(rho * G.norm() + rho**2 / 2 * unit @ h @ unit), rel=1e-12)
    assert found.ascent == pytest.approx(f.highest_rise(rho), rel=1e-6)
    assert found.one_step <= found.ascent <= rho * float(G.norm()) + rho**2 / 2 * 6.0


def test_along_the_top_eigenvector_one_step_reaches_the_bound() -> None:
    h = spectrum_matrix(EIGENVALUES)
    top = torch.linalg.eigh(h).eigenvectors[:, -1]
    f: Any = Quadratic(h, 0.4 * top)
    found = sam_sharpness(f, torch.zeros(5, dtype=torch.float64), 0.2, 3, no_draw)
    bound = 0.2 * 0.4 + 0.2**2 / 2 * 6.0
    assert found.one_step == pytest.approx(bound, rel=1e-12)
    assert found.ascent == pytest.approx(bound, rel=1e-12)


def test_at_the_minimum_the_ascent_finds_the_top_eigenvector() -> None:
    f: Any = Quadratic(spectrum_matrix(EIGENVALUES), torch.zeros(5, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(5, dtype=torch.float64)
    found = sam_sharpness(f, x, 0.2, 200, lambda: torch.randn(5, generator=generator, dtype=torch.float64))
    assert found.ascent == pytest.approx(0.2**2 / 2 * 6.0, rel=1e-6)


def test_the_centre_is_where_the_model_is() -> None:
    h = spectrum_matrix(EIGENVALUES)
    x = torch.arange(5, dtype=torch.float64)
    there: Any = Quadratic(h, G)
    at_zero: Any = Quadratic(h, G + h @ x)  # the same rises, moved to 0
    found = sam_sharpness(there, x, 0.3, 50, no_draw)
    moved = sam_sharpness(at_zero, torch.zeros_like(x), 0.3, 50, no_draw)
    assert found.one_step == pytest.approx(moved.one_step, rel=1e-10)
    assert found.ascent == pytest.approx(moved.ascent, rel=1e-10)


def test_a_peak_inside_the_ball_is_found_there() -> None:
    curvature = torch.diag(torch.tensor([-10.0, -4.0], dtype=torch.float64))
    f: Any = Quadratic(curvature, torch.tensor([1.0, 0.2], dtype=torch.float64))
    x = torch.zeros(2, dtype=torch.float64)
    peak = (1.0**2 / 10 + 0.2**2 / 4) / 2  # at (0.1, 0.05)
    found = sam_sharpness(f, x, 0.15, 60, no_draw)
    assert found.one_step < 0.8 * peak
    assert found.ascent == pytest.approx(peak, rel=1e-3)


def test_no_point_outside_the_ball_is_looked_at() -> None:
    class Watched(Quadratic):
        farthest = 0.0

        def __call__(self, x: torch.Tensor) -> float:
            self.farthest = max(self.farthest, float(x.norm()))
            return super().__call__(x)

    f: Any = Watched(spectrum_matrix(EIGENVALUES), G)
    sam_sharpness(f, torch.zeros(5, dtype=torch.float64), 0.3, 20, no_draw)
    assert f.farthest == pytest.approx(0.3, rel=1e-12)
