"""Newton–Schulz of every backend on a GPU against the polynomial of the singular values in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_matrices import SHAPES, SPECTRA, matrix_of, oracle, random, relative_error
from kernel_rows import DEVICE

from fedkernels.kernels.muon_step import muon_step
from fedkernels.kernels.newton_schulz import Orthogonalization, newton_schulz, newton_schulz_all
from fedkernels.kernels.newton_schulz.reference import schedule

BACKENDS = ["cuda", "triton"]
# Sides that no tile divides, on both sides of the limits of Triton's one program and of clusters of blocks.
ODD = [(127, 129), (129, 128), (131, 257), (192, 768), (255, 256), (256, 1023), (1023, 253)]
LIMIT = {"cuda": 1e-2, "triton": 1e-2}
LIMIT_OF_FEW = {"cuda": 1e-2, "triton": 2e-2}  # singular values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["newton_schulz", "polar_express"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("sides", ODD)
def test_spectra(backend: str, method: Orthogonalization, spectrum: str, sides: tuple[int, int]) -> None:
    u = matrix_of(spectrum, *sides)
    found = newton_schulz(u.float()[None], 5, method, backend=backend)[0]
    assert relative_error(found, oracle(u, 5, method)) < LIMIT[backend]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [*SHAPES, (17, 300), (300, 17)])
def test_small_and_thin(backend: str, shape: tuple[int, int]) -> None:
    u = random(3, 2, *shape)
    assert relative_error(newton_schulz(u.float(), backend=backend), oracle(u)) < LIMIT_OF_FEW[backend]


@pytest.mark.parametrize("backend", BACKENDS)
def test_matrices_with_gaps_between_them(backend: str) -> None:
    whole = random(3, 2 * 131 * 150 + 7, dtype=torch.float32)
    u = whole[:, 7:].unflatten(1, (2, 131, 150))
    assert relative_error(newton_schulz(u, backend=backend), oracle(u)) < LIMIT[backend]


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_tiny_zero_and_not_finite(backend: str) -> None:
    """A matrix of any scale touches no other of its batch."""
    given = random(5, 130, 140, dtype=torch.float32)
    for c, factor in enumerate((1e30, 1e-30, 1.0, 0.0, torch.nan)):
        given[c] *= factor
    found = newton_schulz(given, backend=backend)
    assert relative_error(found[:3], oracle(given[:3])) < LIMIT[backend]
    assert not found[3].any()
    assert found[4].isnan().any()


def test_all_matrices_of_a_model() -> None:
    """Those of CUDA C++ in one launch, by profile, beside those of Triton."""
    us = [random(*shape, dtype=torch.float32) for shape in ((2, 192, 192), (20, 300), (192, 768), (300, 130))]
    newton_schulz_all(us)  # compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        found = newton_schulz_all(us)
        torch.cuda.synchronize()
    for u, o in zip(us, found, strict=True):
        assert relative_error(o, oracle(u)) < LIMIT["cuda"]
    assert sum(event.count for event in profile.key_averages() if "newton_schulz_kernel" in event.key) == 1


@pytest.mark.parametrize("shapes", [[(3, 4)], [(2, 130, 150), (150, 130), (2, 0, 4)]])
def test_opcheck(shapes: list[tuple[int, ...]]) -> None:
    us = [random(*shape, dtype=torch.float32) for shape in shapes]
    torch.library.opcheck(torch.ops.fedkernels.newton_schulz_cuda.default, (us, *schedule("newton_schulz", 2)))


def test_muon_takes_what_is_fastest_for_its_matrices() -> None:
    """Short sides of 129 to 256 by CUDA C++, others by Triton: by profile, and in float64."""
    for sides, kernel in (((130, 150), "newton_schulz_kernel"), ((40, 150), "small_kernel")):
        y, M, g = (random(2, 3, *sides, seed=seed, dtype=torch.float32) for seed in range(3))
        moved = torch.lerp(M.double(), g.double(), 0.1)
        expected = y.double() - 0.1 * oracle(torch.lerp(g.double(), moved, 0.9))
        start = y.double()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            muon_step(y, M, g, lr=torch.tensor(0.1, device=DEVICE), momentum=0.9)
            torch.cuda.synchronize()
        assert relative_error(y.double() - start, expected - start) < LIMIT["cuda"]
        names = [event.key for event in profile.key_averages()]
        assert any(kernel in name for name in names), names
