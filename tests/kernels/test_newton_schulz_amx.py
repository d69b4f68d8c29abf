"""Newton–Schulz and Muon's step in AMX tiles: by the instructions where they are, by their emulation everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_matrices import SPECTRA, matrix_of, oracle, random, relative_error
from kernel_rows import scalar
from torch import Tensor

from fedkernels.kernels.dispatch import INTERPRETED
from fedkernels.kernels.muon_step import muon_step
from fedkernels.kernels.newton_schulz import Orthogonalization, newton_schulz

pytestmark = pytest.mark.skipif(INTERPRETED, reason="this is the CPU's kernel")

CPUINFO = Path("/proc/cpuinfo")
HERE = CPUINFO.exists() and "amx_bf16" in CPUINFO.read_text()
UNITS = ["emulated", *(["1"] if HERE else [])]
METHODS: list[Orthogonalization] = ["newton_schulz", "polar_express"]
# Of the norm of the result, five steps; measured are 0.11 % at most, on matrices of rank 16.
BOUND = 2e-3
# Both sides of every border: of a tile, of a block, of nearly square and wide.
SHAPES = [(32, 32), (33, 47), (47, 33), (64, 64), (63, 65), (65, 97), (40, 200), (200, 40), (130, 257), (192, 192)]


@pytest.fixture(params=UNITS)
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FEDKERNELS_AMX", request.param)
    return str(request.param)


def float32(u: Tensor, monkeypatch: pytest.MonkeyPatch, steps: int = 5) -> Tensor:
    """What products of float32 make of it."""
    with monkeypatch.context() as patch:
        patch.delenv("FEDKERNELS_AMX")
        return newton_schulz(u, steps, backend="cpp")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(192, 192), (192, 768), (256, 1024), (768, 192), (97, 203), (33, 47)])
def test_spectra(shape: tuple[int, int], spectrum: str, method: Orthogonalization, unit: str) -> None:
    u = matrix_of(spectrum, *shape).float().cpu()
    assert relative_error(newton_schulz(u, 5, method, backend="cpp"), oracle(u, 5, method)) <= BOUND


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("shape", [(60, 90), (64, 64), (192, 40)])
def test_low_ranks(shape: tuple[int, int], rank: int, method: Orthogonalization, unit: str) -> None:
    """What is nearly zero grows most, and few singular values are a short result to compare it with."""
    for seed in range(5):
        u = (random(shape[0], rank, seed=seed) @ random(rank, shape[1], seed=seed + 9)).float().cpu()
        assert relative_error(newton_schulz(u, 5, method, backend="cpp"), oracle(u, 5, method)) <= 1e-2


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: tuple[int, int], unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Gaussian matrices, whose errors are 25 times below the bound for all spectra."""
    u = random(2, *shape, dtype=torch.float32).cpu()
    kept = u.clone()
    o = newton_schulz(u, backend="cpp")
    assert relative_error(o, oracle(u)) <= 2e-4
    assert not torch.equal(o, float32(u, monkeypatch))  # or nothing was tested
    assert torch.equal(u, kept)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("shape", [(36, 40), (36, 100)])
def test_steps(shape: tuple[int, int], steps: int, unit: str) -> None:
    u = random(*shape, dtype=torch.float32).cpu()
    assert relative_error(newton_schulz(u, steps, backend="cpp"), oracle(u, steps)) <= 2e-4


def test_a_matrix_keeps_16_bits(unit: str) -> None:
    """No step is the split and its undoing: u/‖u‖ to 2⁻¹⁷ of each element, the rounding of the lower part."""
    u = random(40, 70, dtype=torch.float32).cpu()
    exact = oracle(u, 0)
    assert ((newton_schulz(u, 0, backend="cpp").double() - exact).abs() <= 1.02 * 2.0**-17 * exact.abs()).all()


@pytest.mark.parametrize("shape", [(17, 17), (31, 100), (100, 31), (31, 31)])
def test_short_sides_below_a_block_and_float64_are_left_as_they_are(
    shape: tuple[int, int], unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    u = random(2, *shape, dtype=torch.float32).cpu()
    assert torch.equal(newton_schulz(u, backend="cpp"), float32(u, monkeypatch))
    wide = random(40, 50).cpu()
    assert torch.equal(newton_schulz(wide, backend="cpp"), float32(wide, monkeypatch))


@pytest.mark.parametrize("asked", ["", "0"])
def test_not_asked_for(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    u = random(2, 50, 70, dtype=torch.float32).cpu()
    monkeypatch.setenv("FEDKERNELS_AMX", asked)
    assert torch.equal(newton_schulz(u, backend="cpp"), float32(u, monkeypatch))
    assert relative_error(newton_schulz(u, backend="cpp"), oracle(u)) <= 1e-5


@pytest.mark.parametrize("shape", [(32, 32), (40, 90), (90, 40), (129, 140)])
def test_zero_stays_zero(shape: tuple[int, int], unit: str) -> None:
    u = torch.zeros(2, *shape)
    assert torch.equal(newton_schulz(u, backend="cpp"), u)


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1.0, 1e19, 1e30, 1e38])
@pytest.mark.parametrize("shape", [(40, 45), (40, 90), (90, 40)])
def test_scales(shape: tuple[int, int], scale: float, unit: str) -> None:
    """Beside a matrix of another scale."""
    u = torch.stack([random(*shape) * scale / 8, random(*shape, seed=1)]).float().cpu()
    o, expected = newton_schulz(u, backend="cpp"), oracle(u)
    if scale < 1e-20:  # far below the 1e-7 of the division, so that it stays tiny
        assert o[0].abs().max().item() <= 1e-18
        o, expected = o[1:], expected[1:]
    assert relative_error(o, expected) <= 2e-4


