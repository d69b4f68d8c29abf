"""Models from directories that the library itself wrote, next to the library's own outputs."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedkernels.data.tokens import Tokens
from fedkernels.models import Pretrained

transformers = pytest.importorskip("transformers")

CLASSES, LENGTH, VOCABULARY, PAD = 3, 6, 23, 1
TOKENS = Tokens(VOCABULARY, PAD)
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
WORDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2, "num_labels": CLASSES}
IMAGES = {"image_size": 8, "num_channels": 1, "num_labels": CLASSES}
GPT2 = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}


def made(name: str) -> tuple[nn.Module, str, tuple[int, ...]]:
    """A model of the library with random weights and dropout, its kind of task and the shape of an input."""
    torch.manual_seed(0)
    t: Any = transformers
    build: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
        "vit": (lambda: t.ViTForImageClassification(t.ViTConfig(**SIZES, **IMAGES, patch_size=4)), "image", (1, 8, 8)),
        "deit": (
            lambda: t.DeiTForImageClassification(t.DeiTConfig(**SIZES, **IMAGES, patch_size=4)), "image", (1, 8, 8)
        ),
        "swin": (
            lambda: t.SwinForImageClassification(
                t.SwinConfig(**IMAGES, embed_dim=4, depths=[2, 2], num_heads=[1, 2], window_size=2, patch_size=2)
            ), "image", (1, 8, 8),
        ),
        "gpt2": (lambda: t.GPT2LMHeadModel(t.GPT2Config(**WORDS, **GPT2)), "language", (LENGTH,)),
        "gpt2-text": (lambda: t.GPT2ForSequenceClassification(t.GPT2Config(**WORDS, **GPT2)), "text", (LENGTH,)),
        "llama": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**WORDS, **SIZES)), "language", (LENGTH,)),
        "roberta": (
            lambda: t.RobertaForSequenceClassification(
                t.RobertaConfig(**WORDS, **SIZES, max_position_embeddings=LENGTH + PAD + 1, type_vocab_size=1)
            ), "text", (LENGTH,),
        ),
    }  # fmt: skip
    make, kind, shape = build[name]
    model = make()
    for p in model.parameters():  # far from uniform attention, so that a mask shows
        p.data.normal_(std=0.5)
    return model.eval(), kind, shape


def inputs(kind: str, shape: tuple[int, ...]) -> Tensor:
    if kind == "image":
        return torch.randn(3, *shape)
    tokens = torch.randint(2, VOCABULARY, (3, *shape))
    if kind == "text":
        tokens[0, 4:] = PAD
        tokens[1, 2:] = PAD
    return tokens


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a connection to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


NAMES = ("vit", "deit", "swin", "gpt2", "gpt2-text", "llama", "roberta")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_librarys_in_training_too(name: str, tmp_path: Path) -> None:
    model, kind, shape = made(name)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    config = Pretrained(str(tmp_path))
    module = config.build(kind, shape, CLASSES, TOKENS)  # type: ignore[arg-type]
    x = inputs(kind, shape)
    oracle = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()  # type: ignore[attr-defined]
    expected = oracle(x, attention_mask=(x != PAD).long()).logits if kind == "text" else oracle(x).logits
    # Training differs from evaluation by dropout alone, and there is none.
    assert module.training
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.eval()(x), expected, rtol=1e-4, atol=1e-5)
    assert set(config.roles(module)) == {n for n, _ in module.named_parameters()}


def test_a_head_for_other_classes_starts_at_random_and_the_rest_does_not(tmp_path: Path) -> None:
    model, _, shape = made("roberta")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    built = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        module = Pretrained(str(tmp_path)).build("text", shape, CLASSES + 2, TOKENS)
        built.append(dict(module.model.named_parameters()))  # type: ignore[union-attr, operator]
    saved = dict(model.named_parameters())
    for n, p in built[0].items():
        assert torch.equal(p, built[1][n])
        if n.startswith("classifier.out_proj"):
            assert p.shape[0] == CLASSES + 2
        else:
            assert torch.equal(p, saved[n]), n
    head = "classifier.out_proj.weight"
    assert not torch.equal(built[0][head], built[2][head])


def test_half_precision_is_read_as_float32_and_images_are_stretched(tmp_path: Path) -> None:
    model, _, _ = made("vit")
    model.bfloat16().save_pretrained(tmp_path)  # type: ignore[operator]
    module = Pretrained(str(tmp_path)).build("image", (1, 4, 4), CLASSES)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    x = torch.randn(2, 1, 4, 4)
    larger = nn.functional.interpolate(x, (8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(module(x), module(larger))


@pytest.mark.parametrize("pad", [0, PAD, 4])
def test_positions_of_roberta_count_from_the_padding_of_the_data(pad: int, tmp_path: Path) -> None:
    """Whatever the directory's own; the longest text that is taken is the longest that the library computes."""
    model, _, _ = made("roberta")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    longest = LENGTH + PAD - pad
    module = Pretrained(str(tmp_path)).build("text", (longest,), CLASSES, Tokens(VOCABULARY, pad))
    x = torch.full((1, longest + 1), 7)
    assert module(x[:, 1:]).isfinite().all()
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        module(x)
    with pytest.raises(ValueError, match=f"a roberta of at most {longest} tokens, and the samples have {longest + 1}"):
        Pretrained(str(tmp_path)).build("text", (longest + 1,), CLASSES, Tokens(VOCABULARY, pad))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    def fails(message: str, error: type[Exception] = ValueError, shape: tuple[int, ...] = (LENGTH,)) -> None:
        with pytest.raises(error, match=message):
            Pretrained(str(tmp_path / "m")).build("text", shape, CLASSES, TOKENS)

    fails(f"model.path: {re.escape(str(tmp_path))}/m is no directory; nothing is downloaded", FileNotFoundError)
    model, _, _ = made("roberta")
    folder = tmp_path / "m"
    model.save_pretrained(folder)  # type: ignore[operator]
    (folder / "config.json").rename(tmp_path / "config.json")
    fails("m has no config.json", FileNotFoundError)
    (tmp_path / "config.json").rename(folder / "config.json")
    fails("a roberta of at most 6 tokens, and the samples have 7", shape=(7,))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    fails("m has no weights, expected one of model.safetensors, ", FileNotFoundError)
    dense = "roberta.encoder.layer.1.output.dense.weight"
    save_file({n: w for n, w in weights.items() if n != dense}, folder / "model.safetensors", {"format": "pt"})
    fails(f"weights missing or of another shape: {re.escape(dense)}$")
    save_file(weights | {dense: torch.zeros(3, 3)}, folder / "model.safetensors", {"format": "pt"})
    fails(f"weights missing or of another shape: {re.escape(dense)}$")
    (folder / "model.safetensors").write_bytes(b"none of this")
    fails(r"model\.path: cannot read .*/m: ")
    (folder / "config.json").write_text("{")
    fails(r"model\.path: cannot read .*/m: ")


