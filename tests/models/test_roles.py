"""Roles and curvature blocks of the transformers that papers train, from tiny configurations of the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fedkernels.layout import CurvatureBlocks, Layout
from fedkernels.models.roles import transformer_roles

transformers = pytest.importorskip("transformers")

DIM, HEADS, KEY_HEADS, HEAD_DIM, WIDE, TOKENS, CLASSES, POSITIONS = 12, 6, 2, 2, 20, 11, 5, 9
SIZES = {"vocab_size": TOKENS, "hidden_size": DIM, "intermediate_size": WIDE, "num_hidden_layers": 2}


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=DIM, intermediate_size=WIDE, num_hidden_layers=2, num_attention_heads=HEADS, image_size=8,
        patch_size=4, num_channels=1, num_labels=CLASSES,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def gpt2(head: str) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=TOKENS, n_positions=POSITIONS, n_embd=DIM, n_layer=2, n_head=HEADS, n_inner=WIDE,
        num_labels=CLASSES, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return getattr(transformers, f"GPT2{head}")(config)


def llama(head: str) -> nn.Module:
    config = transformers.LlamaConfig(
        **SIZES, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, num_labels=CLASSES, pad_token_id=0
    )
    return getattr(transformers, f"Llama{head}")(config)


def roberta(head: str) -> nn.Module:
    config = transformers.RobertaConfig(
        **SIZES, num_attention_heads=HEADS, num_labels=CLASSES, max_position_embeddings=POSITIONS, type_vocab_size=1
    )
    return getattr(transformers, f"Roberta{head}")(config)


NORM_AND_BIAS = 2
BERT_LAYER = 2 * (HEADS + DIM) + 2 * (DIM + DIM) + 2 * WIDE + 2 * DIM + 2 * NORM_AND_BIAS
VIT_LAYER = BERT_LAYER
LLAMA_LAYER = HEADS + KEY_HEADS + KEY_HEADS * HEAD_DIM + DIM + 2 * WIDE + DIM + 2
# q and k by head, v by output, then biases of all three; projection, MLP up and down with biases; two norms.
GPT2_LAYER = 2 * HEADS + DIM + 3 * DIM + 2 * DIM + 2 * WIDE + 2 * DIM + 2 * NORM_AND_BIAS
ROBERTA = TOKENS + POSITIONS + 1 + NORM_AND_BIAS + 2 * BERT_LAYER
# The number of curvature blocks, its output layer, and its embeddings by name.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, set[str], set[str]]] = {
    "vit": (
        vit,
        1 + 5 + 2 * DIM + 2 * VIT_LAYER + NORM_AND_BIAS + 2 * CLASSES,
        {"classifier.weight"},
        {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"},
    ),
    "gpt2, tied": (
        lambda: gpt2("LMHeadModel"),
        TOKENS + POSITIONS + 2 * GPT2_LAYER + NORM_AND_BIAS,
        set(),
        {"transformer.wte.weight", "transformer.wpe.weight"},
    ),
    "gpt2, classifier": (
        lambda: gpt2("ForSequenceClassification"),
        TOKENS + POSITIONS + 2 * GPT2_LAYER + NORM_AND_BIAS + CLASSES,
        {"score.weight"},
        {"transformer.wte.weight", "transformer.wpe.weight"},
    ),
    "llama, untied": (
        lambda: llama("ForCausalLM"),
        TOKENS + 2 * LLAMA_LAYER + 1 + TOKENS,
        {"lm_head.weight"},
        {"model.embed_tokens.weight"},
    ),
    "llama, classifier": (
        lambda: llama("ForSequenceClassification"),
        TOKENS + 2 * LLAMA_LAYER + 1 + CLASSES,
        {"score.weight"},
        {"model.embed_tokens.weight"},
    ),
    "roberta, classifier": (
        lambda: roberta("ForSequenceClassification"),
        ROBERTA + 2 * DIM + 2 * CLASSES,
        {"classifier.out_proj.weight"},
        {f"roberta.embeddings.{n}_embeddings.weight" for n in ("word", "position", "token_type")},
    ),
    "roberta, tied": (
        lambda: roberta("ForMaskedLM"),
        ROBERTA + TOKENS + 2 * DIM + NORM_AND_BIAS,
        set(),
        {f"roberta.embeddings.{n}_embeddings.weight" for n in ("word", "position", "token_type")},
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_every_parameter_has_its_role(name: str) -> None:
    make, _, heads, embeddings = MODELS[name]
    module = make()
    roles = transformer_roles(module, HEAD_DIM)
    assert list(roles) == [n for n, _ in module.named_parameters()]
    modules = dict(module.named_modules())
    for n, p in module.named_parameters():
        norm = "norm" in type(modules[n.rpartition(".")[0]]).__name__.lower()
        if n in heads | embeddings:
            expected = "head" if n in heads else "embedding"
        else:
            expected = "norm" if norm else "matrix" if p.dim() >= 2 else "bias"
        assert roles[n].kind == expected, n
    assert heads | embeddings <= roles.keys()


@every_model
def test_the_number_of_curvature_blocks(name: str) -> None:
    make, blocks, *_ = MODELS[name]
    module = make()
    layout = Layout.of(module, transformer_roles(module, HEAD_DIM))
    assert CurvatureBlocks(layout, "hessian").size == blocks
    assert CurvatureBlocks(layout, "tensor").size == len(layout.entries)


# Of one weight with rows of outputs: blocks as (first row, row after the last).
def by_head(heads: int, start: int = 0) -> list[tuple[int, int]]:
    return [(start + HEAD_DIM * h, start + HEAD_DIM * (h + 1)) for h in range(heads)]


def by_row(start: int, stop: int) -> list[tuple[int, int]]:
    return [(row, row + 1) for row in range(start, stop)]


LLAMA, ROBERTA_LAYER = "model.layers.1.", "roberta.encoder.layer.1."
EXPECTED: list[tuple[str, str, list[tuple[int, int]]]] = [
    ("vit", "vit.layers.1.attention.q_proj.weight", by_head(HEADS)),
    ("vit", "vit.layers.1.attention.k_proj.weight", by_head(HEADS)),
    ("vit", "vit.layers.1.attention.v_proj.weight", by_row(0, DIM)),
    ("vit", "vit.layers.1.attention.o_proj.weight", by_row(0, DIM)),
    ("vit", "vit.layers.1.mlp.fc1.weight", by_row(0, WIDE)),
    ("vit", "vit.embeddings.patch_embeddings.projection.weight", by_row(0, DIM)),
    ("vit", "vit.layernorm.weight", [(0, DIM)]),
    ("vit", "classifier.weight", by_row(0, CLASSES)),
    ("gpt2, tied", "transformer.h.1.attn.c_attn.weight", by_head(2 * HEADS) + by_row(2 * DIM, 3 * DIM)),
    ("gpt2, tied", "transformer.h.1.attn.c_proj.weight", by_row(0, DIM)),
    ("gpt2, tied", "transformer.h.1.mlp.c_fc.weight", by_row(0, WIDE)),
    ("gpt2, tied", "transformer.wte.weight", by_row(0, TOKENS)),
    ("gpt2, tied", "transformer.h.1.attn.c_attn.bias", by_row(0, 3 * DIM)),
    ("llama, untied", f"{LLAMA}self_attn.q_proj.weight", by_head(HEADS)),
    ("llama, untied", f"{LLAMA}self_attn.k_proj.weight", by_head(KEY_HEADS)),
    ("llama, untied", f"{LLAMA}self_attn.v_proj.weight", by_row(0, KEY_HEADS * HEAD_DIM)),
    ("llama, untied", f"{LLAMA}mlp.down_proj.weight", by_row(0, DIM)),
    ("llama, untied", f"{LLAMA}input_layernorm.weight", [(0, DIM)]),
    ("llama, untied", "lm_head.weight", by_row(0, TOKENS)),
    ("roberta, classifier", f"{ROBERTA_LAYER}attention.self.query.weight", by_head(HEADS)),
    ("roberta, classifier", f"{ROBERTA_LAYER}attention.self.key.weight", by_head(HEADS)),
    ("roberta, classifier", f"{ROBERTA_LAYER}attention.self.value.weight", by_row(0, DIM)),
    ("roberta, classifier", f"{ROBERTA_LAYER}attention.self.key.bias", by_row(0, DIM)),
    ("roberta, classifier", f"{ROBERTA_LAYER}output.dense.weight", by_row(0, DIM)),
    ("roberta, classifier", f"{ROBERTA_LAYER}output.LayerNorm.bias", [(0, DIM)]),
    ("roberta, classifier", "classifier.dense.weight", by_row(0, DIM)),
    ("roberta, classifier", "classifier.out_proj.weight", by_row(0, CLASSES)),
]


@pytest.mark.parametrize(("name", "parameter", "rows"), EXPECTED)
def test_means_are_over_the_rows_of_the_paper(name: str, parameter: str, rows: list[tuple[int, int]]) -> None:
    """`expand(mean(v))` of a random v, next to means of slices of the weight as `(out, in)`."""
    module = MODELS[name][0]()
    layout = Layout.of(module, transformer_roles(module, HEAD_DIM))
    blocks: Any = CurvatureBlocks(layout, "hessian")
    v = torch.rand(layout.d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = parameter.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    before, after = (layout.views(w)[parameter] for w in (v, blocks.expand(blocks.mean(v[None])[0])))
    before, after = (before.T, after.T) if turned else (before, after)
    assert rows[-1][1] == before.shape[0]
    for start, stop in rows:
        torch.testing.assert_close(
            after[start:stop], before[start:stop].mean().expand_as(after[start:stop]), rtol=1e-12, atol=0
        )
    assert len(after.unique()) == len(rows)
