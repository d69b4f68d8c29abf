"""Local optimizers on flat `[C, d]` against torch's optimizers, one instance per client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import tiny_model, tiny_roles
from torch import Tensor, nn

from fedkernels.algorithms.fedlada import AmsGrad
from fedkernels.contract import LocalOptimizer, Move
from fedkernels.layout import Layout, Role
from fedkernels.optim import OPTIMIZERS, AdamW, Muon, Sgd, Shampoo, Soap, Sophia

CLIENTS, STEPS, LR = 3, 6, 0.03


def layout() -> Layout:
    module = tiny_model()
    return Layout.of(module, tiny_roles(module))


def gradients(d: int, scale: float = 1.0) -> Tensor:
    """`[steps, C, d]`, different for every client and step."""
    return scale * torch.randn(STEPS, CLIENTS, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def stepped(optimizer: LocalOptimizer, lay: Layout, g: Tensor) -> Tensor:
    """`y [C, d]` after all steps, from different starts."""
    y = start(lay)
    state = optimizer.init(y, lay)
    assert all(value.shape[0] == CLIENTS for value in state.values())
    assert set(optimizer.shared) <= set(state)
    for k, gradient in enumerate(g, start=1):
        kept = gradient.clone()
        optimizer.step(state, gradient, y, k, lay, move(LR))
        assert torch.equal(gradient, kept), "g was written to"
    return y


def move(lr: float, dtype: torch.dtype = torch.float64, **rest: Any) -> Move:
    return Move(torch.tensor(lr, dtype=dtype), **rest)


def direction(optimizer: LocalOptimizer, lay: Layout, g: Tensor) -> Tensor:
    """P of a first step from zero."""
    y = torch.zeros_like(g)
    optimizer.step(optimizer.init(y, lay), g, y, 1, lay, move(-1.0))
    return y


def normal(d: int) -> Tensor:
    return torch.randn(d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def start(lay: Layout) -> Tensor:
    return torch.randn(CLIENTS, lay.d, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def by_torch(make: Callable[[dict[str, nn.Parameter]], list[torch.optim.Optimizer]], lay: Layout, g: Tensor) -> Tensor:
    """The same with torch's optimizers over named tensors, client by client."""
    rows = []
    for c, row in enumerate(start(lay)):
        parameters = {name: nn.Parameter(view.clone()) for name, view in lay.views(row).items()}
        optimizers = make(parameters)
        for gradient in g[:, c]:
            for name, view in lay.views(gradient).items():
                parameters[name].grad = view.clone()
            for optimizer in optimizers:
                optimizer.step()
        rows.append(lay.flatten(parameters))
    return torch.stack(rows)


def test_the_table_names_every_optimizer() -> None:
    named = {"sgd": Sgd, "adamw": AdamW, "muon": Muon, "soap": Soap, "sophia": Sophia, "shampoo": Shampoo}
    assert named == OPTIMIZERS


EVERY = [
    *(Sgd(), Sgd(weight_decay=0.1), Sgd(momentum=0.9), AdamW(), AdamW(beta1=0.0, beta2=0.0)),
    *(Muon(), Muon(momentum=0.0, lr_multiplier=3.0), Soap(), Soap(refresh_every=2), Sophia(), Shampoo(refresh_every=2)),
    AmsGrad(beta1=0.9, beta2=0.9),
]


