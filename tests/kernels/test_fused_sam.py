"""Row norms and perturbations: every backend against float64, and a whole step of SAM against the usual sequence."""

from __future__ import annotations

import pytest
import torch
from kernel_rows import BACKENDS, CLIENTS, COMPILED, DEVICE, SIZES, WIDE, apart, assert_near, poison, row, rows, scalar
from torch import Tensor, nn

from fedkernels.kernels.fused_adamw import fused_adamw
from fedkernels.kernels.fused_sam import fused_sam, row_norm
from fedkernels.kernels.fused_sgd import fused_sgd

RHO = 0.05


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clients", CLIENTS)
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_norm(backend: str, clients: int, d: int, dtype: torch.dtype) -> None:
    g = rows(clients, d, 0, dtype=dtype)
    found = row_norm(g, backend=backend)
    assert found.dtype == torch.float32
    assert_near(found, g.double().norm(dim=1), 1)
    assert torch.equal(row_norm(g[0], backend=backend), found[:1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_norm_of_more_tiles_than_partial_sums(backend: str) -> None:
    g = rows(1, 2**20 + 5000, 0)
    assert_near(row_norm(g, backend=backend), g.double().norm(dim=1), 1)


@pytest.mark.parametrize("backend", WIDE)
def test_row_norm_float64(backend: str) -> None:
    g = rows(3, 9001, 0, dtype=torch.float64)
    assert_near(row_norm(g, backend=backend), g.norm(dim=1), 64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 1e-37, 1e-20, 1e20, 1e35])
def test_row_norm_where_squares_leave_float32(backend: str, scale: float) -> None:
    g = rows(2, 300, 0, scale)
    assert_near(row_norm(g, backend=backend), g.double().norm(dim=1), 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_norm_shows_what_is_not_finite(backend: str) -> None:
    g = rows(3, 5000, 0)
    g[0, 4999], g[1, 7] = torch.nan, torch.inf
    norm = row_norm(g, backend=backend)
    assert norm[0].isnan()
    assert norm[1] == torch.inf
    assert norm[2].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_norm_has_the_same_bits_beside_any_clients(backend: str) -> None:
    g = rows(5, 9001, 0)
    together = row_norm(g, backend=backend)
    for c in range(5):
        assert torch.equal(row_norm(g[c : c + 1].clone(), backend=backend), together[c : c + 1])


@pytest.mark.parametrize("threads", [2, 5])
def test_row_norm_has_the_same_bits_on_any_number_of_threads(threads: int) -> None:
    before, g = torch.get_num_threads(), rows(2, 100_001, 0)
    try:
        torch.set_num_threads(1)
        alone = row_norm(g)
        torch.set_num_threads(threads)
        assert torch.equal(row_norm(g), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clients", CLIENTS)
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perturbs_into_a_buffer_and_in_place(backend: str, clients: int, d: int, dtype: torch.dtype) -> None:
    y, g = rows(clients, d, 0), rows(clients, d, 1, dtype=dtype)
    start, wide = y.clone(), g.double()
    expected = y.double() + RHO * wide / (wide.norm(dim=1, keepdim=True) + 1e-12)
    out, saved = poison(clients, d), poison(clients, d)
    fused_sam(y, g, rho=RHO, out=out, backend=backend)
    assert_near(out, expected)
    assert torch.equal(y, start)
    fused_sam(y, g, rho=RHO, saved=saved, backend=backend)
    assert torch.equal(y, out)
    assert torch.equal(saved, start)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("one_row", [True, False])
@pytest.mark.parametrize("per_client", [True, False])
def test_a_coefficient_replaces_the_norm(backend: str, one_row: bool, per_client: bool) -> None:
    y, direction = rows(3, 4097, 0), row(4097, 1) if one_row else rows(3, 4097, 1)
    coefficient = torch.tensor([0.5, -2.0, 0.0], device=DEVICE) if per_client else scalar(-0.3)
    expected = y.double() + coefficient.double().view(-1, 1) * direction.double()
    out = poison(3, 4097)
    fused_sam(y, direction, coefficient=coefficient, out=out, backend=backend)
    assert_near(out, expected)
    if per_client:
        assert torch.equal(out[2], y[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_direction_for_all_clients(backend: str) -> None:
    y, direction, out = rows(3, 300, 0), row(300, 1), poison(3, 300)
    fused_sam(y, direction, rho=RHO, eps=0.5, out=out, backend=backend)
    assert_near(out, y.double() + RHO * direction.double() / (direction.double().norm() + 0.5))


@pytest.mark.parametrize("d", [2**23 + 4, 2**22 + 3])
def test_rows_that_no_cache_holds(d: int) -> None:
    """The C++ kernel writes them another way, which needs 16-byte boundaries and falls back without."""
    clients = 1 if d % 4 == 0 else 3
    y, g = rows(clients, 64, 0).repeat(1, d // 64 + 1)[:, :d].contiguous(), rows(clients, d, 1)
    start, out, saved = y.clone(), poison(clients, d), poison(clients, d)
    fused_sam(y, g, coefficient=scalar(0.5), out=out)
    torch.testing.assert_close(out, start + 0.5 * g, rtol=1e-6, atol=1e-6)
    fused_sam(y, g, coefficient=scalar(0.5), saved=saved)
    assert torch.equal(saved, start)
    assert torch.equal(y, out)


@pytest.mark.parametrize("backend", WIDE)
def test_float64(backend: str) -> None:
    y, g, out = rows(3, 9001, 0, dtype=torch.float64), rows(3, 9001, 1, dtype=torch.float64), poison(3, 9001).double()
    fused_sam(y, g, rho=RHO, out=out, backend=backend)
    torch.testing.assert_close(out, y + RHO * g / g.norm(dim=1, keepdim=True), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_a_gradient_is_divided_out(backend: str, scale: float) -> None:
    g, y, out = rows(2, 300, 1, scale), torch.zeros(2, 300, device=DEVICE), poison(2, 300)
    fused_sam(y, g, rho=RHO, eps=0.0, out=out, backend=backend)
    assert_near(out, RHO * g.double() / g.double().norm(dim=1, keepdim=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_no_move(backend: str) -> None:
    y, out = rows(2, 300, 0), poison(2, 300)
    fused_sam(y, torch.zeros_like(y), rho=RHO, out=out, backend=backend)
    assert torch.equal(out, y)


def gradient(y: Tensor) -> Tensor:
    """Of `Σ (y⁴/4 − sin y)`, different at every point."""
    return y**3 - y.cos()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_whole_steps_equal_the_usual_sequence(backend: str, in_place: bool, optimizer: str) -> None:
    """Two gradients, torch's optimizer in between: as SAM is written everywhere."""
    start = rows(2, 300, 0, 0.5)
    parameters = [nn.Parameter(line.double().clone()) for line in start]
    theirs: torch.optim.Optimizer
    if optimizer == "adamw":
        theirs = torch.optim.AdamW(parameters, lr=0.03, weight_decay=0.1)
    else:
        theirs = torch.optim.SGD(parameters, lr=0.03, momentum=0.9, weight_decay=0.1)
    y, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    buffer = poison(2, 300)
    for k in range(1, 5):
        for p in parameters:
            g = gradient(p.detach())
            p.grad = gradient(p.detach() + RHO * g / (g.norm() + 1e-12))
        theirs.step()
        if in_place:
            before = y.clone()
            fused_sam(y, gradient(y), rho=RHO, saved=buffer, backend=backend)
            assert torch.equal(buffer, before)
            g, source = gradient(y), buffer
        else:
            fused_sam(y, gradient(y), rho=RHO, out=buffer, backend=backend)
            g, source = gradient(buffer), None
        common = {"lr": scalar(0.03, torch.float64), "weight_decay": 0.1, "source": source, "backend": backend}
        if optimizer == "adamw":
            counts = {"step": scalar(k), "v_steps": scalar(0)}
            fused_adamw(y, m, v, g, **counts, beta1=0.9, beta2=0.999, eps=1e-8, **common)
        else:
            fused_sgd(y, m, g, momentum=0.9, **common)
    torch.testing.assert_close(y.double(), torch.stack(parameters).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses(backend: str) -> None:
    y, g = rows(2, 5, 0), rows(2, 5, 1)
    with pytest.raises(ValueError, match="rho is None and coefficient None, expected exactly one of them"):
        fused_sam(y, g, out=g.clone(), backend=backend)
    with pytest.raises(ValueError, match="both of out and saved given, expected exactly one of them"):
        fused_sam(y, g, rho=RHO, out=g.clone(), saved=g.clone(), backend=backend)
    with pytest.raises(ValueError, match="neither of out and saved given, expected exactly one of them"):
        fused_sam(y, g, rho=RHO, backend=backend)
    with pytest.raises(
        ValueError, match=r"direction has rows that are not contiguous: strides \[1, 2\] of shape \[2, 5\]"
    ):
        fused_sam(y, g.T.contiguous().T, rho=RHO, out=g.clone(), backend=backend)
    with pytest.raises(ValueError, match=r"out has shape \[1, 5\], expected \[2, 5\]"):
        fused_sam(y, g, rho=RHO, out=g[:1].clone(), backend=backend)
    with pytest.raises(ValueError, match=r"coefficient has shape \[3\], expected one value or one for each of 2"):
        fused_sam(y, g, coefficient=torch.ones(3, device=DEVICE), out=g.clone(), backend=backend)
    with pytest.raises(ValueError, match=r"g has shape \[1, 2, 5\], expected \[C, d\] or \[d\]"):
        row_norm(y[None], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_memory_that_is_shared(backend: str) -> None:
    """Of any row with any other; those that only lie between each other's are apart."""
    whole, g = rows(4, 40, 0), rows(3, 10, 1)
    y, narrow = whole[:3, :10], whole.view(-1)[:60].view(3, 20)
    for other in (y, whole[:3, 9:19], whole[1:, :10], narrow[:, :10]):
        with pytest.raises(ValueError, match="saved shares memory with y, expected memory of its own"):
            fused_sam(y, g, rho=RHO, saved=other, backend=backend)
        with pytest.raises(ValueError, match="out shares memory with y, expected memory of its own"):
            fused_sam(y, g, rho=RHO, out=other, backend=backend)
    with pytest.raises(ValueError, match="saved shares memory with direction, expected memory of its own"):
        fused_sam(y, g, rho=RHO, saved=g, backend=backend)
    for other in (whole[:3, 10:20], narrow[:, 10:]):
        start = y.clone()
        fused_sam(y, g, rho=RHO, saved=other, backend=backend)
        assert torch.equal(other, start)
    expected = poison(3, 10)
    fused_sam(y, g, rho=RHO, out=expected, backend=backend)
    fused_sam(y, g, rho=RHO, out=g, backend=backend)  # element by element, and its norm is known before
    assert torch.equal(g, expected)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("in_place", [True, False])
def test_opcheck(backend: str, in_place: bool) -> None:
    if backend == "triton":
        import fedkernels.kernels.fused_sam.triton  # noqa: F401  defines the operators
    y, g, other = rows(2, 70, 0), rows(2, 70, 1), poison(2, 70)
    operator = getattr(torch.ops.fedkernels, f"fused_sam_{backend}").default
    if in_place:
        torch.library.opcheck(operator, (y, g, None, other, None, RHO, 1e-12))
    else:
        torch.library.opcheck(operator, (other, g, y, None, scalar(0.1), 0.0, 0.0))
    torch.library.opcheck(getattr(torch.ops.fedkernels, f"row_norm_{backend}").default, (g,))
    torch.library.opcheck(getattr(torch.ops.fedkernels, f"row_norm_{backend}").default, (g[0].bfloat16(),))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend: str) -> None:
    def step(y: Tensor, out: Tensor) -> Tensor:
        fused_sam(y, gradient(y), rho=RHO, out=out, backend=backend)
        return row_norm(out, backend=backend)

    y, found, expected = rows(2, 300, 0), poison(2, 300), poison(2, 300)
    norm = torch.compile(step, fullgraph=True)(y, found)
    torch.testing.assert_close(norm, step(y, expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [257, 8192])
def test_rows_may_lie_apart(backend: str, d: int) -> None:
    """Bit for bit what rows side by side give, each tensor with a stride of its own; what lies between stays."""
    y, g, saved = rows(3, d, 0), rows(3, d, 1), poison(3, d)
    (w, whole), (direction, _), (kept, _) = apart(y, 2, 3), apart(g, 1, 6), apart(saved, 5, 4)
    assert torch.equal(row_norm(direction, backend=backend), row_norm(g, backend=backend))
    fused_sam(y, g, rho=RHO, saved=saved, backend=backend)
    fused_sam(w, direction, rho=RHO, saved=kept, backend=backend)
    assert torch.equal(w, y)
    assert torch.equal(kept, saved)
    assert int(whole.isnan().sum()) == whole.numel() - w.numel()
