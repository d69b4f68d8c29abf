"""Low-rank adapters: the formula, what is trainable, and federations that send nothing else."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from adapters import CLASSES, LENGTH, LORA, MODELS, RANK, VOCABULARY, adapter_engine, adapters_on_ranks, frozen
from support import on_ranks
from torch import nn
from torch.func import functional_call, grad, vmap

from fedkernels.layout import CurvatureBlocks, Layout
from fedkernels.models import Gpt2, Llama, Lora, Roberta, Vit

# Flash attention on CPU has no batching rule: vmap falls back to a loop over clients and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

DIM, LAYERS, KEY_DIM = 8, 2, 4
HEAD = DIM * DIM + DIM + CLASSES * DIM + CLASSES
# Queries and values of every layer: A [r, in] and B [out, r]. Llama's values have half as many heads.
D = {
    "roberta": LAYERS * 2 * (RANK * DIM + DIM * RANK) + HEAD,
    "llama": LAYERS * ((RANK * DIM + DIM * RANK) + (RANK * DIM + KEY_DIM * RANK)),
}


def build(name: str) -> nn.Module:
    model, kind = MODELS[name]
    torch.manual_seed(0)
    classes = VOCABULARY if kind == "language" else CLASSES
    return model.build(kind, (LENGTH,), classes).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_adapters_and_the_head_are_all_that_is_trainable(name: str) -> None:
    module = build(name)
    trainable = {n for n, p in module.named_parameters() if p.requires_grad}
    assert all(re.search(r"\.lora_[AB]\.default\.weight$|\.classifier\.modules_to_save\.", n) for n in trainable)
    assert Layout.of(module, MODELS[name][0].roles(module)).d == D[name]
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_adapter_changes_nothing_and_a_merged_one_is_the_formula(name: str) -> None:
    """Logits next to the library's plain model, and to one whose matrices are `W + (α/r) B A`."""
    module = build(name)
    x = torch.randint(1, CLASSES if name == "roberta" else VOCABULARY, (3, LENGTH))
    with torch.no_grad():
        plain = module.library_model  # type: ignore[union-attr]
        weights = {n: p.clone() for n, p in plain.named_parameters() if "lora_" not in n}
        adapters = {n: p for n, p in plain.named_parameters() if "lora_" in n}
        oracle = type(plain)(plain.config).double().eval()

        def expected(change: bool) -> torch.Tensor:
            values = {}
            for n, p in weights.items():
                if ".original_module." in n:
                    continue
                values[n.replace(".base_layer", "").replace(".modules_to_save.default", "")] = p.clone()
            if change:
                for n, a in adapters.items():
                    if "lora_A" in n:
                        b = adapters[n.replace("lora_A", "lora_B")]
                        values[n.replace(".lora_A.default", "")] += LORA.alpha / RANK * b @ a
            missing, unknown = oracle.load_state_dict(values, strict=False)
            assert not unknown
            assert set(missing) <= {"lm_head.weight", *(n for n, _ in oracle.named_buffers())}
            return oracle(x).logits

        torch.testing.assert_close(module(x), expected(False), rtol=1e-12, atol=1e-12)
        for p in adapters.values():
            p.copy_(torch.randn_like(p))
        torch.testing.assert_close(module(x), expected(True), rtol=1e-10, atol=1e-10)
        assert (expected(True) - expected(False)).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_both_factors_are_matrices_with_a_block_a_row(name: str) -> None:
    module = build(name)
    layout = Layout.of(module, MODELS[name][0].roles(module))
    matrices = {e.name for e in layout.entries if e.role.kind == "matrix"}
    assert matrices >= {e.name for e in layout.entries if "lora_" in e.name}
    assert {e.name.rpartition("default.")[2] for e in layout.entries if e.role.kind == "head"} == (
        {"out_proj.weight"} if name == "roberta" else set()
    )
    rows = LAYERS * (2 * RANK + DIM + (DIM if name == "roberta" else KEY_DIM))
    head = DIM + DIM + 2 * CLASSES if name == "roberta" else 0
    assert CurvatureBlocks(layout, "hessian").size == rows + head


