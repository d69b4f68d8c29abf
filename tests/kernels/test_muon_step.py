"""Muon's step on matrices: every backend against the equations in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_matrices import oracle, random
from kernel_rows import BACKENDS, COMPILED, DEVICE, WIDE, poison, scalar
from torch import Tensor

from fedkernels.kernels.dispatch import MISSING, Backend
from fedkernels.kernels.muon_step import muon_step
from fedkernels.kernels.newton_schulz import RULES
from fedkernels.kernels.newton_schulz.reference import newton_schulz_reference, schedule

# Of the length of the orthogonal part of a step. The fewer the singular values, the less do the errors of one that the
# polynomial happens to be steep at drown in the others.
BOUNDS = {"reference": 2e-5, "cpp": 2e-5, "triton": 2e-2}
SHAPES = [(1, 1), (3, 7), (20, 9), (16, 32), (33, 40)]
LR, MOMENTUM = 0.03, 0.9


def state(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """`y, M, g`, views of rows of a longer vector whose other elements are NaN."""
    clients, count, rows, cols = shape
    views = []
    for seed in range(3):
        size = count * rows * cols
        view = poison(clients, size + 3 + seed, dtype)[:, 1 + seed : 1 + seed + size].unflatten(1, (count, rows, cols))
        views.append(view.copy_(random(*shape, seed=seed)))
    return views[0], views[1], views[2]


def options(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Every option at once, with one client of several inactive."""
    return {
        "weight_decay": 0.1,
        "scale": 1.7,
        "share": 0.7,
        "alpha": 0.3,
        "G": random(*shape[1:], seed=5, dtype=dtype),
        "active": torch.arange(shape[0], device=DEVICE) != 1,
        "method": "polar_express",
        "steps": 4,
    }


