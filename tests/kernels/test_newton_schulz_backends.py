"""Newton–Schulz on every backend: spectra, odd shapes, strides, bits, and what one matrix does to another."""

from __future__ import annotations

import pytest
import torch
from kernel_matrices import SPECTRA, matrix_of, oracle, random, relative_error
from kernel_rows import BACKENDS, COMPILED, DEVICE
from torch import Tensor

from fedkernels.kernels import dispatch
from fedkernels.kernels.dispatch import INTERPRETED
from fedkernels.kernels.newton_schulz import RULES, Orthogonalization, newton_schulz, newton_schulz_all
from fedkernels.kernels.newton_schulz.reference import newton_schulz_reference, schedule

# Of the norm of the result, five steps; the measured ones are a third of these at most.
BOUNDS = {"reference": 2e-4, "cpp": 2e-4, "triton": 1e-2}
METHODS: list[Orthogonalization] = ["newton_schulz", "polar_express"]
# Both sides of every border between two ways to compute: tiles, blocks and panels, one program, nearly square and wide.
SHAPES = [(1, 1), (1, 40), (40, 1), (7, 3), (8, 8), (17, 33), (33, 17), (31, 37), (32, 40), (65, 66), (100, 131)]
LARGE = (129, 140)  # what Triton does in tiles
SHAPES += [(129, 140), (140, 129)] if INTERPRETED else [(130, 257), (257, 130), (192, 192), (300, 300), (96, 1030)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_spectra(backend: str, method: Orthogonalization, spectrum: str) -> None:
    rows, cols = (144, 160) if INTERPRETED else (256, 1024)
    u = matrix_of(spectrum, rows, cols).float()
    assert relative_error(newton_schulz(u, 5, method, backend=backend), oracle(u, 5, method)) <= BOUNDS[backend]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_spectra_of_small_tall_matrices(backend: str, method: Orthogonalization, spectrum: str) -> None:
    u = matrix_of(spectrum, 150, 48).float()
    assert relative_error(newton_schulz(u, 5, method, backend=backend), oracle(u, 5, method)) <= BOUNDS[backend]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend: str, shape: tuple[int, int]) -> None:
    u = random(2, *shape, dtype=torch.float32)
    kept = u.clone()
    o = newton_schulz(u, backend=backend)
    assert o.dtype == torch.float32
    assert relative_error(o, oracle(u)) <= BOUNDS[backend]
    assert torch.equal(u, kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 6, 7])
def test_steps(backend: str, steps: int) -> None:
    for shape in [(20, 24), (20, 50)]:
        u = random(*shape, dtype=torch.float32)
        assert relative_error(newton_schulz(u, steps, backend=backend), oracle(u, steps)) <= BOUNDS[backend]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (50, 3), (20, 20), (130, 140)])
def test_zero_stays_zero(backend: str, shape: tuple[int, int]) -> None:
    u = torch.zeros(2, *shape, device=DEVICE)
    assert torch.equal(newton_schulz(u, backend=backend), u)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1.0, 1e19, 1e30, 1e38])
@pytest.mark.parametrize("shape", [(9, 20), (40, 20), LARGE])
def test_scales(backend: str, shape: tuple[int, int], scale: float) -> None:
    """Beside a matrix of another scale."""
    if INTERPRETED and shape == LARGE and scale not in (1e-30, 1e30):
        pytest.skip("the interpreter is slow, and this is what the reference does first")
    u = torch.stack([random(*shape) * scale / 8, random(*shape, seed=1)]).float()
    o, expected = newton_schulz(u, backend=backend), oracle(u)
    if scale < 1e-20:  # far below the 1e-7 of the division, so that it stays tiny
        assert o[0].abs().max().item() <= 1e-18
        o, expected = o[1:], expected[1:]
    assert relative_error(o, expected) <= BOUNDS[backend]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(9, 20), (40, 20), LARGE])
def test_what_is_not_finite_stays_in_its_matrix(backend: str, shape: tuple[int, int], poison: float) -> None:
    u = random(3, *shape, dtype=torch.float32)
    clean = newton_schulz(u, 2, backend=backend)
    u[1, -1, 2] = poison
    o = newton_schulz(u, 2, backend=backend)
    assert torch.equal(o[::2], clean[::2])
    assert o[1].isnan().all()


def laid_out(u: Tensor) -> dict[str, Tensor]:
    """The matrices `[2, 3, rows, cols]` once more, lying in memory in other ways."""
    clients, count, rows, cols = u.shape
    flat = torch.full((clients, count * rows * cols + 13), torch.nan, device=u.device)
    slab = flat[:, 5:-8].unflatten(1, (count, rows, cols))
    slab.copy_(u)
    gaps = torch.full((clients, count, rows + 1, cols + 3), torch.nan, device=u.device)[..., 1:, :cols]
    gaps.copy_(u)
    return {
        "rows of a longer vector": slab,
        "gaps inside of matrices": gaps,
        "columns first": u.mT.contiguous().mT,
        "clients inside": u.transpose(0, 1).contiguous().transpose(0, 1),
        "one matrix for all": u[:1, :1].expand(2, 3, -1, -1),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (16, 32), (1, 5), (5, 1)])
