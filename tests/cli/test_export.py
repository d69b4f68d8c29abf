"""Exported directories, loaded by the libraries they are for: the same logits as the run's own model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data.test_tokens import save_tokenizer

from fedkernels.cli import main
from fedkernels.run_folder import load_model

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SMALL = {
    "gpt2": ["--model", "gpt2", "--model.dim=16", "--model.depth=1", "--model.heads=2"],
    "llama": ["--model", "llama", "--model.dim=16", "--model.depth=1", "--model.heads=2", "--model.key_heads=1"],
    "roberta": ["--model", "roberta", "--model.dim=16", "--model.depth=1", "--model.heads=2"],
    "vit": ["--model", "vit", "--model.dim=16", "--model.depth=1", "--model.heads=2"],
    "lenet5": ["--model", "lenet5"],
}
TEXT = ["--data", "glue", "--data.length=40", "--partition", "iid"]
TOPICS = ["--data", "topics", "--data.length=16", "--partition", "iid"]
DIGITS = ["--data", "digits", "--partition", "iid"]
LORA = ["--model.lora.rank=2", "--model.lora.alpha=4"]


@pytest.fixture(autouse=True)
def _no_report(no_report: None) -> None:
    """Reports are not what is tested here."""


def run(folder: Path, *keys: str) -> Path:
    arguments = ["--algorithm=fedadamw", "--rounds=1", "--clients=4", "--cohort=2", "--local_steps=2", "--lr=0.05"]
    arguments += ["--batch_size=8", "--evaluator=loop", "--device=cpu", f"--run_dir={folder}"]
    assert main(["train", *arguments, *keys]) == 0
    return folder


def exported(run_dir: Path, to: Path, *flags: str) -> Path:
    assert main(["export", "--run_dir", str(run_dir), "--to", str(to), *flags]) == 0
    return to


def tokens(length: int = 16) -> torch.Tensor:
    x = torch.randint(2, 256, (3, length), generator=torch.Generator().manual_seed(0))
    x[0, 9:] = 0
    return x


def same(model: Any, run_dir: Path, x: torch.Tensor, **inputs: Any) -> None:
    with torch.no_grad():
        expected = load_model(run_dir)(x)
        torch.testing.assert_close(model.eval()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "roberta"])
def test_a_classifier_of_texts(name: str, tmp_path: Path) -> None:
    run_dir, x = run(tmp_path / "run", *SMALL[name], *TEXT), tokens()
    to = exported(run_dir, tmp_path / "to")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(to)
    same(model, run_dir, x, input_ids=x, attention_mask=(x != 0).long())
    assert {path.name for path in to.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_language_model(name: str, tmp_path: Path) -> None:
    run_dir, x = run(tmp_path / "run", *SMALL[name], *TOPICS), tokens()
    model = transformers.AutoModelForCausalLM.from_pretrained(exported(run_dir, tmp_path / "to"))
    same(model, run_dir, x, input_ids=x)


def test_an_image_model(tmp_path: Path) -> None:
    run_dir = run(tmp_path / "run", *SMALL["vit"], *DIGITS)
    model = transformers.AutoModelForImageClassification.from_pretrained(exported(run_dir, tmp_path / "to"))
    x = torch.randn(3, 1, 8, 8)
    same(model, run_dir, x, pixel_values=x)


@pytest.mark.parametrize(
    ("name", "data", "auto"),
    [("roberta", TEXT, "SequenceClassification"), ("llama", TOPICS, "CausalLM"), ("gpt2", TOPICS, "CausalLM")],
)
def test_adapters_for_peft_and_merged(name: str, data: list[str], auto: str, tmp_path: Path) -> None:
    run_dir, x = run(tmp_path / "run", *SMALL[name], *data, *LORA), tokens()
    to = exported(run_dir, tmp_path / "to")
    assert {path.name for path in to.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "base"}
    mask = {"attention_mask": (x != 0).long()} if name == "roberta" else {}
    classes = {"num_labels": 2} if name == "roberta" else {}
    base = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(to / "base", **classes)
    same(peft.PeftModel.from_pretrained(base, to), run_dir, x, input_ids=x, **mask)
    same(getattr(peft, f"AutoPeftModelFor{auto}").from_pretrained(to, **classes), run_dir, x, input_ids=x, **mask)
    merged = exported(run_dir, tmp_path / "merged", "--merge")
    model = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(merged)
    same(model, run_dir, x, input_ids=x, **mask)
    assert not any("lora" in n for n, _ in model.named_parameters())


def test_a_pretrained_model_goes_back_with_its_tokenizer(tmp_path: Path) -> None:
    """Trained adapters name the directory of their base and hold nothing of it; so does the run's own folder."""
    base, size = tmp_path / "base", len(save_tokenizer(tmp_path / "base"))
    config = transformers.RobertaConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=42, type_vocab_size=1, pad_token_id=1,
    )  # fmt: skip
    transformers.RobertaForSequenceClassification(config).save_pretrained(base)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    model = ["--model", "pretrained", f"--model.path={base}"]
    whole = run(tmp_path / "whole", *model, *TEXT)
    x = torch.tensor([[0, 5, 6, 2, 1, 1], [0, 7, 2, 1, 1, 1], [0, 4, 8, 9, 10, 2]])
    inputs = {"input_ids": x, "attention_mask": (x != 1).long()}
    to = exported(whole, tmp_path / "to")
    same(transformers.AutoModelForSequenceClassification.from_pretrained(to), whole, x, **inputs)
    texts = ["a fine film .", "it was dull"]
    encode: Callable[[Path], Any] = lambda path: transformers.AutoTokenizer.from_pretrained(path)(texts)  # noqa: E731
    assert encode(to)["input_ids"] == encode(base)["input_ids"]

    adapted = run(tmp_path / "adapted", *model, *TEXT, *LORA)
    assert (adapted / "model.safetensors").stat().st_size < (whole / "model.safetensors").stat().st_size / 2
    to = exported(adapted, tmp_path / "adapters")
    assert not (to / "base").exists()
    found = peft.AutoPeftModelForSequenceClassification.from_pretrained(to, num_labels=2)
    same(found, adapted, x, **inputs)
    assert encode(to)["input_ids"] == encode(base)["input_ids"]
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_what_cannot_be_exported(tmp_path: Path, error_line: Callable[[], str]) -> None:
    run_dir, to = run(tmp_path / "run", *SMALL["lenet5"], *DIGITS), tmp_path / "to"

    def fails(run_dir: Path, *flags: str) -> str:
        assert main(["export", "--run_dir", str(run_dir), "--to", str(to), *flags]) == 2
        return error_line()

    loader = "fedkernels.run_folder.load_model loads it"
    assert fails(run_dir) == f"run_dir: the lenet5 of {run_dir} is no model of transformers; {loader}"
    assert not to.exists()
    assert fails(tmp_path).startswith(f"run_dir: {tmp_path} has no model.json")
    vit = run(tmp_path / "vit", *SMALL["vit"], *DIGITS)
    assert fails(vit, "--merge") == f"merge: the vit of {vit} has no adapters; it was trained without model.lora"
    to.mkdir()
    (to / "mine").write_text("kept")
    assert fails(vit) == f"to: {to} exists already; choose another name"
    assert [path.name for path in to.iterdir()] == ["mine"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
