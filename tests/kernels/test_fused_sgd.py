"""Fused SGD: every backend against the equations in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_rows import BACKENDS, CLIENTS, COMPILED, DEVICE, SIZES, WIDE, apart, assert_near, poison, row, rows, scalar
from torch import Tensor

from fedkernels.contract import Move
from fedkernels.kernels.fused_sgd import fused_sgd
from fedkernels.layout import Layout
from fedkernels.optim import Sgd


def state(clients: int, d: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, ...]:
    """`y, m, g`."""
    return tuple(rows(clients, d, seed, scale, dtype) for seed in range(3))


def options(clients: int, d: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Every option at once, with clients that differ and one of them inactive."""
    clients_axis = torch.arange(clients, device=DEVICE)
    return {
        "momentum": 0.9,
        "weight_decay": 0.1,
        "share": 0.7,
        "alpha": 0.3,
        "G": row(d, 5, dtype),
        "scale": 1 / (1.0 + clients_axis),
        "active": clients_axis != 1,
        "source": rows(clients, d, 6, dtype=dtype),
        "x": row(d, 7, dtype),
        "delta": poison(clients, d, dtype),
    }


def check(backend: str, y: Tensor, m: Tensor | None, g: Tensor, **given: Any) -> None:
    """Against the equations, client by client in float64."""
    true_y, true_m = y.double().clone(), torch.zeros_like(y).double() if m is None else m.double().clone()
    lr, scale, source, active = 0.03, given.get("scale"), given.get("source"), given.get("active")
    for c in range(len(y)):
        start = (y if source is None else source)[c].double()
        true_y[c] = start
        if active is None or active[c]:
            p = g[c].double() * (1.0 if scale is None else scale[c].double())
            true_m[c] = given.get("momentum", 0.0) * true_m[c] + p + given.get("weight_decay", 0.0) * start
            local = given.get("share", 1.0) * true_m[c]
            true_y[c] -= scalar(lr).double() * (local + (given["alpha"] * given["G"].double() if "G" in given else 0))
    fused_sgd(y, m, g, lr=scalar(lr), **given, backend=backend)
    assert_near(y, true_y)
    if m is not None:
        assert_near(m, true_m)
    if "delta" in given:
        assert_near(given["delta"], true_y - given["x"].double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clients", CLIENTS)
@pytest.mark.parametrize("d", SIZES)
def test_plain_and_with_every_option(backend: str, clients: int, d: int) -> None:
    y, m, g = state(clients, d)
    check(backend, y.clone(), None, g)
    check(backend, y, m, g, **options(clients, d))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["momentum", "weight_decay", "G", "scale", "active", "source", "x"])
def test_each_option_alone(backend: str, name: str) -> None:
    every = options(3, 300)
    companions = {"G": ["alpha"], "x": ["delta"]}.get(name, [])
    check(backend, *state(3, 300), **{key: every[key] for key in [name, *companions]})


@pytest.mark.parametrize("backend", WIDE)
def test_float64(backend: str) -> None:
    check(backend, *state(3, 4097, torch.float64), **options(3, 4097, torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_gradients(backend: str) -> None:
    y, m, g = state(2, 1023)
    check(backend, y, m, g.bfloat16(), **options(2, 1023))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_factor_of_gradients_is_taken_in_the_dtype_of_the_parameters(backend: str) -> None:
    """Bit for bit, whatever the dtype it comes in."""
    scale = torch.tensor([0.1, 1 / 3], device=DEVICE)
    found = []
    for dtype in (torch.float32, torch.float64):
        y, m, g = state(2, 300)
        fused_sgd(y, m, g, lr=scalar(0.1), momentum=0.9, scale=scale.to(dtype), backend=backend)
        found.append((y, m))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_scales(backend: str, scale: float) -> None:
    check(backend, *state(2, 300, scale=scale), momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inactive_rows_keep_every_bit_whatever_their_gradient(backend: str) -> None:
    y, m, g = state(3, 4097)
    g[1] = torch.nan
    before = y[1].clone(), m[1].clone()
    active = torch.tensor([True, False, True], device=DEVICE)
    fused_sgd(y, m, g, lr=scalar(0.1), momentum=0.9, active=active, backend=backend)
    assert torch.equal(y[1], before[0])
    assert torch.equal(m[1], before[1])


@pytest.mark.parametrize("backend", WIDE)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_the_local_optimizer(backend: str, momentum: float, weight_decay: float) -> None:
    """`fedkernels.optim.Sgd`, over steps."""
    constants = {"momentum": momentum, "weight_decay": weight_decay}
    optimizer, layout = Sgd(**constants), Layout({}, {})
    y = rows(3, 300, 0, dtype=torch.float64)
    theirs, own = y.clone(), optimizer.init(y, layout)
    m = torch.zeros_like(y) if momentum else None
    for k in range(1, 5):
        g = rows(3, 300, 10 + k, dtype=torch.float64)
        optimizer.step(own, g, theirs, k, layout, Move(scalar(0.03, torch.float64)))
        fused_sgd(y, m, g, lr=scalar(0.03, torch.float64), **constants, backend=backend)
    torch.testing.assert_close(y, theirs, rtol=1e-13, atol=1e-13)


def test_momentum_without_its_state() -> None:
    y, _, g = state(1, 5)
    with pytest.raises(ValueError, match=r"m is missing: momentum is 0\.9"):
        fused_sgd(y, None, g, lr=scalar(0.1), momentum=0.9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_what_is_not_contiguous(backend: str) -> None:
    y, m, g = state(2, 5)
    with pytest.raises(ValueError, match=r"m has rows that are not contiguous: strides \[10, 2\] of shape \[2, 5\]"):
        fused_sgd(y, torch.zeros(2, 10, device=DEVICE)[:, ::2], g, lr=scalar(0.1), backend=backend)
    assert torch.equal(m, state(2, 5)[1])


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("with_options", [False, True])
def test_opcheck(backend: str, with_options: bool) -> None:
    y, m, g = state(2, 70)
    rest = options(2, 70)
    if not with_options:
        m, rest = None, dict.fromkeys(rest) | {"momentum": 0.0, "weight_decay": 0.0, "share": 1.0, "alpha": 0.0}
    if backend == "triton":
        import fedkernels.kernels.fused_sgd.triton  # noqa: F401  defines the operator
    arguments = (y, m, g, scalar(0.1), *rest.values())
    torch.library.opcheck(getattr(torch.ops.fedkernels, f"fused_sgd_{backend}").default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [257, 4096])
def test_rows_may_lie_apart(backend: str, d: int) -> None:
    """Bit for bit the step of rows side by side, each tensor with a stride of its own; what lies between stays."""
    expected, rest = state(3, d), options(3, d)
    views, wholes = zip(*(apart(tensor, 3 * i, 5 - i) for i, tensor in enumerate(expected)), strict=True)
    source, delta = apart(rest["source"], 1, 2)[0], apart(rest["delta"], 4, 4)[0]
    fused_sgd(*expected, lr=scalar(0.03), **rest, backend=backend)
    fused_sgd(*views, lr=scalar(0.03), **rest | {"source": source, "delta": delta}, backend=backend)
    assert torch.equal(delta, rest["delta"])
    for view, whole, tensor in zip(views, wholes, expected, strict=True):
        assert torch.equal(view, tensor)
        assert int(whole.isnan().sum()) == whole.numel() - view.numel()
