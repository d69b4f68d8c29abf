"""The sharpness-aware gradient against torch.autograd client by client."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import CLASSES, tiny_data, tiny_engine, tiny_model
from torch import Tensor
from torch.func import functional_call

from fedkernels.algorithms import FedSam
from fedkernels.contract import Batch, Round
from fedkernels.federated.evaluators import BoundModule, Choice, make_evaluator
from fedkernels.federated.local import rescale_, run_local, sam_gradient
from fedkernels.federated.objective import Objective
from fedkernels.federated.task import LocalTask
from fedkernels.layout import Layout, Role
from fedkernels.optim import Sgd

CLIENTS, SAMPLES, RHO = 3, 6, 0.3


def a_batch(active: list[bool] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(CLIENTS, SAMPLES, 1, 4, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(CLASSES, (CLIENTS, SAMPLES), generator=generator)
    weights = (torch.arange(SAMPLES) < torch.tensor([6, 0 if active else 4, 1])[:, None]).double()
    return Batch(inputs, targets, weights, None if active is None else torch.tensor(active))


class OneBatch:
    """Batches that are all the same one."""

    def __init__(self, batch: Batch, steps: int) -> None:
        self.batch, self.k = batch, steps

    def draw(self, clients: Any, r: int) -> Iterator[Batch]:
        return iter([self.batch] * self.k)

    def steps(self, clients: Any) -> list[int]:
        return [self.k] * len(clients)


def a_task(evaluator: str, batch: Batch, clip_norm: float = float("inf"), steps: int = 1) -> tuple[LocalTask, Layout]:
    objective = Objective(tiny_model(), tiny_data(), torch.device("cpu"))
    layout = Layout.of(objective.module)
    choice = Choice(evaluator, CLIENTS, "")  # type: ignore[arg-type]
    made = make_evaluator(choice, objective, layout, BoundModule(objective, layout))
    g = torch.full((CLIENTS, layout.d), torch.nan, dtype=torch.float64)
    batches: Any = OneBatch(batch, steps)
    whole, r = [None] * CLIENTS, Round(0, 3, 3, steps, 0.1)
    return LocalTask(layout, batches, range(CLIENTS), whole, r, made, g, clip_norm), layout


def points(layout: Layout) -> Tensor:
    """A row of parameters a client, around those of the tiny model."""
    x = layout.flatten(dict(tiny_model().named_parameters()))
    return x + 0.1 * torch.randn(CLIENTS, layout.d, generator=torch.Generator().manual_seed(3), dtype=x.dtype)


def by_autograd(layout: Layout, row: Tensor, batch: Batch, c: int, clip_norm: float) -> Tensor:
    assert batch.weights is not None
    keep = batch.weights[c] > 0
    leaf = row.clone().requires_grad_()
    logits = functional_call(tiny_model(), layout.views(leaf), (batch.inputs[c][keep],))
    (g,) = torch.autograd.grad(F.cross_entropy(logits, batch.targets[c][keep]), leaf)
    return g * min(1.0, clip_norm / float(g.norm()))


@pytest.mark.parametrize("clip_norm", [float("inf"), 0.2])
@pytest.mark.parametrize("evaluator", ["loop", "batched"])
def test_sam_gradient(evaluator: str, clip_norm: float) -> None:
    batch = a_batch()
    task, layout = a_task(evaluator, batch, clip_norm)
    y = points(layout)
    start = y.clone()
    gradient = sam_gradient(task, RHO)
    for _ in range(2):  # the second call finds what the first left in its buffers
        found = gradient(y, batch)
        assert torch.equal(y, start)
        for c in range(CLIENTS):
            g = by_autograd(layout, y[c], batch, c, float("inf"))
            expected = by_autograd(layout, y[c] + RHO * g / g.norm(), batch, c, clip_norm)
            torch.testing.assert_close(found[c], expected, rtol=1e-10, atol=1e-12)
            assert (found[c] - g).norm() > 1e-3


@pytest.mark.parametrize("evaluator", ["loop", "batched"])
def test_a_client_without_a_step_left_stays_where_it_is(evaluator: str) -> None:
    batch = a_batch([True, False, True])
    task, layout = a_task(evaluator, batch, steps=2)
    start = points(layout)
    y, _ = run_local(task, start, Sgd(), grad=sam_gradient(task, RHO))
    assert torch.equal(y[1], start[1])
    for c in (0, 2):
        expected = start[c]
        for _ in range(2):
            g = by_autograd(layout, expected, batch, c, float("inf"))
            expected = expected - 0.1 * by_autograd(layout, expected + RHO * g / g.norm(), batch, c, float("inf"))
        torch.testing.assert_close(y[c], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_gradient_leads_nowhere(dtype: torch.dtype) -> None:
    asked = []

    def grad(y: Tensor, batch: Batch) -> Tensor:
        asked.append(y.clone())
        return torch.zeros_like(y)

    layout = Layout({"w": (3,)}, {"w": Role("bias")})
    task: Any = SimpleNamespace(grad=grad, steps=torch.ones(2, 1, dtype=dtype), layout=layout)
    y = torch.arange(6, dtype=dtype).view(2, 3)
    assert torch.equal(sam_gradient(task, RHO)(y, a_batch()), torch.zeros_like(y))
    assert len(asked) == 2
    assert torch.equal(asked[0], y)
    assert torch.equal(asked[1], y)


def test_rescaled_vectors_have_the_length() -> None:
    v = torch.tensor([[3.0, 4.0], [1e-30, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert rescale_(v, 2.0) is v
    torch.testing.assert_close(v[0], torch.tensor([1.2, 1.6], dtype=torch.float64), rtol=1e-10, atol=0)
    assert v.isfinite().all()
    assert not v[2].any()


def test_the_reported_loss_is_that_of_the_first_gradient() -> None:
    engine = tiny_engine(FedSam(rho=5.0), lr=1e-9)
    small = tiny_engine(FedSam(rho=0.0), lr=1e-9)
    assert engine.run_round()["train_loss"] == pytest.approx(small.run_round()["train_loss"], rel=1e-9)