def test_strides(backend: str, shape: tuple[int, int]) -> None:
    u = random(2, 3, *shape, dtype=torch.float32)
    expected = newton_schulz(u, backend=backend)
    # Libraries of the reference round in another order; 500 times that is what five steps can make of it.
    for how, other in laid_out(u).items():
        like = expected[:1, :1].expand(2, 3, -1, -1) if how == "one matrix for all" else expected
        torch.testing.assert_close(newton_schulz(other, backend=backend), like, rtol=3e-5, atol=3e-5, msg=how)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("shape", [(12, 12), (20, 70), (70, 20), LARGE])
def test_bits_do_not_depend_on_the_batch(backend: str, shape: tuple[int, int]) -> None:
    u = random(3, *shape, dtype=torch.float32)
    together = newton_schulz(u, 2, backend=backend)
    assert torch.equal(newton_schulz(u[1:], 2, backend=backend), together[1:])
    assert torch.equal(newton_schulz(u[2], 2, backend=backend), together[2])


@pytest.mark.skipif(INTERPRETED, reason="threads are those of the CPU's kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(12, 12), (65, 70), (70, 200), (200, 70)])
def test_bits_do_not_depend_on_the_threads(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Threads share matrices, or one matrix where there are fewer of them."""
    u = random(2, *shape).to("cpu", dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(newton_schulz(u, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 4, 0)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    assert newton_schulz(torch.empty(shape, device=DEVICE), backend=backend).shape == shape


@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_refuses(backend: str | None) -> None:
    with pytest.raises(ValueError, match=r"u has shape \[5\], expected \[..., rows, cols\]"):
        newton_schulz(torch.ones(5, device=DEVICE), backend=backend)
    with pytest.raises(ValueError, match="u is int32, expected real floating-point numbers"):
        newton_schulz(torch.ones(2, 2, dtype=torch.int32, device=DEVICE), backend=backend)
    for shape in ((2, 2), (0, 2)):
        u = torch.ones(shape, device=DEVICE)
        with pytest.raises(ValueError, match="steps is -1, expected at least 0"):
            newton_schulz(u, -1, backend=backend)
        with pytest.raises(ValueError, match="method is 'quintic', expected newton_schulz or polar_express"):
            newton_schulz(u, 5, "quintic", backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("shape", [(3, 4), (2, 5, 3), (2, 2, 4, 4)])
def test_opcheck(backend: str, shape: tuple[int, ...]) -> None:
    if backend == "triton":
        import fedkernels.kernels.newton_schulz.triton  # noqa: F401  defines the operator
    arguments = (random(*shape, dtype=torch.float32), *schedule("newton_schulz", 2))
    torch.library.opcheck(getattr(torch.ops.fedkernels, f"newton_schulz_{backend}").default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_any_shapes(backend: str) -> None:
    """The bits of one after the other."""
    us = [random(*shape, dtype=torch.float32) for shape in ((3, 9, 20), (20, 9), (2, 0, 4), (1, 2, 5, 5))]
    found = newton_schulz_all(us, 2, "polar_express", backend=backend)
    for u, o in zip(us, found, strict=True):
        assert torch.equal(o, newton_schulz(u, 2, "polar_express", backend=backend))
    assert newton_schulz_all([], backend=backend) == []
    with pytest.raises(ValueError, match=r"u has shape \[5\], expected \[..., rows, cols\]"):
        newton_schulz_all([us[0], torch.ones(5, device=DEVICE)], backend=backend)


def test_those_of_cuda_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it took wide matrices of any device; results come back in the order that was given."""
    launches = []

    def launched(us: list[Tensor], coefficients: list[float], margin: float) -> list[Tensor]:
        launches.append([tuple(u.shape) for u in us])
        return [newton_schulz_reference(u, coefficients, margin) for u in us]

    def wide(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
        return None if shape[-1] > shape[-2] else "not wide"

    monkeypatch.setitem(dispatch.MISSING, "cuda", None)
    monkeypatch.setitem(RULES, "cuda", wide)
    monkeypatch.setattr("fedkernels.kernels.newton_schulz.newton_schulz_cuda", launched)
    us = [random(*shape, dtype=torch.float32) for shape in ((2, 5, 9), (9, 5), (0, 3, 4), (3, 7))]
    for u, o in zip(us, newton_schulz_all(us), strict=True):
        assert o.shape == u.shape
        assert u.numel() == 0 or relative_error(o, oracle(u)) <= 1e-2
    assert launches == [[(2, 5, 9), (3, 7)]]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph(backend: str) -> None:
    def step(u: Tensor) -> Tensor:
        return 2 * newton_schulz(u + 1, backend=backend)

    u = random(2, 3, 4, dtype=torch.float32)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(u), step(u), rtol=1e-5, atol=1e-5)
