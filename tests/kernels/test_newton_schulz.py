"""Newton–Schulz against its scalar polynomial on the singular values, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedkernels.kernels.newton_schulz import newton_schulz

SHAPES = [(1, 1), (1, 9), (9, 1), (2, 2), (3, 7), (7, 3), (5, 5), (33, 17), (16, 65)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def reference(u: Tensor, steps: int = 5) -> Tensor:
    """`U p⁽⁵⁾(S/‖S‖) Vᵀ`: an odd polynomial of a matrix is that polynomial of its singular values."""
    left, s, right = torch.linalg.svd(u.double(), full_matrices=False)
    s = s / (s.square().sum(-1, keepdim=True).sqrt() + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return left * s.unsqueeze(-2) @ right


def assert_equal(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_equals_the_polynomial_of_the_singular_values(shape: tuple[int, int], lead: tuple[int, ...]) -> None:
    u = random(*lead, *shape)
    kept = u.clone()
    o = newton_schulz(u)
    assert o.shape == u.shape
    assert_equal(o, reference(u))
    assert torch.equal(u, kept)


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_steps(steps: int) -> None:
    assert_equal(newton_schulz(random(4, 6), steps), reference(random(4, 6), steps))


@pytest.mark.parametrize("shape", SHAPES)
def test_float32(shape: tuple[int, int]) -> None:
    o = newton_schulz(random(*shape, dtype=torch.float32))
    assert o.dtype == torch.float32
    # A small singular value is multiplied by up to 3.4445⁵ ≈ 500, and with it the rounding of 6e-8.
    assert_equal(o, reference(random(*shape, dtype=torch.float32)), 500 * 6e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_commutes_with_transposition(shape: tuple[int, int]) -> None:
    u = random(*shape)
    assert_equal(newton_schulz(u.mT), newton_schulz(u).mT)


def test_works_on_the_short_side() -> None:
    """A tall matrix costs what its transpose costs: `n²(2m + n)` multiply-adds a step, n the short side."""
    for shape in ((3, 50), (50, 3)):
        with FlopCounterMode(display=False) as counter:
            newton_schulz(random(*shape))
        assert counter.get_total_flops() == 5 * 2 * 3 * 3 * (2 * 50 + 3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_stays_zero(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert torch.equal(newton_schulz(torch.zeros(2, *shape, dtype=dtype)), torch.zeros(2, *shape, dtype=dtype))


@pytest.mark.parametrize("rank", [1, 2])
def test_rank_deficient(rank: int) -> None:
    u = random(6, rank) @ random(rank, 4, seed=1)
    o = newton_schulz(u)
    assert_equal(o, reference(u))
    assert torch.linalg.matrix_rank(o, rtol=1e-10) == rank


@pytest.mark.parametrize("scale", [1e-100, 1e-8, 1e-3, 1e3, 1e100])
def test_scales(scale: float) -> None:
    """Tiny inputs, below the 1e-7 that guards the division, stay tiny."""
    assert_equal(newton_schulz(scale * random(4, 6)), reference(scale * random(4, 6)))


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e15])
def test_the_scale_of_a_large_input_is_divided_out(scale: float) -> None:
    u = 1e5 * random(5, 8)
    assert_equal(newton_schulz(scale * u), newton_schulz(u), 1e-7)


@pytest.mark.parametrize("scale", [1e18, 1e20, 1e35])
@pytest.mark.parametrize("shape", [(1, 1), (5, 8)])
def test_squares_that_overflow_float32(shape: tuple[int, int], scale: float) -> None:
    u = (scale * random(*shape)).float()
    both = torch.stack([u, random(*shape).float()])  # one that overflows beside one that does not
    assert_equal(newton_schulz(both), reference(both), 500 * 6e-8)


def test_one_matrix_of_a_batch_ignores_the_others() -> None:
    u = random(4, 3, 5)
    other = u.clone()
    other[1:] *= 1e6
    assert torch.equal(newton_schulz(u)[0], newton_schulz(other)[0])


@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (20, 8)])
def test_singular_values_end_near_one(shape: tuple[int, int]) -> None:
    """In [0.68, 1.21] for condition numbers up to 20, as any one of that many values in [1/60, 1] does."""
    left, _, right = torch.linalg.svd(random(*shape), full_matrices=False)
    s = torch.logspace(-math.log10(20), 0, min(shape), dtype=torch.float64)
    found = torch.linalg.svdvals(newton_schulz(left * s @ right))
    assert found.min() > 0.68
    assert found.max() < 1.21
