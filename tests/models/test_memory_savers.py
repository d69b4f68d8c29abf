"""Recomputed activations and mini-batches in pieces: the same gradients as without."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapters import CLASSES, LENGTH, LORA, texts
from support import run_rounds, tiny_engine
from torch import Tensor
from torch.func import functional_call

from fedkernels.algorithms import FedAvg
from fedkernels.contract import Batch
from fedkernels.data.datasets import Dataset
from fedkernels.federated.evaluators import BoundModule, Choice, choose, make_evaluator
from fedkernels.federated.objective import Objective
from fedkernels.layout import Layout
from fedkernels.models import Deit, Gpt2, Llama, Roberta, Swin, Vit

# Flash attention on CPU has no batching rule: vmap falls back to a loop over clients and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

CPU = torch.device("cpu")
MODELS = {
    "vit": (Vit(dim=8, depth=2, heads=2, mlp_ratio=2), "image"),
    "deit": (Deit(dim=8, depth=2, heads=2, mlp_ratio=2), "image"),
    "swin": (Swin(dim=4, depths=(2, 2), heads=(1, 2), window=2, mlp_ratio=2), "image"),
    "gpt2": (Gpt2(dim=8, depth=2, heads=2), "language"),
    "llama": (Llama(dim=8, depth=2, heads=4, key_heads=2, hidden=12), "language"),
    "roberta": (Roberta(dim=8, depth=2, heads=2, mlp_ratio=2), "text"),
    "roberta with adapters": (Roberta(dim=8, depth=2, heads=2, mlp_ratio=2, lora=LORA), "text"),
}


def images() -> Dataset:
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (150, 1, 8, 8)).astype(np.uint8))
    targets = torch.from_numpy(rng.integers(0, CLASSES, 150))
    return Dataset("image", pixels, targets, pixels[:9], targets[:9], CLASSES, targets, None, (0.5,), (0.3,))


def objective(name: str, **changed: Any) -> Objective:
    model, kind = MODELS[name]
    torch.manual_seed(0)
    data = images() if kind == "image" else texts(kind)
    shape = (1, 8, 8) if kind == "image" else (LENGTH,)
    built = dataclasses.replace(model, **changed).build(kind, shape, data.classes)  # type: ignore[type-var, attr-defined]
    return Objective(built.double(), data, CPU)


def batch(o: Objective, clients: int = 3, samples: int = 5) -> Batch:
    """Mini-batches of which one is half padding."""
    rng = torch.Generator().manual_seed(1)
    inputs, targets = o.train_batch(torch.randint(150, (clients, samples), generator=rng), None)
    weights = torch.ones(clients, samples, dtype=torch.float64)
    weights[1, 2:] = 0
    return Batch(inputs, targets, weights, None)


def gradients(o: Objective, b: Batch, evaluator: Any = "loop", size: int | None = None) -> tuple[Tensor, Tensor]:
    """Near the initial parameters, which a call replaces by those of the last client."""
    layout = Layout.of(o.module)
    clients = len(b.inputs)
    x = layout.flatten(dict(o.module.named_parameters()))
    noise = torch.randn(clients, layout.d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y, g = x + 0.1 * noise, torch.full((clients, layout.d), torch.nan, dtype=torch.float64)
    run = make_evaluator(Choice(evaluator, clients, ""), o, layout, BoundModule(o, layout), size)
    return g, run(y, b, g)


@pytest.fixture(autouse=True)
def _quick_compilation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The compiler's tracing and gradients, without the minutes of code generation.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_activations_give_the_same_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, saving = objective(name), objective(name, activation_checkpointing=True)
    b = batch(plain)
    expected_g, expected_losses = gradients(plain, b)
    forwards = []
    norms = [m for m in saving.module.modules() if "norm" in type(m).__name__.lower()]
    for m in norms:
        m.register_forward_hook(lambda m, args, out: forwards.append(m))
    g, losses = gradients(saving, b)
    torch.testing.assert_close(g, expected_g, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=0)
    # Swin's stages are saved whole as well as their layers, which then run three times.
    assert max(forwards.count(m) for m in norms) == (3 if name == "swin" else 2) * len(b.inputs)
    # And nothing twice in an evaluation.
    forwards.clear()
    saving.module.eval()
    saving.evaluate(slice(0, 4))
    assert max(forwards.count(m) for m in norms) == 1


def test_recomputation_is_for_loops_and_the_choice_says_so() -> None:
    o = objective("vit", activation_checkpointing=True)
    layout = Layout.of(o.module)
    x = layout.flatten(dict(o.module.named_parameters()))

    def make(choice: Choice) -> Any:
        return make_evaluator(choice, o, layout, BoundModule(o, layout))

    def chosen(evaluator: Any) -> Choice:
        return choose(evaluator, None, 4, x, lambda clients: batch(o, clients), make)

    why = "this model cannot be batched over clients: activation_checkpointing computes again in a backward pass"
    assert chosen("auto") == Choice("loop", 1, f"{why} that vmap does not have")
    with pytest.raises(ValueError, match=f"^evaluator: {why}"):
        chosen("batched")


@pytest.mark.parametrize("weights", ["full", "padded"])
@pytest.mark.parametrize(
    ("evaluator", "size"), [*((e, size) for e in ("loop", "batched") for size in (1, 2, 4, 5, 9)), ("compiled", 2)]
)
def test_pieces_of_a_mini_batch_add_up_to_it(evaluator: str, size: int, weights: str) -> None:
    """Also where a piece is padding alone."""
    for name in ("vit", "llama"):
        o = objective(name)
        b = batch(o)
        b = b if weights == "padded" else dataclasses.replace(b, weights=None)
        expected_g, expected_losses = gradients(o, b)
        g, losses = gradients(objective(name), b, evaluator, size)
        torch.testing.assert_close(g, expected_g, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=0)
        if evaluator == "compiled":
            break  # one model is enough for the compiler


def test_a_piece_is_all_that_goes_through_the_model_at_once() -> None:
    o = objective("vit")
    seen: list[int] = []
    o.module.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    gradients(o, batch(o), "loop", 2)
    assert seen == [2, 2, 1] * 3


@pytest.mark.parametrize("evaluator", ["loop", "batched"])
def test_a_federation_in_pieces_is_the_same_federation(evaluator: str) -> None:
    """Some clients have less than a mini-batch, and all of them partial ones."""
    states = []
    for size in (None, 3):
        engine = tiny_engine(FedAvg(), evaluator=evaluator, clients_per_batch=2, microbatch_size=size)
        states.append(run_rounds(engine, 3))
    torch.testing.assert_close(states[0][0]["x"], states[1][0]["x"], rtol=1e-12, atol=1e-14)
    for one, other in zip(states[0][1], states[1][1], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-12)


def test_pieces_against_autograd_on_the_samples_that_count() -> None:
    o, fresh = objective("roberta"), objective("roberta").module
    b, layout = batch(o), Layout.of(fresh)
    assert b.weights is not None
    g, losses = gradients(o, b, "loop", 2)
    noise = torch.randn(3, layout.d, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = layout.flatten(dict(fresh.named_parameters())) + 0.1 * noise
    for c, row in enumerate(y):
        keep = b.weights[c] > 0
        leaves = {n: v.clone().requires_grad_() for n, v in layout.views(row).items()}
        loss = F.cross_entropy(functional_call(fresh, leaves, (b.inputs[c][keep],)), b.targets[c][keep])
        expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        torch.testing.assert_close(g[c], layout.flatten(expected), rtol=1e-10, atol=1e-13)
        assert losses[c].item() == pytest.approx(loss.item(), rel=1e-12)
