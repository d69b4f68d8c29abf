"""Tokenizers: one made word by word and saved as the library does, and what datasets make of it."""

from __future__ import annotations

import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from fedkernels.config import load
from fedkernels.data.text import Glue, Topics
from fedkernels.data.tokens import BYTES, LibraryTokenizer, Tokens
from fedkernels.train import load_data

transformers = pytest.importorskip("transformers")

WORDS = ["a", "film", "fine", "dull", "it", "was", "the", "said", "he", "."]


def save_tokenizer(folder: Path, *, pad: bool = True) -> dict[str, int]:
    """A tokenizer that frames texts as RoBERTa's does; its vocabulary by word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    special: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    special |= {"pad_token": "<pad>"} if pad else {}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return vocabulary


def test_pairs_are_framed_padded_and_cut(tmp_path: Path) -> None:
    v = save_tokenizer(tmp_path)
    tokenizer = LibraryTokenizer(str(tmp_path))
    assert tokenizer.tokens == Tokens(len(v), v["<pad>"], str(tmp_path))
    s, pad, e = 0, 1, 2
    single = tokenizer.rows([["a fine film"], ["it was the dull dull film ."]], 7)
    assert single.tolist() == [
        [s, v["a"], v["fine"], v["film"], e, pad, pad],
        [s, v["it"], v["was"], v["the"], v["dull"], v["dull"], e],
    ]
    assert single.dtype == torch.int32
    pair = tokenizer.rows([["he said it was fine", "dull ?"]], 9)
    assert pair.tolist() == [[s, v["he"], v["said"], v["it"], e, e, v["dull"], v["<unk>"], e]]


def test_where_nothing_pads_the_end_does(tmp_path: Path) -> None:
    v = save_tokenizer(tmp_path, pad=False)
    tokenizer = LibraryTokenizer(str(tmp_path))
    assert tokenizer.tokens.pad == v["</s>"]
    assert tokenizer.rows([["film"]], 5).tolist() == [[0, v["film"], 2, 2, 2]]


def test_a_directory_without_a_readable_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(tmp_path))}: expected a tokenizer, one of the files"):
        LibraryTokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: cannot read the tokenizer"):
        LibraryTokenizer(str(tmp_path))


def test_topics_and_glue_in_the_tokens_of_a_tokenizer(tmp_path: Path) -> None:
    v = save_tokenizer(tmp_path / "t")
    data = Topics(length=8, tokenizer=str(tmp_path / "t")).load()
    assert (data.classes, data.tokens.vocabulary, data.metrics) == (len(v), len(v), ("perplexity",))
    assert torch.equal(data.train_inputs[:, 1:], data.train_targets[:, :-1])
    first = re.findall(r"\w+|[^\w\s]+", topics[min(topics)])[:8]
    assert data.train_inputs[0].tolist() == [v.get(word, v["<unk>"]) for word in first]
    (tmp_path / "train.tsv").write_text("sentence\tlabel\na fine film\t1\nit was dull\t0\n")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\ndull\t0\n")
    data = Glue(str(tmp_path), length=6, tokenizer=str(tmp_path / "t")).load()
    assert data.train_inputs.tolist() == [
        [0, v["a"], v["fine"], v["film"], 2, 1],
        [0, v["it"], v["was"], v["dull"], 2, 1],
    ]
    assert data.test_inputs.tolist() == [[0, v["dull"], 2, 1, 1, 1]]


def test_the_tokenizer_of_the_models_directory_is_used_unless_the_data_names_one(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "model")
    save_tokenizer(tmp_path / "other")
    keys = {"algorithm": "fedavg", "partition": "iid", "run_dir": "unused", "rounds": 1, "clients": 2, "cohort": 1}
    keys |= {"local_steps": 1, "batch_size": 1, "lr": 0.1, "data": "glue"}
    pretrained = {"name": "pretrained", "path": str(tmp_path / "model")}

    def tokens(**changed: Any) -> Tokens:
        return load_data(load(None, {**keys, "model": pretrained, **changed})).tokens

    assert tokens().path == str(tmp_path / "model")
    assert tokens(data={"name": "glue", "tokenizer": str(tmp_path / "other")}).path == str(tmp_path / "other")
    assert tokens(model="roberta") == BYTES
    (tmp_path / "plain").mkdir()
    assert tokens(model={"name": "pretrained", "path": str(tmp_path / "plain")}) == BYTES


def test_tasks_are_known_by_their_columns(tmp_path: Path) -> None:
    def metrics(train: str, **fields: Any) -> tuple[str, ...]:
        for name in ("train", "dev"):
            (tmp_path / f"{name}.tsv").write_text(train)
        return Glue(str(tmp_path), **fields).load().metrics

    assert metrics("gj04\t1\t\tWe won.\ngj04\t0\t*\tWon we.\n") == ("matthews",)
    assert metrics("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\ta\tb\n0\t1\t2\ta\tc\n") == ("f1",)
    assert metrics("id\tquestion1\tquestion2\tis_duplicate\n1\ta\tb\t1\n2\ta\tc\t0\n") == ("f1",)
    sst2 = "sentence\tlabel\ngood\t1\nbad\t0\n"
    assert metrics(sst2) == ()
    assert metrics(sst2, metrics=("matthews", "f1")) == ("matthews", "f1")
    with pytest.raises(ValueError, match=r"metrics: f1 needs two classes, and train.tsv has 3: 0, 1, 2"):
        metrics(sst2 + "so\t2\n", metrics=("f1",))


def test_generated_reviews_say_what_their_label_says() -> None:
    data = Glue(length=48).load()
    assert (data.classes, data.metrics, data.tokens) == (2, (), BYTES)
    assert (len(data.train_inputs), len(data.test_inputs)) == (600, 200)
    negated, praised = re.compile(r" (not|never|hardly) "), re.compile("fresh|moving|superb|witty|strong")
    for tokens, label in zip(data.train_inputs.tolist(), data.train_targets.tolist(), strict=True):
        text = bytes(tokens).rstrip(b"\0").decode()
        assert label == (bool(praised.search(text)) != bool(negated.search(text))), text
    assert 0.4 < data.train_targets.double().mean() < 0.6
    assert torch.equal(Glue(length=48).load().train_inputs, data.train_inputs)
