"""Shapes of named models against totals counted by hand from their papers' sizes."""

from __future__ import annotations

import pytest
from shapes import NAMES, shapes

# GPT-2's weights are (in, out), queries, keys and values side by side.
GPT2 = {(12, 768, 2304), (12, 768, 768), (12, 768, 3072), (12, 3072, 768)}
LLAMA = {(32, 2048, 2048), (32, 512, 2048), (32, 8192, 2048), (16, 2048, 8192)}


def oriented(name: str) -> set[tuple[int, int, int]]:
    return set(shapes(name).matrices)


def test_totals_are_the_published_ones() -> None:
    published = {"vit_b": 86_567_656, "gpt2": 124_439_808, "llama_1b": 1_235_814_400, "vit_tiny": 2_710_948}
    assert {name: shapes(name).d for name in published} == published


def test_matrices_are_those_of_the_layers() -> None:
    # 4 attention matrices a layer, two of the MLP, and the patch projection, as wide as its 3 · 16² inputs.
    assert oriented("vit_b") == {(4 * 12 + 1, 768, 768), (12, 3072, 768), (12, 768, 3072)}
    assert {(n, *sorted(side)) for n, *side in oriented("vit_tiny")} >= {(24, 192, 192), (1, 48, 192)}
    assert oriented("gpt2") == GPT2
    assert oriented("llama_1b") == LLAMA


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_matrix_is_the_rest(name: str) -> None:
    d, dim = shapes(name).d, 768
    rest = d - sum(n * rows * cols for n, rows, cols in shapes(name).matrices)
    layer_norms_and_biases = 2 * 2 * dim + (4 + 1 + 4) * dim  # q, k, v, o; MLP up has four times as many
    expected = {
        "vit_tiny": 192 + 65 * 192 + 192 + 6 * (2 * 2 + 4 + 4 + 1) * 192 + 2 * 192 + 100 * 193,
        "vit_b": dim + 197 * dim + dim + 12 * layer_norms_and_biases + 2 * dim + 1000 * (dim + 1),
        "gpt2": (50_257 + 1024) * dim + 12 * layer_norms_and_biases + 2 * dim,
        "llama_1b": 128_256 * 2048 + 16 * 2 * 2048 + 2048,
        "llama_1b_lora_r16": 0,
        "roberta_base_lora_r16": dim + 2 * dim + 2,  # of the classifier: its first bias, and its output layer
    }
    assert rest == expected[name]


def test_adapters_of_rank_16() -> None:
    assert oriented("llama_1b_lora_r16") == {(32, 16, 2048), (16, 2048, 16), (16, 512, 16)}
    assert oriented("roberta_base_lora_r16") == {(1, 768, 768), (24, 16, 768), (24, 768, 16)}
