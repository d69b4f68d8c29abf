"""Values, gradients and Hessian products of sample losses against whole Hessians of named tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diagnostics.dense import DenseLoss
from oracles.comparison import MODEL_FACTS, Built, both
from support import tiny_data, tiny_engine, tiny_model
from torch import Tensor, nn

from fedkernels.algorithms import FedAvg
from fedkernels.config import choice
from fedkernels.data.datasets import Digits
from fedkernels.diagnostics import loss as loss_module
from fedkernels.diagnostics.loss import SampleLoss
from fedkernels.diagnostics.spectrum import hutchinson, lanczos
from fedkernels.federated.objective import Objective
from fedkernels.layout import Layout
from fedkernels.models import MODELS

INDICES = np.array([3, 17, 3, *range(40, 70)])  # one sample twice


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", 8)


def draws(x: Tensor) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(5)
    return lambda: torch.randn(x.numel(), generator=generator, dtype=x.dtype)


@pytest.mark.usefixtures("small_chunks")
def test_derivatives_and_spectrum_equal_those_of_the_whole_hessian() -> None:
    engine = tiny_engine(FedAvg())
    engine.run_round()
    x = engine.server.x
    f, dense = SampleLoss(engine.objective, engine.layout, INDICES), DenseLoss(engine.layout, INDICES)
    h = dense.hessian(x)
    assert f.samples == len(INDICES)
    assert f(x) == pytest.approx(float(dense(x)), rel=1e-12)
    torch.testing.assert_close(
        f.gradient(x),
        torch.autograd.functional.jacobian(dense, x),
        rtol=1e-10,
        atol=1e-12,  # type: ignore[no-untyped-call]
    )
    v = draws(x)()
    torch.testing.assert_close(f.hvp(x, v), h @ v, rtol=1e-10, atol=1e-12)

    exact = torch.linalg.eigvalsh(h).numpy()
    top = lanczos(lambda v: f.hvp(x, v), draws(x), 60, 1e-6)
    assert len(top.values) < 60
    assert top.values[-1] == pytest.approx(exact[-1], rel=1e-9)  # the error is of the order of the residual squared
    signs = draws(x)
    found = hutchinson(lambda v: f.hvp(x, v), lambda: signs().sign(), 200)
    assert found.standard_error < 0.1 * abs(exact.sum())
    assert abs(found.value - exact.sum()) <= 3 * found.standard_error


def test_the_whole_spectrum_of_a_smaller_model() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 2), nn.Tanh(), nn.Linear(2, 4)).double()
    layout = Layout.of(module)
    x = layout.flatten(dict(module.named_parameters()))
    f = SampleLoss(Objective(module, tiny_data(), torch.device("cpu")), layout, INDICES)
    exact = torch.linalg.eigvalsh(DenseLoss(layout, INDICES, module).hessian(x)).numpy()
    assert exact[0] < 0 < exact[-1]
    whole = lanczos(lambda v: f.hvp(x, v), draws(x), layout.d, 0.0)
    np.testing.assert_allclose(whole.values, exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "model",
    [
        "lenet5",
        {"name": "vit", "dim": 12, "depth": 1, "heads": 2, "patch": 4},
        {"name": "resnet18", "width": 2},
    ],
    ids=str,
)
def test_products_of_larger_models_are_differences_of_gradients(model: Any) -> None:
    data = Digits().load()
    torch.manual_seed(0)
    module = choice(MODELS, model, "model").build(data.kind, data.input_shape, data.classes).double()
    layout = Layout.of(module)
    x = layout.flatten(dict(module.named_parameters()))
    check_products(SampleLoss(Objective(module, data, torch.device("cpu")), layout, np.arange(12)), x)


@pytest.mark.parametrize("model", MODEL_FACTS)
def test_products_of_every_kind_of_layer(model: Callable[[], Built]) -> None:
    engine, _ = both(FedAvg(), model, {})
    check_products(SampleLoss(engine.objective, engine.layout, np.arange(12)), engine.server.x)


def check_products(f: SampleLoss, x: Tensor) -> None:
    v = draws(x)()
    e = 1e-5
    difference = (f.gradient(x + e * v / v.norm()) - f.gradient(x - e * v / v.norm())) * (v.norm() / (2 * e))
    torch.testing.assert_close(f.hvp(x, v), difference, rtol=1e-4, atol=1e-5 * float(difference.abs().max()))


def test_float32_is_close_to_float64() -> None:
    x = tiny_engine(FedAvg()).server.x
    losses = []
    for dtype in (torch.float64, torch.float32):
        module = tiny_model().to(dtype)
        layout = Layout.of(module)
        f = SampleLoss(Objective(module, tiny_data(), torch.device("cpu")), layout, INDICES)
        y = layout.flatten(dict(module.named_parameters()))
        v = draws(x)().to(dtype)
        losses.append((torch.tensor(f(y)), f.gradient(y), f.hvp(y, v)))
        assert f.hvp(y, v).dtype == torch.float64
    for exact, rounded in zip(*losses, strict=True):
        torch.testing.assert_close(rounded.double(), exact.double(), rtol=1e-4, atol=1e-5)


def test_dropout_is_off_and_the_module_is_left_as_it_was() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 4)).double()
    layout = Layout.of(module)
    f = SampleLoss(Objective(module, tiny_data(), torch.device("cpu")), layout, INDICES)
    x = layout.flatten(dict(module.named_parameters()))
    before = {name: value.clone() for name, value in module.named_parameters()}
    assert f(x) == f(x)
    f.hvp(x, x)
    assert module.training
    assert all(torch.equal(value, before[name]) and value.grad is None for name, value in module.named_parameters())
