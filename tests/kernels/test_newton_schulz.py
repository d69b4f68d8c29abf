"""Newton–Schulz against its scalar polynomial on the singular values, in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from kernel_matrices import SHAPES, composed, oracle, random
from kernel_rows import WIDE
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedkernels.kernels.newton_schulz import POLAR_EXPRESS
from fedkernels.kernels.newton_schulz import newton_schulz as kernel


@pytest.fixture(params=WIDE)
def newton_schulz(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """The op on each backend that computes in full precision."""
    return functools.partial(kernel, backend=request.param)


def assert_equal(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_equals_the_polynomial_of_the_singular_values(
    shape: tuple[int, int], lead: tuple[int, ...], newton_schulz: Callable[..., Tensor]
) -> None:
    u = random(*lead, *shape)
    kept = u.clone()
    o = newton_schulz(u)
    assert o.shape == u.shape
    assert_equal(o, oracle(u))
    assert torch.equal(u, kept)


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_steps(steps: int, newton_schulz: Callable[..., Tensor]) -> None:
    assert_equal(newton_schulz(random(4, 6), steps), oracle(random(4, 6), steps))


@pytest.mark.parametrize("shape", SHAPES)
def test_float32(shape: tuple[int, int], newton_schulz: Callable[..., Tensor]) -> None:
    o = newton_schulz(random(*shape, dtype=torch.float32))
    assert o.dtype == torch.float32
    # A small singular value is multiplied by up to 3.4445⁵ ≈ 500, and with it the rounding of 6e-8.
    assert_equal(o, oracle(random(*shape, dtype=torch.float32)), 500 * 6e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_commutes_with_transposition(shape: tuple[int, int], newton_schulz: Callable[..., Tensor]) -> None:
    u = random(*shape)
    assert_equal(newton_schulz(u.mT), newton_schulz(u).mT)


def test_works_on_the_short_side() -> None:
    """A tall matrix costs what its transpose costs: `n²(2m + n)` multiply-adds a step, n the short side."""
    for shape in ((3, 50), (50, 3)):
        with FlopCounterMode(display=False) as counter:
            kernel(random(*shape), backend="reference")
        assert counter.get_total_flops() == 5 * 2 * 3 * 3 * (2 * 50 + 3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_stays_zero(shape: tuple[int, int], dtype: torch.dtype, newton_schulz: Callable[..., Tensor]) -> None:
    assert torch.equal(newton_schulz(torch.zeros(2, *shape, dtype=dtype)), torch.zeros(2, *shape, dtype=dtype))


@pytest.mark.parametrize("rank", [1, 2])
def test_rank_deficient(rank: int, newton_schulz: Callable[..., Tensor]) -> None:
    u = random(6, rank) @ random(rank, 4, seed=1)
    o = newton_schulz(u)
    assert_equal(o, oracle(u))
    assert torch.linalg.matrix_rank(o, rtol=1e-10) == rank


@pytest.mark.parametrize("scale", [1e-100, 1e-8, 1e-3, 1e3, 1e100])
def test_scales(scale: float, newton_schulz: Callable[..., Tensor]) -> None:
    """Tiny inputs, below the 1e-7 that guards the division, stay tiny."""
    assert_equal(newton_schulz(scale * random(4, 6)), oracle(scale * random(4, 6)))


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e15])
def test_the_scale_of_a_large_input_is_divided_out(scale: float, newton_schulz: Callable[..., Tensor]) -> None:
    u = 1e5 * random(5, 8)
    assert_equal(newton_schulz(scale * u), newton_schulz(u), 1e-7)


@pytest.mark.parametrize("scale", [1e18, 1e20, 1e35])
@pytest.mark.parametrize("shape", [(1, 1), (5, 8)])
def test_squares_that_overflow_float32(
    shape: tuple[int, int], scale: float, newton_schulz: Callable[..., Tensor]
) -> None:
    u = (scale * random(*shape)).float()
    both = torch.stack([u, random(*shape).float()])  # one that overflows beside one that does not
    assert_equal(newton_schulz(both), oracle(both), 500 * 6e-8)


def test_one_matrix_of_a_batch_ignores_the_others(newton_schulz: Callable[..., Tensor]) -> None:
    u = random(4, 3, 5)
    other = u.clone()
    other[1:] *= 1e6
    assert torch.equal(newton_schulz(u)[0], newton_schulz(other)[0])


@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (20, 8)])
def test_singular_values_end_near_one(shape: tuple[int, int], newton_schulz: Callable[..., Tensor]) -> None:
    """In [0.68, 1.21] for condition numbers up to 20, as any one of that many values in [1/60, 1] does."""
    left, _, right = torch.linalg.svd(random(*shape), full_matrices=False)
    s = torch.logspace(-math.log10(20), 0, min(shape), dtype=torch.float64)
    found = torch.linalg.svdvals(newton_schulz(left * s @ right))
    assert found.min() > 0.68
    assert found.max() < 1.21


# Polar Express


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 5, 7, 10])
def test_polar_express_equals_its_polynomials_of_the_singular_values(
    shape: tuple[int, int], steps: int, newton_schulz: Callable[..., Tensor]
) -> None:
    u = random(3, *shape)
    assert_equal(newton_schulz(u, steps, "polar_express"), oracle(u, steps, "polar_express"))
    # A small singular value is multiplied by up to the product of all a, and with it the rounding of 6e-8.
    growth = math.prod(a for a, _, _ in POLAR_EXPRESS[:5])
    assert_equal(
        newton_schulz(u.float(), steps, "polar_express"), oracle(u.float(), steps, "polar_express"), growth * 6e-8
    )


def minimax(low: float, high: float) -> tuple[float, float, float]:
    """The odd quintic nearest to 1 on an interval: Remez exchange of its four points of largest error."""
    q, r = (3 * low + high) / 4, (low + 3 * high) / 4
    for _ in range(100):
        points = np.array([low, q, r, high])
        columns = np.stack([points, points**3, points**5, [1.0, -1.0, 1.0, -1.0]], axis=1)
        a, b, c, _ = np.linalg.solve(columns, np.ones(4))
        # The zeros of the derivative a + 3bx² + 5cx⁴.
        root = math.sqrt(9 * b * b - 20 * a * c)
        q, r = sorted(math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
    return a, b, c


def test_polar_express_coefficients_are_the_optimal_ones() -> None:
    """Section 4 of the paper from [1e-3, 1] on.

    Where an interval is wide, the polynomial is that of a narrower one, of the cushion of its appendix G, and scaled so
    that the interval it maps to is centred at 1.
    """
    low, high, cushion = 1e-3, 1.0, 0.02407327424182761
    for published in POLAR_EXPRESS[:6]:
        start = max(low, cushion * high)
        a, b, c = minimax(start, high)
        least, most = (a * x + b * x**3 + c * x**5 for x in (low, high))
        scale = 2 / (least + most)
        np.testing.assert_allclose((scale * a, scale * b, scale * c), published, rtol=1e-6)
        low, high = scale * least, 2 - scale * least


def test_polar_express_ends_in_the_published_interval() -> None:
    """Without the safety factor five steps take [1e-3, 1] to [0.876, 1.124]; with it the lower end gives way."""
    spectrum = torch.logspace(-3, 0, 20_001, dtype=torch.float64)
    exact = spectrum
    for a, b, c in POLAR_EXPRESS[:5]:
        exact = a * exact + b * exact**3 + c * exact**5
    assert float(exact.min()) == pytest.approx(0.8764, abs=1e-4)
    assert float(exact.max()) == pytest.approx(1.1236, abs=1e-4)
    safe = composed(spectrum / 1.01, 5, "polar_express")
    assert float(safe.min()) > 0.84
    assert float(safe.max()) < 1.13


@pytest.mark.parametrize("condition", [20, 1e2, 1e3])
@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (20, 8)])
def test_polar_express_beats_the_quintic(
    shape: tuple[int, int], condition: float, newton_schulz: Callable[..., Tensor]
) -> None:
    left, _, right = torch.linalg.svd(random(*shape), full_matrices=False)
    s = torch.logspace(-math.log10(condition), 0, min(shape), dtype=torch.float64)
    s = torch.where(s / (s.norm() * 1.01) > 1e-3, s, 1.1e-3 * s.norm())
    quintic, polar = (
        torch.linalg.svdvals(newton_schulz(left * s @ right, 5, method))
        for method in ("newton_schulz", "polar_express")
    )
    assert polar.min() > 0.84
    assert polar.max() < 1.13
    assert (polar - 1).abs().max() < 0.7 * (quintic - 1).abs().max()
    converged = torch.linalg.svdvals(newton_schulz(left * s @ right, 9, "polar_express"))
    torch.testing.assert_close(converged, torch.ones_like(converged), rtol=0, atol=1e-6)
