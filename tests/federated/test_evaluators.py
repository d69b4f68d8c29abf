"""Gradients of `C` clients, however they are computed, against torch.autograd client by client."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import CLASSES, tiny_data, tiny_engine, tiny_model
from torch import Tensor, nn
from torch.func import functional_call

from fedkernels.algorithms import FedAvg
from fedkernels.contract import Batch
from fedkernels.federated import evaluators
from fedkernels.federated.engine import LocalTask
from fedkernels.federated.evaluators import BoundModule, Choice, Evaluator, choose, make_evaluator
from fedkernels.federated.objective import Objective
from fedkernels.layout import Layout

CLIENTS, SAMPLES = 4, 6


def conv_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Tanh(), nn.Flatten(), nn.Linear(96, CLASSES)
    ).double()  # fmt: skip


@pytest.fixture(params=[tiny_model, conv_model])
def module(request: pytest.FixtureRequest) -> nn.Module:
    return request.param()


@pytest.fixture(params=["loop", "batched", "compiled"])
def made(
    request: pytest.FixtureRequest, module: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Evaluator, Layout]]:
    # The compiler's tracing and gradients, without the minutes of code generation.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    objective = Objective(module, tiny_data(), torch.device("cpu"))
    layout = Layout.of(module)
    yield make_evaluator(Choice(request.param, CLIENTS, ""), objective, layout, BoundModule(objective, layout)), layout
    torch._dynamo.reset()


def batch(weights: str, active: list[bool] | None = None) -> Batch:
    g = torch.Generator().manual_seed(2)
    inputs = torch.randn(CLIENTS, SAMPLES, 1, 4, 4, generator=g, dtype=torch.float64)
    targets = torch.randint(CLASSES, (CLIENTS, SAMPLES), generator=g)
    counts = {"none": None, "some": [6, 1, 4, 3]}[weights]
    mask = None if counts is None else (torch.arange(SAMPLES) < torch.tensor(counts)[:, None]).double()
    return Batch(inputs, targets, mask, None if active is None else torch.tensor(active))


def by_autograd(module: nn.Module, layout: Layout, y: Tensor, b: Batch) -> tuple[Tensor, Tensor]:
    gradients, losses = [], []
    for c, row in enumerate(y):
        leaves = {name: view.clone().requires_grad_() for name, view in layout.views(row).items()}
        keep = torch.ones(SAMPLES, dtype=torch.bool) if b.weights is None else b.weights[c] > 0
        loss = F.cross_entropy(functional_call(module, leaves, (b.inputs[c][keep],)), b.targets[c][keep])
        gradients.append(layout.flatten(dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))))
        losses.append(loss.detach())
    return torch.stack(gradients), torch.stack(losses)


def points(layout: Layout, seed: int) -> Tensor:
    return 0.5 * torch.randn(CLIENTS, layout.d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("weights", ["none", "some"])
def test_gradients_and_losses(made: tuple[Evaluator, Layout], module: nn.Module, weights: str) -> None:
    evaluator, layout = made
    g = torch.full((CLIENTS, layout.d), torch.nan, dtype=torch.float64)
    for seed in (0, 1):
        y = points(layout, seed)
        kept = y.clone()
        losses = evaluator(y, batch(weights), g)
        expected_g, expected_losses = by_autograd(module, layout, y, batch(weights))
        torch.testing.assert_close(g, expected_g, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=1e-13)
        assert torch.equal(y, kept)
        assert not losses.requires_grad
        assert not g.requires_grad


def test_rows_at_other_memory_are_bound_again(made: tuple[Evaluator, Layout], module: nn.Module) -> None:
    evaluator, layout = made
    for clients, seed in ((4, 0), (1, 1), (3, 2), (4, 3)):
        y, g = points(layout, seed)[:clients], torch.empty(clients, layout.d, dtype=torch.float64)
        b = batch("some")
        part = Batch(b.inputs[:clients], b.targets[:clients], b.weights[:clients], None)  # type: ignore[index]
        evaluator(y, part, g)
        torch.testing.assert_close(g, by_autograd(module, layout, y, part)[0], rtol=1e-12, atol=1e-13)


def test_inactive_clients_leave_the_others_alone(made: tuple[Evaluator, Layout], module: nn.Module) -> None:
    evaluator, layout = made
    active = [True, False, True, False]
    y, g, b = points(layout, 0), torch.empty(CLIENTS, layout.d, dtype=torch.float64), batch("some", active)
    b.weights[1] = b.weights[3] = 0  # type: ignore[index]
    losses = evaluator(y, b, g)
    expected_g, expected_losses = by_autograd(module, layout, y[[0, 2]], by_rows(b, [0, 2]))
    torch.testing.assert_close(g[[0, 2]], expected_g, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(losses[[0, 2]], expected_losses, rtol=1e-12, atol=1e-13)


def by_rows(b: Batch, rows: list[int]) -> Batch:
    return Batch(b.inputs[rows], b.targets[rows], None if b.weights is None else b.weights[rows], None)


@pytest.mark.parametrize("clip_norm", [0.5, 1e3, float("inf")])
@pytest.mark.parametrize("evaluator", ["loop", "batched"])
def test_each_clients_gradient_is_clipped_alone(clip_norm: float, evaluator: str) -> None:
    engine = tiny_engine(FedAvg(), evaluator=evaluator, clip_norm=clip_norm, clients_per_batch=3)
    norms: list[float] = []

    class Spy(FedAvg):
        def client(self, s: Any, k: Any, task: Any) -> dict[str, Tensor]:
            assert isinstance(task, LocalTask)
            b = next(iter(task.batches()))
            y = s.x.expand(len(b.inputs), -1).clone()
            found = task.grad(y, b).clone()
            for c in range(len(y)):
                keep = torch.ones(b.targets.shape[1], dtype=torch.bool) if b.weights is None else b.weights[c] > 0
                leaves = {n: v.clone().requires_grad_() for n, v in engine.layout.views(y[c]).items()}
                loss = F.cross_entropy(functional_call(tiny_model(), leaves, (b.inputs[c][keep],)), b.targets[c][keep])
                grads = torch.autograd.grad(loss, leaves.values())
                expected = engine.layout.flatten(dict(zip(leaves, grads, strict=True)))
                norms.append(float(expected.norm()))
                expected *= min(1.0, clip_norm / norms[-1])
                torch.testing.assert_close(found[c], expected, rtol=1e-11, atol=1e-13)
            return {"delta": torch.zeros_like(y)}

    engine.algorithm = Spy()
    engine.run_round()
    assert len(norms) == 6
    assert min(norms) < 0.5 < max(norms) < 1e3


class Clocked:
    """An evaluator that takes a given time for a number of clients, on a clock of its own."""

    now_s = 0.0

    def __init__(self, cost_s: Callable[[int], float], broken: bool = False) -> None:
        self._cost_s, self._broken = cost_s, broken

    def __call__(self, y: Tensor, b: Batch, g: Tensor) -> Tensor:
        if self._broken:
            raise RuntimeError("no batching rule\nand more lines")
        Clocked.now_s += self._cost_s(len(y))
        return y[:, 0]


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluators, "time", SimpleNamespace(perf_counter=lambda: Clocked.now_s))


def chosen(evaluator: Any, clients_per_batch: int | None, most: int, **named: Clocked) -> Choice:
    def sample(clients: int) -> Batch:
        return Batch(torch.zeros(clients, 1), torch.zeros(clients, 1), None, None)

    return choose(evaluator, clients_per_batch, most, torch.zeros(5), sample, lambda c: named[c.evaluator])


@pytest.mark.parametrize(
    ("batched_s", "expected"),
    [(3.9, ("batched", 4)), (4.1, ("loop", 1))],
)
def test_auto_takes_the_faster_per_client(batched_s: float, expected: tuple[str, int]) -> None:
    """A batch of four pays if it takes less than four times as long as one client."""
    choice = chosen("auto", None, 4, loop=Clocked(lambda clients: 1.0), batched=Clocked(lambda clients: batched_s))
    assert (choice.evaluator, choice.clients_per_batch) == expected
    per_client_ms = f"{1e3 * batched_s / 4:.2f}"
    assert choice.why == f"measured 1000.00 ms per client-step in a loop, {per_client_ms} ms batched by 4"


def test_auto_says_why_a_model_is_not_batched() -> None:
    choice = chosen("auto", None, 6, loop=Clocked(lambda clients: 1), batched=Clocked(lambda clients: 1, broken=True))
    assert choice == Choice("loop", 1, "this model cannot be batched over clients: no batching rule")


def test_a_model_that_cannot_be_batched_as_configured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^evaluator: this model cannot be batched over clients: no batching rule$"):
        chosen("batched", None, 6, batched=Clocked(lambda clients: 1, broken=True))


@pytest.mark.parametrize(
    ("evaluator", "clients_per_batch", "most", "expected"),
    [
        ("loop", None, 6, ("loop", 1)),
        ("loop", 4, 6, ("loop", 4)),
        ("loop", 40, 6, ("loop", 6)),
        ("batched", None, 6, ("batched", 6)),
        ("batched", None, 60, ("batched", 8)),
        ("batched", 3, 60, ("batched", 3)),
        ("compiled", None, 6, ("compiled", 1)),
        ("auto", None, 1, ("loop", 1)),
        ("auto", 1, 6, ("loop", 1)),
    ],
)
def test_choices_as_configured(
    evaluator: str, clients_per_batch: int | None, most: int, expected: tuple[str, int]
) -> None:
    choice = chosen(evaluator, clients_per_batch, most, batched=Clocked(lambda clients: 1))
    assert (choice.evaluator, choice.clients_per_batch) == expected
