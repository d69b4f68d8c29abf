"""Fused AdamW: every backend against the equations in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_rows import BACKENDS, CLIENTS, COMPILED, DEVICE, SIZES, WIDE, apart, assert_near, poison, row, rows, scalar
from torch import Tensor

from fedkernels.contract import Move
from fedkernels.kernels.fused_adamw import fused_adamw
from fedkernels.layout import Layout
from fedkernels.optim import AdamW

CONSTANTS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


def state(clients: int, d: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, ...]:
    """`y, m, v, g`, as they may be after some steps."""
    y, m, v, g = (rows(clients, d, seed, 1.0 if seed == 0 else scale, dtype) for seed in range(4))
    return y, m, v * v, g


def options(clients: int, d: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Every option at once, with clients that differ and one of them inactive."""
    clients_axis = torch.arange(clients, device=DEVICE)
    return {
        "share": 0.7,
        "alpha": 0.3,
        "G": row(d, 5, dtype),
        "scale": 1 / (1.0 + clients_axis),
        "active": clients_axis != 1,
        "source": rows(clients, d, 6, dtype=dtype),
        "x": row(d, 7, dtype),
        "delta": poison(clients, d, dtype),
    }


def expected(
    y: Tensor, m: Tensor, v: Tensor, g: Tensor, lr: Tensor, step: Tensor, v_steps: Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float,
    share: float = 1.0, alpha: float = 0.0, G: Tensor | None = None, scale: Tensor | None = None,
    active: Tensor | None = None, source: Tensor | None = None, x: Tensor | None = None, delta: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`y, m, v, delta` in float64, client by client from the equations."""
    y, m, v, g = (tensor.double().clone() for tensor in (y, m, v, g))
    delta = None if delta is None else torch.empty_like(y)
    for c in range(len(y)):
        start = y[c] if source is None else source[c].double()
        if active is None or active[c]:
            k, seen = step.item(), v_steps.flatten()[c].item()
            gradient = g[c] if scale is None else g[c] * scale.double().expand(len(y))[c]
            m[c] = beta1 * m[c] + (1 - beta1) * gradient
            v[c] = beta2 * v[c] + (1 - beta2) * gradient**2
            local = (m[c] / (1 - beta1**k)) / ((v[c] / (1 - beta2 ** (seen + k))).sqrt() + eps) + weight_decay * start
            p = share * local + (0 if G is None else alpha * G.double())
            y[c] = start - lr.double() * p
        else:
            y[c] = start
        if x is not None:
            delta[c] = y[c] - x.double()
    return (y, m, v) if delta is None else (y, m, v, delta)


def check(backend: str, tensors: tuple[Tensor, ...], ulps: float = 8.0, **given: Any) -> None:
    """The kernel's results are the equations', and nothing else was written to."""
    given = {"lr": scalar(0.03), "step": scalar(3), "v_steps": torch.zeros(len(tensors[0])).to(DEVICE), **given}
    correct = expected(*tensors, **CONSTANTS, **given)
    kept = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor) and name != "delta"}
    g = tensors[3].clone()
    fused_adamw(*tensors, **CONSTANTS, **given, backend=backend)
    found = [*tensors[:3], *([given["delta"]] if "delta" in given else [])]
    for value, true in zip(found, correct, strict=True):
        assert_near(value, true, ulps)
    assert torch.equal(tensors[3], g)
    assert all(torch.equal(given[name], value) for name, value in kept.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clients", CLIENTS)
@pytest.mark.parametrize("d", SIZES)
def test_plain_and_with_every_option(backend: str, clients: int, d: int) -> None:
    check(backend, state(clients, d))
    check(backend, state(clients, d), **options(clients, d))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["G", "scale", "active", "source", "x"])
def test_each_option_alone(backend: str, name: str) -> None:
    every = options(3, 300)
    companions = {"G": ["alpha"], "x": ["delta"]}.get(name, [])
    check(backend, state(3, 300), **{key: every[key] for key in [name, *companions]})


@pytest.mark.parametrize("backend", WIDE)
@pytest.mark.parametrize("clients", CLIENTS)
def test_float64(backend: str, clients: int) -> None:
    check(backend, state(clients, 4097, torch.float64), **options(clients, 4097, torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clients", CLIENTS)
def test_bfloat16_gradients(backend: str, clients: int) -> None:
    y, m, v, g = state(clients, 1023)
    check(backend, (y, m, v, g.bfloat16()), **options(clients, 1023))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_factor_of_gradients_is_taken_in_the_dtype_of_the_parameters(backend: str) -> None:
    """Bit for bit, whatever the dtype it comes in."""
    scale = torch.tensor([0.1, 1 / 3], device=DEVICE)
    found = []
    for dtype in (torch.float32, torch.float64):
        y, m, v, g = state(2, 300)
        fused_adamw(
            y, m, v, g, lr=scalar(0.1), step=scalar(1), v_steps=scalar(0), **CONSTANTS, scale=scale.to(dtype),
            backend=backend,
        )  # fmt: skip
        found.append((y, m))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e-12, 1e6, 1e15])
def test_scales(backend: str, scale: float) -> None:
    """From gradients whose squares vanish, where ε decides, to those whose squares nearly overflow."""
    check(backend, state(2, 300, scale=scale))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [1, 2, 50])
@pytest.mark.parametrize("seen", [0, 1, 7, 1000, 10_000_000])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_bias_corrections(backend: str, step: int, seen: int, dtype: torch.dtype) -> None:
    """Under a constant gradient both corrected moments are exact: the step is ηg/(|g| + ε), however many were taken."""
    y, g = torch.zeros(2, 300, device=DEVICE), rows(2, 300, 3)
    before = 0.9 ** (step - 1), 0.999 ** (seen + step - 1)
    m, v = (g.double() * (1 - before[0])).float(), (g.double() ** 2 * (1 - before[1])).float()
    counts = {"step": scalar(step, dtype), "v_steps": torch.full((2, 1), seen, dtype=dtype, device=DEVICE)}
    fused_adamw(y, m, v, g, lr=scalar(0.5), **counts, **CONSTANTS | {"weight_decay": 0.0}, backend=backend)
    torch.testing.assert_close(y, -0.5 * g / (g.abs() + 1e-8), rtol=5e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_past_at_all(backend: str) -> None:
    """With β = 0 moments are the gradient and its square, and need no correction."""
    y, m, v, g = state(2, 300)
    constants = {"beta1": 0.0, "beta2": 0.0, "eps": 1e-8, "weight_decay": 0.0}
    given = {"lr": scalar(0.5), "step": scalar(1), "v_steps": scalar(0)}
    correct = y - 0.5 * g / (g.abs() + 1e-8)
    fused_adamw(y, m, v, g, **given, **constants, backend=backend)
    torch.testing.assert_close(y, correct, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(m, g, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inactive_rows_keep_every_bit_whatever_their_gradient(backend: str) -> None:
    tensors = state(3, 4097)
    tensors[3][1] = torch.nan
    before = [tensor[1].clone() for tensor in tensors[:3]]
    source = rows(3, 4097, 6)
    given = {"lr": scalar(0.1), "step": scalar(1), "v_steps": scalar(0), **CONSTANTS}
    active = torch.tensor([True, False, True], device=DEVICE)
    fused_adamw(*tensors, **given, active=active, backend=backend)
    assert all(torch.equal(tensor[1], kept) for tensor, kept in zip(tensors, before, strict=False))
    assert all(tensor[::2].isfinite().all() for tensor in tensors)
    fused_adamw(*tensors, **given, active=active, source=source, backend=backend)
    assert torch.equal(tensors[0][1], source[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_client_ignores_the_others(backend: str) -> None:
    """Bit for bit, wherever in memory its row lies."""
    together = state(5, 4097)
    alone = tuple(tensor[3:4].clone() for tensor in together)
    given = {"lr": scalar(0.1), "step": scalar(2), "v_steps": scalar(4), **CONSTANTS}
    fused_adamw(*together, **given, backend=backend)
    fused_adamw(*alone, **given, backend=backend)
    assert all(torch.equal(many[3:4], one) for many, one in zip(together, alone, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rates_of_each_client(backend: str) -> None:
    y, m, v, g = state(2, 300)
    kept = y.clone()
    given = {"step": scalar(1), "v_steps": scalar(0), **CONSTANTS, "backend": backend}
    fused_adamw(y, m, v, g, lr=torch.tensor([0.0, 0.1], device=DEVICE), **given)
    assert torch.equal(y[0], kept[0])
    assert not torch.equal(y[1], kept[1])


@pytest.mark.parametrize("backend", WIDE)
def test_equals_the_local_optimizer(backend: str) -> None:
    """`fedkernels.optim.AdamW`, over steps, with a second moment that has a longer past than the first."""
    optimizer, layout = AdamW(), Layout({}, {})
    y, _, v, _ = state(3, 300, torch.float64)
    theirs, own = y.clone(), optimizer.init(y, layout)
    own["v"].copy_(v)
    own["v_steps"].fill_(40)
    m = torch.zeros_like(y)
    for k in range(1, 5):
        g = rows(3, 300, 10 + k, dtype=torch.float64)
        optimizer.step(own, g, theirs, k, layout, Move(scalar(0.03, torch.float64)))
        fused_adamw(
            y, m, v, g, lr=scalar(0.03, torch.float64), step=scalar(k), v_steps=own["v_steps"], **CONSTANTS,
            backend=backend,
        )  # fmt: skip
    torch.testing.assert_close(y, theirs, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(v, own["v"], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, threads):
            torch.set_num_threads(n)
            tensors = state(3, 50_001)
            fused_adamw(*tensors, lr=scalar(0.1), step=scalar(1), v_steps=scalar(0), **CONSTANTS)
            results.append(tensors)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("g", torch.zeros(5, 2).T, r"g has rows that are not contiguous: strides \[1, 2\] of shape \[2, 5\]"),
        ("g", torch.zeros(2, 4), r"g has shape \[2, 4\], expected \[2, 5\]"),
        ("g", torch.zeros(2, 5, dtype=torch.float16), "g is float16, expected float32 or bfloat16"),
        ("m", torch.zeros(2, 5, dtype=torch.float64), "m is float64, expected float32"),
        ("v", torch.zeros(10), r"v has shape \[10\], expected \[2, 5\]"),
        ("G", torch.zeros(2, 5), r"G has shape \[2, 5\], expected \[5\]"),
        ("active", torch.zeros(2), "active is float32, expected bool"),
        ("scale", torch.zeros(3), r"scale has shape \[3\], expected one value or one for each of 2 clients"),
        ("v_steps", torch.zeros(3), r"v_steps has shape \[3\], expected one value or one for each of 2 clients"),
        ("x", torch.zeros(5), "delta is missing: delta = y − x needs both"),
        ("delta", torch.zeros(2, 5), "x is missing: delta = y − x needs both"),
        ("lr", torch.zeros((), device="meta"), "lr is on meta, expected"),
    ],
)
def test_refuses(backend: str, name: str, value: Tensor, message: str) -> None:
    tensors = dict(zip("ymvg", state(2, 5), strict=True))
    given = {"lr": scalar(0.1), "step": scalar(1), "v_steps": scalar(0), **CONSTANTS}
    moved = value if value.is_meta else value.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        fused_adamw(**{**tensors, **given, name: moved}, backend=backend)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("with_options", [False, True])
def test_opcheck(backend: str, with_options: bool) -> None:
    y, m, v, g = state(2, 70)
    rest = options(2, 70) if with_options else dict.fromkeys(options(1, 1)) | {"share": 1.0, "alpha": 0.0}
    arguments = (y, m, v, g, scalar(0.1), scalar(2), scalar(0), *CONSTANTS.values(), *rest.values())
    if backend == "triton":
        import fedkernels.kernels.fused_adamw.triton  # noqa: F401  defines the operator
    torch.library.opcheck(getattr(torch.ops.fedkernels, f"fused_adamw_{backend}").default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph_that_follows_its_scalars(backend: str) -> None:
    def step(y: Tensor, m: Tensor, v: Tensor, g: Tensor, lr: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        fused_adamw(y, m, v, 2 * g, lr=lr, step=k, v_steps=seen, **CONSTANTS, backend=backend)
        return y + 1

    compiled = torch.compile(step, fullgraph=True)
    plain, fast = state(2, 300), state(2, 300)
    for k in range(1, 4):
        scalars = scalar(0.1 / k), scalar(k), scalar(5)
        with torch._dynamo.config.patch(error_on_recompile=k > 1):
            found, true = compiled(*fast, *scalars), step(*plain, *scalars)
        torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-6)
        for a, b in zip(fast, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [257, 4096])
def test_rows_may_lie_apart(backend: str, d: int) -> None:
    """Bit for bit the step of rows side by side, each tensor with a stride of its own; what lies between stays."""
    given = {"lr": scalar(0.03), "step": scalar(2), "v_steps": scalar(3), **CONSTANTS, "backend": backend}
    expected, rest = state(3, d), options(3, d)
    views, wholes = zip(*(apart(tensor, 3 * i, 5 - i) for i, tensor in enumerate(expected)), strict=True)
    source, delta = apart(rest["source"], 1, 2)[0], apart(rest["delta"], 4, 4)[0]
    fused_adamw(*expected, **given, **rest)
    fused_adamw(*views, **given, **rest | {"source": source, "delta": delta})
    for view, whole, tensor in zip((*views, delta), (*wholes, delta), (*expected, rest["delta"]), strict=True):
        assert torch.equal(view, tensor)
        if whole is not view:
            assert int(whole.isnan().sum()) == whole.numel() - view.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_read_may_be_the_same(backend: str) -> None:
    given = {"lr": scalar(0.03), "step": scalar(1), "v_steps": scalar(0), **CONSTANTS, "backend": backend}
    expected, found, start = state(3, 300), state(3, 300), row(300, 9)
    fused_adamw(*expected, **given, source=start.repeat(3, 1))
    fused_adamw(*found, **given, source=start.expand(3, -1))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    y, m, v, g = state(3, 300)
    with pytest.raises(ValueError, match=r"m has rows that overlap: strides \[0, 1\] of shape \[3, 300\]"):
        fused_adamw(y, m[:1].expand(3, -1), v, g, **given)
