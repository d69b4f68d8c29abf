"""Labels drawn from the model's own softmax, and the gradients and curvature they give."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import CLASSES, tiny_data, tiny_engine, tiny_model
from torch import Tensor, nn
from torch.func import functional_call

from fedkernels.algorithms import LocalSophia
from fedkernels.contract import Batch, Task
from fedkernels.data.datasets import Dataset
from fedkernels.data.partition import Partition
from fedkernels.federated.evaluators import Batched, BoundModule, Choice, make_evaluator
from fedkernels.federated.objective import Objective, sample_labels
from fedkernels.federated.task import LocalTask
from fedkernels.layout import Layout
from fedkernels.optim import Sophia
from fedkernels.rng import Purpose, stream

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_follow_the_softmax(dtype: torch.dtype) -> None:
    """Of n quantiles evenly spread, class c gets n p_c but for one at either end."""
    n = 20_000
    logits = torch.tensor([[0.0, 2.0, -3.0, 1.0], [5.0, 5.0, -80.0, 5.0], [-2.0, 90.0, 0.0, 0.0]], dtype=dtype)
    quantiles = ((torch.arange(n) + 0.5) / n).to(dtype)
    for row in logits:
        labels = sample_labels(row.expand(n, 4), quantiles)
        assert labels.dtype == torch.int64
        assert (labels.diff() >= 0).all()
        counts = torch.bincount(labels, minlength=4)
        assert (counts - n * row.double().softmax(0)).abs().max() <= 1.01


def test_the_ends_of_the_unit_interval_are_labels_too() -> None:
    logits = torch.zeros(3, 7)
    assert sample_labels(logits, torch.tensor([0.0, 1 - 2**-24, 1.0])).tolist() == [0, 6, 6]
    assert sample_labels(torch.tensor([[-math.inf, 0.0]]), torch.zeros(1)).tolist() == [1]


@pytest.mark.parametrize("name", ["loop", "batched", "compiled"])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_at_sampled_labels(name: Any, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    module = tiny_model()
    objective, layout = Objective(module, tiny_data(), CPU), Layout.of(module)
    evaluator = make_evaluator(Choice(name, 3, ""), objective, layout, BoundModule(objective, layout))
    g = torch.Generator().manual_seed(0)
    y = 0.5 * torch.randn(3, layout.d, generator=g, dtype=torch.float64)
    inputs = torch.randn(3, 6, 1, 4, 4, generator=g, dtype=torch.float64)
    quantiles = torch.rand(3, 6, generator=g, dtype=torch.float64)
    weights = (torch.arange(6) < torch.tensor([[6], [2], [5]])).double() if padded else None
    found = torch.full_like(y, torch.nan)
    evaluator(y, Batch(inputs, quantiles, weights, None), found)
    for c, row in enumerate(y):
        keep = torch.ones(6, dtype=torch.bool) if weights is None else weights[c] > 0
        leaves = {n: v.clone().requires_grad_() for n, v in layout.views(row).items()}
        logits = functional_call(tiny_model(), leaves, (inputs[c][keep],))
        labels = torch.searchsorted(logits.softmax(1).cumsum(1), quantiles[c][keep][:, None], right=True)[:, 0]
        grads = torch.autograd.grad(F.cross_entropy(logits, labels), leaves.values())
        expected = layout.flatten(dict(zip(leaves, grads, strict=True)))
        torch.testing.assert_close(found[c], expected, rtol=1e-11, atol=1e-13)
    torch._dynamo.reset()


Draw = tuple[int, int, int]


def sampled(together: int, evaluator: str = "loop", clip_norm: float = 0.1) -> tuple[dict[Draw, Tensor], float]:
    """`[ĝ, labels]` by round, client and step, of two rounds and their first two steps, and the training loss."""
    out: dict[Draw, Tensor] = {}

    class Spy(LocalSophia):
        def client(self, s: Any, k: Any, task: Task) -> dict[str, Tensor]:
            assert isinstance(task, LocalTask)
            y = s.x.expand(len(task.steps), -1).clone()
            for step, batch in zip((1, 2), task.batches(), strict=False):
                g = task.grad(y, batch)
                kept = g.clone()
                g_hat, labels = task.sampled_grad(y, batch, step)
                assert torch.equal(g, kept), "the gradient was overwritten"
                for c, client in enumerate(task._clients):
                    if step <= task.steps[c]:
                        out[task.round.index, client, step] = torch.cat([g_hat[c], labels[c]])
            return {"delta": torch.zeros_like(y)}

    engine = tiny_engine(Spy(), clients_per_batch=together, evaluator=evaluator, clip_norm=clip_norm)
    losses = [engine.run_round()["train_loss"] for _ in range(2)]
    return out, sum(losses)  # type: ignore[arg-type]


def test_sampled_gradients_depend_on_seed_round_client_and_step_alone() -> None:
    expected, loss = sampled(1)
    for together in (2, 6):
        found, other_loss = sampled(together)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[draw], value) for draw, value in expected.items())
        assert other_loss == pytest.approx(loss, rel=1e-12)
    batched, _ = sampled(4, "batched")
    for draw, value in expected.items():
        torch.testing.assert_close(batched[draw], value, rtol=1e-10, atol=1e-13)
    # Another gradient even where the samples are the same, as for clients with less than a batch.
    repeated = [(r, client) for r, client, step in expected if step == 2]
    assert all(not torch.equal(expected[r, i, 1][:-1], expected[r, i, 2][:-1]) for r, i in repeated)


def test_sampled_gradients_are_not_clipped_and_count_real_samples() -> None:
    found, loss = sampled(1)
    free, same_loss = sampled(1, clip_norm=math.inf)
    assert loss == same_loss
    assert all(torch.equal(found[draw], value) for draw, value in free.items())
    assert max(float(value[:-1].norm()) for value in found.values()) > 0.1
    sizes = tiny_engine(LocalSophia()).sizes
    assert all(value[-1] == min(int(sizes[i]), 8) for (_, i, step), value in found.items() if step == 1)


def test_sequences_count_every_token() -> None:
    tokens = torch.randint(0, 9, (40, 5), generator=torch.Generator().manual_seed(0))
    data = Dataset("language", tokens, tokens, tokens, tokens, 9, tokens[:, 0], None)
    table = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9)).double()
    seen = []

    class Spy(Sophia):
        def observe(self, state: dict[str, Tensor], g_hat: Tensor, labels: Tensor) -> None:
            seen.extend(labels.flatten().tolist())

    partition = Partition(np.arange(40), np.array([0, 3, 40]))
    engine = tiny_engine(
        LocalSophia(local=Spy()),
        module=table,
        partition=partition,
        cohort=2,
        objective=lambda module, _, device: Objective(module, data, device),
    )
    engine.run_round()
    assert sorted(seen) == [3 * 5, 8 * 5]


def test_the_estimate_is_the_gauss_newton_diagonal_on_average() -> None:
    """For logits `Wx + b` it is `mean_b p_c(1 − p_c) x_j²` of W and without x_j² of b; within 5 standard errors."""
    draws, samples = 4000, 6
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES)).double()
    layout = Layout.of(module)
    objective = Objective(module, tiny_data(), CPU)
    inputs = torch.randn(samples, 1, 4, 4, dtype=torch.float64)
    y = layout.flatten(dict(module.named_parameters())).expand(draws, -1)
    quantiles = torch.rand(draws, samples, dtype=torch.float64)
    g_hat = torch.empty(draws, layout.d, dtype=torch.float64)
    Batched(objective, layout)(y, Batch(inputs.expand(draws, *inputs.shape), quantiles, None, None), g_hat)
    state = {"h": torch.zeros_like(g_hat)}
    Sophia(beta2=0.0).observe(state, g_hat, torch.full((draws, 1), float(samples), dtype=torch.float64))
    p = module(inputs).detach().softmax(1)
    spread = p * (1 - p)
    expected = layout.flatten({"1.weight": spread.T @ inputs.flatten(1).square() / samples, "1.bias": spread.mean(0)})
    error = (state["h"].mean(0) - expected) / (state["h"].std(0) / math.sqrt(draws))
    assert error.abs().max() < 5
    assert (state["h"].std(0) / math.sqrt(draws) < 0.05 * expected).all()


def test_streams_of_labels_are_their_own() -> None:
    draws = {stream(0, purpose, 1, 2, 3).random() for purpose in Purpose}
    assert len(draws) == len(Purpose.__members__)