@pytest.mark.parametrize("name", MODELS)
def test_batched_client_gradients_match_a_loop_over_clients(name: str) -> None:
    module = build(name)
    x = torch.randint(1, VOCABULARY, (3, 4, LENGTH))
    own = {
        n: p.detach() + 0.1 * torch.randn(3, *p.shape, dtype=p.dtype)
        for n, p in module.named_parameters()
        if p.requires_grad
    }

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(module, parameters, (x,)).square().mean()

    batched = vmap(grad(loss))(own, x)
    for c in range(3):
        for n, expected in grad(loss)({n: p[c] for n, p in own.items()}, x[c]).items():
            torch.testing.assert_close(batched[n][c], expected, rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[tuple[str, str], dict[str, Any]]]:
    return on_ranks(2, adapters_on_ranks)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("algorithm", ["fedadamw", "fedmuon"])
def test_a_federation_is_the_same_on_two_ranks_and_leaves_the_base_alone(
    name: str, algorithm: str, two_ranks: list[dict[tuple[str, str], dict[str, Any]]]
) -> None:
    engine = adapter_engine(name, algorithm)
    before, start = frozen(engine.objective.module), engine.server.x.clone()
    rows = [engine.run_round() | engine.evaluate() for _ in range(3)]
    assert all(torch.equal(p, before[n]) for n, p in frozen(engine.objective.module).items())
    assert (engine.server.x - start).abs().max() > 1e-3
    assert len(engine.server.x) == D[name]
    for found in (results[name, algorithm] for results in two_ranks):
        assert found["untouched"]
        np.testing.assert_allclose(found["x"], engine.server.x.numpy(), rtol=1e-12, atol=1e-14)
        for one, other in zip(rows, found["rows"], strict=True):
            for key in one.keys() & {"train_loss", "test_loss", "test_accuracy", "test_matthews", "protocol_up_bytes"}:
                assert one[key] == pytest.approx(other[key], rel=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_only_adapter_bytes_are_counted(name: str) -> None:
    engine = adapter_engine(name, "fedadamw")
    row = engine.run_round()
    # Up: the change, and a mean of v for every curvature block; down: x, the direction, those means and a counter.
    blocks = CurvatureBlocks(engine.layout, "hessian").size
    assert row["protocol_up_bytes"] == 6 * 8 * (D[name] + blocks)
    assert row["protocol_down_bytes"] == 6 * 8 * (2 * D[name] + blocks + 1)


def test_gpt2_and_vit_take_adapters_too() -> None:
    """GPT-2's matrices are (in, out), queries, keys and values side by side; a ViT keeps its own head."""
    gpt2 = Gpt2(dim=8, depth=2, heads=2, lora=Lora(rank=3)).build("language", (6,), 11)
    vit = Vit(dim=8, depth=2, heads=2, lora=Lora(rank=3)).build("image", (3, 8, 8), 5)
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (gpt2, vit)]
    assert counts == [2 * (3 * 8 + 24 * 3), 2 * 2 * (3 * 8 + 8 * 3) + 5 * 8 + 5]
    assert gpt2(torch.zeros(2, 6, dtype=torch.long)).shape == (2, 6, 11)


def test_targets_are_modules_of_the_model() -> None:
    own = Llama(dim=8, depth=1, heads=2, key_heads=1, lora=Lora(rank=1, targets=("o_proj", "mlp.down_proj")))
    module = own.build("language", (6,), 11)
    adapted = {n.split(".lora_")[0].rpartition(".")[2] for n, p in module.named_parameters() if p.requires_grad}
    assert adapted == {"o_proj", "down_proj"}
    with pytest.raises(ValueError, match=r"model\.lora\.targets: 'q_prj' is no module; .*dense, .*query, value"):
        Roberta(lora=Lora(targets=("query", "q_prj"))).build("text", (6,), 2)