def expected(y: Tensor, M: Tensor, g: Tensor, lr: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """The equations, matrix by matrix in float64."""
    y, M, g, rates = y.double().clone(), M.double().clone(), g.double(), lr.double().expand(len(y))
    for c in range(len(y)):
        if "active" in given and not given["active"][c]:
            continue
        M[c] = MOMENTUM * M[c] + (1 - MOMENTUM) * g[c]
        for k in range(y.shape[1]):
            u = (1 - MOMENTUM) * g[c, k] + MOMENTUM * M[c, k]
            o = given.get("scale", 1.0) * oracle(u, given.get("steps", 5), given.get("method", "newton_schulz"))
            p = given.get("share", 1.0) * (o + given.get("weight_decay", 0.0) * y[c, k])
            if "G" in given:
                p = p + given["alpha"] * given["G"][k].double()
            y[c, k] = y[c, k] - rates[c] * p
    return y, M


def check(backend: str | None, y: Tensor, M: Tensor, g: Tensor, lr: Tensor, bound: float, **given: Any) -> None:
    true_y, true_M = expected(y, M, g, lr, **given)
    orthogonal = {"scale": 1.0, "share": 1.0} | given | {"weight_decay": 0.0, "alpha": 0.0}
    moved = (expected(y, M, g, lr, **orthogonal)[0] - y.double()).norm()
    kept = g.clone()
    muon_step(y, M, g, lr=lr, momentum=MOMENTUM, **given, backend=backend)
    # What y loses when it is stored is no error of the step.
    assert (y.double() - true_y).norm() <= bound * moved + torch.finfo(y.dtype).eps * true_y.norm()
    torch.testing.assert_close(M.double(), true_M, rtol=1e-6, atol=1e-6)
    assert torch.equal(g, kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_and_with_every_option(backend: str, clients: int, count: int, shape: tuple[int, int]) -> None:
    whole = (clients, count, *shape)
    check(backend, *state(whole), scalar(LR), BOUNDS[backend])
    check(backend, *state(whole), scalar(LR), BOUNDS[backend], **options(whole))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["weight_decay", "scale", "share", "G", "active", "method", "steps"])
def test_each_option_alone(backend: str, name: str) -> None:
    every = options((3, 2, 8, 20))
    companions = {"G": ["alpha"]}.get(name, [])
    given = {key: every[key] for key in [name, *companions]}
    check(backend, *state((3, 2, 8, 20)), scalar(LR), BOUNDS[backend], **given)


@pytest.mark.parametrize("backend", WIDE)
def test_float64(backend: str) -> None:
    whole = (2, 2, 9, 21)
    check(backend, *state(whole, torch.float64), scalar(LR), 1e-12, **options(whole, torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rate_for_each_client(backend: str) -> None:
    lr = torch.tensor([0.1, 0.0, 0.01], device=DEVICE)
    check(backend, *state((3, 1, 6, 10)), lr, BOUNDS[backend])


@pytest.mark.parametrize("backend", BACKENDS)
def test_inactive_clients_keep_every_bit_whatever_their_gradient(backend: str) -> None:
    y, M, g = state((3, 2, 6, 10))
    g[1] = torch.nan
    before = y.clone(), M.clone()
    active = torch.tensor([True, False, True], device=DEVICE)
    muon_step(y, M, g, lr=scalar(LR), momentum=MOMENTUM, active=active, backend=backend)
    assert torch.equal(y[1], before[0][1])
    assert torch.equal(M[1], before[1][1])
    assert y[::2].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_beside_the_matrices_is_written(backend: str) -> None:
    rows = torch.full((2, 100), torch.nan, device=DEVICE)
    y = rows[:, 7:87].unflatten(1, (1, 8, 10))
    y.copy_(random(2, 1, 8, 10))
    muon_step(y, torch.zeros_like(y), random(2, 1, 8, 10).float(), lr=scalar(LR), momentum=MOMENTUM, backend=backend)
    assert y.isfinite().all()
    assert rows[:, :7].isnan().all()
    assert rows[:, 87:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_refusals(backend: str) -> None:
    y, M, g = state((2, 1, 4, 6))
    rest: dict[str, Any] = {"lr": scalar(LR), "momentum": MOMENTUM, "backend": backend}
    with pytest.raises(ValueError, match=r"y has shape \[2, 24\], expected \[C, count, rows, cols\]"):
        muon_step(y.flatten(1), M, g, **rest)
    with pytest.raises(ValueError, match=r"M has matrices of strides \[1, 4\], expected \[6, 1\]"):
        muon_step(y, M.mT.contiguous().mT, g, **rest)
    with pytest.raises(
        ValueError, match=r"M has matrices that overlap: strides \[0, 24, 6, 1\] of shape \[2, 1, 4, 6\]"
    ):
        muon_step(y, torch.zeros(1, 1, 4, 6, device=DEVICE).expand(2, 1, 4, 6), g, **rest)
    square = torch.zeros(27, device=DEVICE).as_strided((2, 2, 3, 3), (9, 9, 3, 1))  # [0, 1] and [1, 0] are one place
    with pytest.raises(ValueError, match="M has matrices that overlap"):
        muon_step(torch.zeros(2, 2, 3, 3, device=DEVICE), square, torch.zeros(2, 2, 3, 3, device=DEVICE), **rest)
    with pytest.raises(ValueError, match=r"g is float64 \[2, 1, 4, 6\], expected float32 \[2, 1, 4, 6\]"):
        muon_step(y, M, g.double(), **rest)
    with pytest.raises(ValueError, match="steps is -1, expected at least 0"):
        muon_step(y, M, g, steps=-1, **rest)
    with pytest.raises(ValueError, match=r"G has shape \[4, 6\], expected \[1, 4, 6\]"):
        muon_step(y, M, g, G=torch.zeros(4, 6, device=DEVICE), **rest)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("with_options", [False, True])
def test_opcheck(backend: str, with_options: bool) -> None:
    if backend == "triton":
        import fedkernels.kernels.muon_step.triton  # noqa: F401  defines the operator
    shape = (2, 1, 3, 5)
    y, M, g = (view.contiguous() for view in state(shape))
    G = random(1, 3, 5, dtype=torch.float32) if with_options else None
    active = torch.tensor([True, False], device=DEVICE) if with_options else None
    arguments = (y, M, g, scalar(LR), MOMENTUM, 0.1, 1.7, 0.7, 0.3, G, active, *schedule("newton_schulz", 2))
    if backend == "triton":
        arguments += ("triton",)
    torch.library.opcheck(getattr(torch.ops.fedkernels, f"muon_step_{backend}").default, arguments)


if "triton" in BACKENDS:

    @pytest.mark.parametrize(("backend", "inner"), [(None, "cuda"), ("triton", "triton"), ("cuda", "cuda")])
    def test_matrices_go_where_newton_schulz_alone_would_send_them(
        backend: str | None, inner: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As if CUDA C++ took those of a short side above 30; a backend that was asked for does all of the step."""

        def rule(device: str, dtype: torch.dtype, sides: tuple[int, ...]) -> str | None:
            return None if min(sides[-2:]) > 30 else "too small"

        ran = []

        def recorded(chosen: Backend, u: Tensor, coefficients: list[float], margin: float) -> Tensor:
            ran.append((chosen, min(u.shape[-2:])))
            return newton_schulz_reference(u, coefficients, margin)

        monkeypatch.setitem(MISSING, "cuda", None)
        monkeypatch.setitem(RULES, "cuda", rule)
        monkeypatch.setattr("fedkernels.kernels.newton_schulz.cuda_on_matrices", lambda *arguments: None)
        monkeypatch.setattr("fedkernels.kernels.muon_step.triton.run", recorded)
        for sides in ((20, 9), (33, 40)):
            check(backend, *state((2, 1, *sides)), scalar(LR), BOUNDS["reference"])
        assert ran == [(backend or "triton", 9), (inner, 33)]