@pytest.mark.parametrize("poison", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800000, -0x00800000])
@pytest.mark.parametrize("shape", [(40, 45), (40, 90), (90, 40)])
def test_what_is_not_finite_stays_in_its_matrix(shape: tuple[int, int], poison: int, unit: str) -> None:
    """NaN of any payload, which a rounding might carry over into a number, and infinities."""
    u = random(3, *shape, dtype=torch.float32).cpu()
    clean = newton_schulz(u, 2, backend="cpp")
    u[1].view(torch.int32)[-1, 2] = poison
    o = newton_schulz(u, 2, backend="cpp")
    assert torch.equal(o[::2], clean[::2])
    assert o[1].isnan().all()


@pytest.mark.parametrize("shape", [(40, 45), (40, 90), (90, 40)])
def test_what_grows_without_bound_stays_in_its_matrix(shape: tuple[int, int], unit: str) -> None:
    """Under coefficients nobody would choose; a thread takes one matrix after the other through the same memory."""
    u = torch.stack([random(*shape, dtype=torch.float32).cpu(), torch.zeros(shape)])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        o = torch.ops.fedkernels.newton_schulz_cpp(u, [50.0, 50.0, 50.0] * 6, 1.0)
    finally:
        torch.set_num_threads(before)
    assert o[0].isnan().any()
    assert torch.equal(o[1], u[1])


@pytest.mark.parametrize("shape", [(40, 40), (40, 140), (140, 40), (100, 101)])
def test_bits_depend_neither_on_the_batch_nor_on_the_threads(shape: tuple[int, int], unit: str) -> None:
    """Threads share matrices, or the panels of one matrix where there are fewer of them."""
    u = random(3, *shape, dtype=torch.float32).cpu()
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found += [newton_schulz(u, backend="cpp"), torch.stack([newton_schulz(m, backend="cpp") for m in u])]
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other, found[0])


@pytest.mark.skipif(not HERE, reason="no AMX here")
@pytest.mark.parametrize("shape", [(32, 32), (65, 97), (40, 200), (192, 192)])
def test_the_emulation_gives_the_bits_of_the_instructions(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    u, found = random(*shape, dtype=torch.float32).cpu(), []
    for asked in ("1", "emulated"):
        monkeypatch.setenv("FEDKERNELS_AMX", asked)
        found.append(newton_schulz(u, backend="cpp"))
    assert torch.equal(*found)


@pytest.mark.skipif(not HERE, reason="no AMX here")
def test_libraries_that_multiply_in_tiles_are_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN configures the tiles of a thread for itself; products of torch between ours keep their bits."""
    monkeypatch.setenv("FEDKERNELS_AMX", "1")
    u, a = random(64, 100, dtype=torch.float32).cpu(), random(200, 200, dtype=torch.bfloat16).cpu()
    alone, o = a @ a, newton_schulz(u, backend="cpp")
    for _ in range(3):
        assert torch.equal(a @ a, alone)
        assert torch.equal(newton_schulz(u, backend="cpp"), o)


def test_muon_step_takes_them_too(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    y, M, g = (random(2, 3, 40, 90, seed=seed, dtype=torch.float32).cpu() for seed in range(3))
    u = 0.1 * g + 0.9 * (0.9 * M + 0.1 * g)
    moved = []
    for on in (True, False):
        if not on:
            monkeypatch.delenv("FEDKERNELS_AMX")
        after = y.clone()
        muon_step(after, M.clone(), g, lr=scalar(0.5).cpu(), momentum=0.9, backend="cpp")
        moved.append((y - after) / 0.5)
    tiled, plain = moved
    assert relative_error(tiled.flatten(0, 1), oracle(u.double()).flatten(0, 1)) <= 2e-4
    assert not torch.equal(tiled, plain)


def test_what_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    u = random(40, 50, dtype=torch.float32).cpu()
    monkeypatch.setenv("FEDKERNELS_AMX", "yes")
    with pytest.raises(ValueError, match=r"^FEDKERNELS_AMX=yes, expected 0, 1 or emulated"):
        newton_schulz(u, backend="cpp")
    if not HERE:
        monkeypatch.setenv("FEDKERNELS_AMX", "1")
        with pytest.raises(RuntimeError, match="FEDKERNELS_AMX=1: this processor has no AMX tiles"):
            newton_schulz(u, backend="cpp")