@pytest.mark.parametrize(
    ("name", "kind", "shape", "tokens", "message"),
    [
        ("vit", "text", (LENGTH,), TOKENS, r"a vit, which does not take text of shape \(6,\)"),
        ("roberta", "image", (1, 8, 8), TOKENS, r"a roberta, which does not take image of shape \(1, 8, 8\)"),
        ("vit", "image", (3, 8, 8), TOKENS, "a vit for images of 1 channels, not 3"),
        ("gpt2", "language", (LENGTH,), Tokens(256, 0), "a gpt2 with 23 tokens, and the data has 256"),
        ("gpt2", "language", (7,), TOKENS, "a gpt2 of at most 6 tokens, and the samples have 7"),
    ],
)
def test_a_model_for_something_else_is_refused(
    name: str, kind: Any, shape: tuple[int, ...], tokens: Tokens, message: str, tmp_path: Path
) -> None:
    made(name)[0].save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        Pretrained(str(tmp_path)).build(kind, shape, CLASSES, tokens)


def test_nothing_of_our_attention_is_written_back(tmp_path: Path) -> None:
    model, kind, shape = made("llama")
    model.save_pretrained(tmp_path / "a")  # type: ignore[operator]
    module = Pretrained(str(tmp_path / "a")).build(kind, shape, CLASSES, TOKENS)  # type: ignore[arg-type]
    module.model.save_pretrained(tmp_path / "b")  # type: ignore[union-attr, operator]
    assert "fedkernels" not in json.dumps(json.loads((tmp_path / "b" / "config.json").read_text()))