@pytest.mark.parametrize("n_blocks", [1, 3])
@pytest.mark.parametrize("optimizer", EVERY, ids=repr)
def test_inactive_rows_keep_every_bit_whatever_their_gradient(optimizer: LocalOptimizer, n_blocks: int) -> None:
    """And the others step as ever."""
    module = tiny_model()
    lay = Layout.of(module, tiny_roles(module), blocks=n_blocks)
    y, others = start(lay), start(lay)[[0, 2]]
    state, expected = optimizer.init(y, lay), optimizer.init(others, lay)
    G, active = normal(lay.d), torch.tensor([True, False, True])
    for k, g in enumerate(gradients(lay.d), start=1):
        now = None if k < 3 else active
        if k == 3:
            kept = y[1].clone(), {name: value[1].clone() for name, value in state.items() if name != "m_steps"}
        g[1] = g[1] if k < 3 else torch.nan
        optimizer.step(state, g, y, k, lay, move(LR, share=0.7, alpha=0.3, G=G, active=now))
        optimizer.step(expected, g[[0, 2]], others, k, lay, move(LR, share=0.7, alpha=0.3, G=G))
    assert torch.equal(y[1], kept[0])
    assert all(torch.equal(state[name][1], value) for name, value in kept[1].items())
    torch.testing.assert_close(y[[0, 2]], others, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("n_blocks", [1, 3])
@pytest.mark.parametrize("optimizer", EVERY, ids=repr)
def test_a_share_of_the_direction_and_the_global_direction(optimizer: LocalOptimizer, n_blocks: int) -> None:
    """`y − η(sP + αG)`, P being the difference that a step makes without them."""
    module = tiny_model()
    lay = Layout.of(module, tiny_roles(module), blocks=n_blocks)
    y, G = start(lay), normal(lay.d)
    plain, mixed = optimizer.init(y, lay), optimizer.init(y, lay)
    for k, g in enumerate(gradients(lay.d), start=1):
        alone = y.clone()
        optimizer.step(plain, g, alone, k, lay, move(1.0))
        expected = y - LR * (0.7 * (y - alone) + 0.3 * G)
        optimizer.step(mixed, g, y, k, lay, move(LR, share=0.7, alpha=0.3, G=G))
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd(momentum: float, weight_decay: float) -> None:
    lay, options = layout(), {"momentum": momentum, "weight_decay": weight_decay}
    g = gradients(lay.d)
    expected = by_torch(lambda p: [torch.optim.SGD(p.values(), lr=LR, **options)], lay, g)
    torch.testing.assert_close(stepped(Sgd(**options), lay, g), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "options", [{}, {"beta1": 0.0, "beta2": 0.5}, {"beta1": 0.8, "beta2": 0.95, "eps": 0.1, "weight_decay": 0.5}]
)
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_adamw(options: dict[str, float], scale: float) -> None:
    lay = layout()
    g = gradients(lay.d, scale)
    betas = options.get("beta1", 0.9), options.get("beta2", 0.999)
    rest = {"eps": options.get("eps", 1e-8), "weight_decay": options.get("weight_decay", 0.01)}
    expected = by_torch(lambda p: [torch.optim.AdamW(p.values(), lr=LR, betas=betas, **rest)], lay, g)
    torch.testing.assert_close(stepped(AdamW(**options), lay, g), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seen", [0, 7, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_counts_the_steps_of_each_moment(seen: int, dtype: torch.dtype) -> None:
    """Under a constant gradient both corrected moments are exact: P = g/(|g| + ε), however long v has been built."""
    lay, optimizer = layout(), AdamW(weight_decay=0.0)
    g = gradients(lay.d)[0].to(dtype)
    state = optimizer.init(torch.zeros_like(g), lay)
    state["v"].copy_(g.double().square() * (1 - 0.999**seen))
    state["v_steps"].fill_(seen)
    for k in range(1, 4):
        p = torch.zeros_like(g)
        optimizer.step(state, g, p, k, lay, move(-1.0, dtype))
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(p, g / (g.abs() + 1e-8), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "weight_decay": 0.3, "ns_steps": 3}])
@pytest.mark.parametrize("n_blocks", [1, 3])
def test_muon(options: dict[str, Any], n_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's Muon iterates in bfloat16, here kept in float64; large gradients make the ε of its norm irrelevant."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)
    module = tiny_model()
    lay = Layout.of(module, tiny_roles(module), blocks=n_blocks)
    hidden = {"1.weight", "4.weight", "6.weight"}
    decay, momentum = options.get("weight_decay", 0.01), options.get("momentum", 0.95)
    g = gradients(lay.d, 1e8)

    def make(p: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
        matrices = [p[name] for name in p if name in hidden]
        others = [p[name] for name in p if name not in hidden]
        steps = options.get("ns_steps", 5)
        return [
            torch.optim.Muon(matrices, lr=LR, weight_decay=decay, momentum=momentum, ns_steps=steps),
            torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.95), eps=1e-10, weight_decay=decay),
        ]

    expected = by_torch(make, lay, g)
    torch.testing.assert_close(stepped(Muon(**options), lay, g), expected, rtol=1e-11, atol=1e-11)


def test_muon_multiplier_scales_the_matrices_alone() -> None:
    """At a large gradient, `P - λy` of matrices is 4 times as long, of the rest the same."""
    lay = layout()
    g = gradients(lay.d)[0]
    directions = [direction(Muon(lr_multiplier=multiplier, weight_decay=0.0), lay, g) for multiplier in (1.0, 4.0)]
    torch.testing.assert_close(lay.matrices(directions[1]), 4 * lay.matrices(directions[0]), rtol=1e-14, atol=0)
    assert torch.equal(lay.vectors(directions[1]), lay.vectors(directions[0]))


def test_muon_of_a_conv1d_weight_is_that_of_its_transpose() -> None:
    """`(in, out)` storage gives the transposed direction, √(out/in) included."""
    plain = Layout({"w": (9, 4)}, {"w": Role("matrix", 0)})
    turned = Layout({"w": (4, 9)}, {"w": Role("matrix", 1)})
    g = gradients(36)[0, :1]
    expected = direction(Muon(), plain, g).view(9, 4)
    found = direction(Muon(), turned, g.view(9, 4).T.reshape(1, 36)).view(4, 9)
    torch.testing.assert_close(found.T, expected, rtol=1e-13, atol=1e-13)


def test_muon_without_matrices() -> None:
    lay = Layout({"bias": (5,)}, {"bias": Role("bias")})
    with pytest.raises(ValueError, match="Muon needs hidden weight matrices, and this model has none"):
        Muon().init(torch.zeros(1, 5), lay)
