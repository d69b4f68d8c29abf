"""SOAP, Shampoo and Sophia on flat `[C, d]` against float64 loops over tensors, one client at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedkernels.contract import LocalOptimizer, Move
from fedkernels.layout import Layout, Role
from fedkernels.optim import Shampoo, Soap, Sophia
from fedkernels.optim.kronecker import NULL_SHARE, eigenbasis, eigh, factor_size, factors

CLIENTS, STEPS, LR = 3, 8, 0.03
SHAPES = {"a": (5, 5), "bias": (7,), "wide": (3, 6), "b": (5, 5)}


def layout(shapes: dict[str, tuple[int, ...]] | None = None) -> Layout:
    shapes = shapes or SHAPES
    return Layout(shapes, {name: Role("matrix" if len(shape) > 1 else "bias") for name, shape in shapes.items()})


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(lay: Layout) -> Tensor:
    return normal(STEPS, CLIENTS, lay.d, seed=3)


def shared_factors(lay: Layout) -> Tensor:
    """Positive definite, with eigenvalues well apart, different for every client."""
    vector = torch.zeros(CLIENTS, factor_size(lay), dtype=torch.float64)
    for i, pair in enumerate(factors(vector, lay)):
        for j, a in enumerate(pair):
            q = torch.linalg.qr(normal(*a.shape, seed=10 * i + j)).Q
            a.copy_(q * torch.arange(1, a.shape[-1] + 1) @ q.mT)
    return vector


def stepped(optimizer: LocalOptimizer, lay: Layout, **start: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """`y [C, d]` and the state after all steps from y = 1."""
    y = torch.ones(CLIENTS, lay.d, dtype=torch.float64)
    state = optimizer.init(y, lay)
    for name, value in start.items():
        state[name].copy_(value)
    for k, g in enumerate(gradients(lay), start=1):
        optimizer.step(state, g, y, k, lay, move(LR))
    return y, state


def move(lr: float) -> Move:
    return Move(torch.tensor(lr, dtype=torch.float64))


def by_tensor(
    direction: Callable[[str, int], Callable[[Tensor, Tensor, int], Tensor]], lay: Layout
) -> dict[str, Tensor]:
    """`y [C, *shape]` by name; `direction` makes a client's rule for one tensor."""
    out = {}
    for entry in lay.entries:
        rows = []
        for c in range(CLIENTS):
            y, rule = torch.ones(entry.shape, dtype=torch.float64), direction(entry.name, c)
            for k, g in enumerate(gradients(lay), start=1):
                y = y - LR * rule(lay.views(g[c])[entry.name], y, k)
            rows.append(y)
        out[entry.name] = torch.stack(rows)
    return out


def assert_same(found: Tensor, expected: dict[str, Tensor], lay: Layout, tolerance: float) -> None:
    for name, view in lay.views(found).items():
        torch.testing.assert_close(view, expected[name], rtol=tolerance, atol=tolerance)


def pair_of(vector: Tensor, lay: Layout, name: str, c: int) -> list[Tensor]:
    """A client's two factors of one matrix."""
    for slab, pair in zip(lay.slabs, factors(vector, lay), strict=True):
        names = [entry.name for entry in lay.entries if slab.start <= entry.start < slab.stop]
        if name in names:
            return [a[c, names.index(name)].clone() for a in pair]
    raise AssertionError(name)


def descending(a: Tensor) -> Tensor:
    return torch.linalg.eigh(a).eigenvectors.flip(1)


def soap_rule(
    H: list[Tensor] | None,
    fresh: bool,
    *,
    betas: tuple[float, float],
    beta: float,
    eps: float,
    decay: float,
    every: int,
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The order of the published code: m turned with the basis, factors learn after the step."""
    Q = None if H is None or fresh else [descending(a) for a in H]
    m = v = torch.zeros(())

    def rule(g: Tensor, y: Tensor, k: int) -> Tensor:
        nonlocal Q, m, v
        p, t = torch.zeros_like(g), k - fresh
        if t > 0:
            turned = g if Q is None else Q[0].T @ g @ Q[1]
            m = betas[0] * m + (1 - betas[0]) * turned
            v = betas[1] * v + (1 - betas[1]) * turned**2
            p = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
            p = (p if Q is None else Q[0] @ p @ Q[1].T) + decay * y
        if H is None:
            return p
        H[0] = beta * H[0] + (1 - beta) * g @ g.T
        H[1] = beta * H[1] + (1 - beta) * g.T @ g
        if Q is None:
            Q = [descending(a) for a in H]
        if k % every == 0:
            m = Q[0] @ m @ Q[1].T if t > 0 else torch.zeros_like(g)
            orders = []
            for side in (0, 1):
                order = (Q[side].T @ H[side] @ Q[side]).diag().argsort(descending=True)
                shifted = H[side] + NULL_SHARE * H[side].trace() * torch.eye(len(H[side])).double()
                Q[side] = torch.linalg.qr(shifted @ Q[side][:, order]).Q
                orders.append(order)
            m = Q[0].T @ m @ Q[1]
            v = v[orders[0]][:, orders[1]] if t > 0 else v
        return p

    return rule


@pytest.mark.parametrize(
    "options",
    [{}, {"refresh_every": 3}, {"refresh_every": 1, "beta1": 0.8, "beta2": 0.7, "shampoo_beta": 0.6, "eps": 0.1}],
)
@pytest.mark.parametrize("fresh", [(False,) * 3, (True,) * 3, (True, False, True)])
def test_soap(options: dict[str, Any], fresh: tuple[bool, ...]) -> None:
    """Fresh clients have square matrices alone, whose first gradient has no null space."""
    lay = layout({name: SHAPES[name] for name in ("a", "bias", "b")} if any(fresh) else None)
    H = shared_factors(lay) * ~torch.tensor(fresh)[:, None]
    soap = Soap(weight_decay=0.2, **options)
    betas, rest = (soap.beta1, soap.beta2), {"beta": soap.shampoo_beta, "eps": soap.eps, "decay": 0.2}

    def direction(name: str, c: int) -> Callable[[Tensor, Tensor, int], Tensor]:
        pair = pair_of(H, lay, name, c) if name != "bias" else None
        return soap_rule(pair, fresh[c], betas=betas, every=soap.refresh_every, **rest)

    assert_same(stepped(soap, lay, H=H)[0], by_tensor(direction, lay), lay, 1e-9)


def test_a_fresh_client_of_soap_stands_still_once() -> None:
    lay = layout()
    y, g = torch.ones(2, lay.d, dtype=torch.float64), normal(2, lay.d, seed=0)
    soap = Soap()
    state = soap.init(y, lay)
    soap.step(state, g, y, 1, lay, move(LR))
    assert torch.equal(y, torch.ones_like(y))
    assert not state["m"].any()
    assert not state["v"].any()
    for slab, (left, right) in zip(lay.slabs, factors(state["H"], lay), strict=True):
        matrix = slab.view(g)
        torch.testing.assert_close(left, 0.05 * matrix @ matrix.mT, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(right, 0.05 * matrix.mT @ matrix, rtol=1e-12, atol=1e-12)
    soap.step(state, g, y, 2, lay, move(LR))
    assert (y != 1).all()


@pytest.mark.parametrize("optimizer", [Soap(refresh_every=1), Shampoo(refresh_every=1), Sophia()], ids=repr)
def test_zero_gradients_leave_only_weight_decay(optimizer: Any) -> None:
    lay = layout()
    y = torch.ones(2, lay.d, dtype=torch.float64)
    state = optimizer.init(y, lay)
    for k in (1, 2, 3):
        before = y.clone()
        optimizer.step(state, torch.zeros_like(y), y, k, lay, move(1.0))
        shrunk = 1.0 if k == 1 and isinstance(optimizer, Soap) else 1 - optimizer.weight_decay
        torch.testing.assert_close(y, before * shrunk, rtol=1e-14, atol=0)


@pytest.mark.parametrize("optimizer", [Soap(refresh_every=1), Shampoo(refresh_every=1), Sophia()], ids=repr)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [1, 2])
def test_a_gradient_that_is_not_finite_stays_with_its_client(optimizer: Any, bad: float, at: int) -> None:
    lay = layout()
    g = gradients(lay)
    expected, y = (torch.ones(3, lay.d, dtype=torch.float64) for _ in range(2))
    clean, spoilt = optimizer.init(expected, lay), optimizer.init(y, lay)
    for k in (1, 2, 3):
        optimizer.step(clean, g[k], expected, k, lay, move(LR))
        gradient = g[k].clone()
        if k == at:
            gradient[1] = bad
        optimizer.step(spoilt, gradient, y, k, lay, move(LR))
        assert torch.equal(y[[0, 2]], expected[[0, 2]])
        if k >= at and not isinstance(optimizer, Sophia):
            assert not y[1].isfinite().all()


def test_the_eigenbasis_of_singular_matrices_does_not_follow_rounding() -> None:
    root = normal(4, 8, 3, seed=1)
    a = root @ root.mT
    basis = eigenbasis(a)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(8).double().expand(4, 8, 8), rtol=0, atol=1e-12)
    inside = basis.mT @ a @ basis
    diagonal = inside.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(inside, torch.diag_embed(diagonal), rtol=0, atol=1e-11)
    assert (diagonal.diff()[:, :2] < 0).all()
    assert diagonal[:, 3:].abs().max() < 1e-11
    noise = 1e-14 * normal(4, 8, 8, seed=2)
    other = eigenbasis(1e-3 * (a + noise + noise.mT))
    overlap = (basis * other).sum(-2).abs()
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-12)
    plain = torch.linalg.eigh(a).eigenvectors, torch.linalg.eigh(a + noise + noise.mT).eigenvectors
    assert (plain[0] * plain[1]).sum(-2).abs().min() < 0.9  # which torch's own do


def test_the_eigenbasis_of_nothing_is_that_of_coordinates() -> None:
    assert torch.equal(eigenbasis(torch.zeros(2, 4, 4)).abs(), torch.eye(4).double().expand(2, 4, 4))


def test_eigh_passes_what_is_not_finite_on() -> None:
    a = torch.eye(3).repeat(3, 1, 1)
    a[1, 0, 2] = torch.nan
    values, vectors = eigh(a)
    assert values.isnan().all(-1).tolist() == vectors.isnan().all(-1).all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("root", [2, 4])
@pytest.mark.parametrize(("every", "seen"), [(10, 0), (3, 0), (3, 50), (1, 7)])
def test_shampoo(root: Any, every: int, seen: int) -> None:
    lay = layout()
    shampoo = Shampoo(root=root, refresh_every=every, beta=0.8, eps=0.02, weight_decay=0.2, lr_multiplier=3.0)
    H = shared_factors(lay) if seen else torch.zeros(CLIENTS, factor_size(lay), dtype=torch.float64)

    def direction(name: str, c: int) -> Callable[[Tensor, Tensor, int], Tensor]:
        if name == "bias":
            return soap_rule(None, False, betas=(0.9, 0.95), beta=0.0, eps=1e-10, decay=0.2, every=10**9)
        pair, roots = pair_of(H, lay, name, c), [torch.zeros(())] * 2

        def rule(g: Tensor, y: Tensor, k: int) -> Tensor:
            for side, outer in enumerate((g @ g.T, g.T @ g)):
                pair[side] = 0.8 * pair[side] + 0.2 * outer
                if k in range(1, STEPS + 1, every):
                    values, vectors = torch.linalg.eigh(pair[side] / (1 - 0.8 ** (seen + k)))
                    roots[side] = vectors @ torch.diag((values + 0.02) ** (-1 / root)) @ vectors.T
            return 3 * roots[0] @ g @ roots[1] + 0.2 * y

        return rule

    found, state = stepped(shampoo, lay, H=H, H_steps=torch.tensor(float(seen)))
    assert_same(found, by_tensor(direction, lay), lay, 1e-10)
    assert set(shampoo.shared + shampoo.counters) <= set(state)


def test_the_first_step_of_shampoo_is_orthogonal() -> None:
    """`(GGᵀ)^(−1/4) G (GᵀG)^(−1/4) = UVᵀ`, whatever β: the bias of the average is corrected."""
    lay = layout({"w": (4, 4)})
    g = normal(1, 16, seed=5)
    shampoo = Shampoo(eps=1e-12, weight_decay=0.0)
    p = torch.zeros_like(g)
    shampoo.step(shampoo.init(g, lay), g, p, 1, lay, move(-1.0))
    u, _, vt = torch.linalg.svd(g.view(4, 4))
    torch.testing.assert_close(p.view(4, 4), u @ vt, rtol=0, atol=1e-8)


@pytest.mark.parametrize("rho", [0.01, 1.0])
def test_sophia(rho: float) -> None:
    """`sign(m) min(1, |m|/(ρh + 1e-15)) + λy`, with both kinds of coordinates."""
    lay = layout()
    h = normal(CLIENTS, lay.d, seed=6).square()
    h[:, ::5] = 0
    sophia = Sophia(rho=rho, beta1=0.8, weight_decay=0.3)

    def direction(name: str, c: int) -> Callable[[Tensor, Tensor, int], Tensor]:
        m, curvature = torch.zeros(()), lay.views(h[c])[name]

        def rule(g: Tensor, y: Tensor, k: int) -> Tensor:
            nonlocal m
            m = 0.8 * m + 0.2 * g
            return m.sign() * (m.abs() / (rho * curvature + 1e-15)).clamp(max=1) + 0.3 * y

        return rule

    assert_same(stepped(sophia, lay, h=h)[0], by_tensor(direction, lay), lay, 1e-12)


def test_sophia_averages_the_estimates() -> None:
    sophia = Sophia(beta2=0.75, hessian_every=4)
    assert [k for k in range(1, 12) if sophia.curvature_due(k)] == [1, 5, 9]
    g_hat, labels = normal(2, 3, seed=7), torch.tensor([[4.0], [6.0]]).double()
    state = {"h": torch.ones(2, 3).double()}
    sophia.observe(state, g_hat, labels)
    torch.testing.assert_close(state["h"], 0.75 + 0.25 * labels * g_hat**2, rtol=1e-14, atol=0)
