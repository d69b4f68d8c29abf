"""Text datasets as rows of tokens: a bundled corpus for language models, GLUE-format files for classification."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from .datasets import Count, Dataset, Fraction, Metric
from .tokens import make_tokenizer

# Most specific first: QNLI has both `question` and `sentence`.
_TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("#1 String", "#2 String"),
    ("sentence",),
)
_LABEL_COLUMNS = ("label", "gold_label", "is_duplicate", "Quality")
_COLA_COLUMNS = ["source", "label", "mark", "sentence"]
# What the benchmark scores a task by beside accuracy, where its columns give the task away.
_METRICS: dict[str, tuple[Metric, ...]] = {"mark": ("matthews",), "Quality": ("f1",), "is_duplicate": ("f1",)}


@dataclass(frozen=True)
class _Samples:
    """Texts of every sample, their labels as written, and how the benchmark scores such a file."""

    texts: list[list[str]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    metrics: tuple[Metric, ...] = ()


@dataclass(frozen=True)
class Topics:
    """Python's own help text (`pydoc_data.topics`) for a language model; a topic is a natural client.

    The text is that of the running Python, so it differs a little between Python versions.

    Args:
        length: tokens per sequence.
        test_fraction: share held out at the end of every topic that is long enough to spare a sequence.
        tokenizer: directory of a tokenizer of `transformers`; null for bytes, or for that of a model's directory.
    """

    length: Count = 64
    test_fraction: Fraction = 0.1
    tokenizer: str | None = None

    def load(self) -> Dataset:
        """Cut every topic into sequences of `length + 1` tokens: inputs, and targets one token ahead.

        A topic shorter than one sequence joins the next one by name (the last one joins the one before).

        Raises:
            ValueError: no topic is long enough to hold a sequence out.

        Example:
            >>> data = Topics(length=32).load()
            >>> data.input_shape, bool((data.train_inputs[:, 1:] == data.train_targets[:, :-1]).all())
            ((32,), True)
        """
        from pydoc_data.topics import topics

        tokenizer = make_tokenizer(self.tokenizer)
        texts = [tokenizer.ids("")]
        for _, topic in sorted(topics.items()):
            if len(texts[-1]) > self.length:
                texts.append(tokenizer.ids(""))
            texts[-1] = np.concatenate([texts[-1], tokenizer.ids(topic)])
        if len(texts) > 1 and len(texts[-1]) <= self.length:
            short = texts.pop()
            texts[-1] = np.concatenate([texts[-1], short])
        train, test, groups = [], [], []
        for group, text in enumerate(texts):
            n = len(text) // (self.length + 1)
            rows = text[: n * (self.length + 1)].reshape(n, self.length + 1)
            kept = n - int(n * self.test_fraction)
            train.append(rows[:kept])
            test.append(rows[kept:])
            groups += [group] * kept
        if not sum(map(len, test)):
            raise ValueError(
                f"length = {self.length} and test_fraction = {self.test_fraction} hold out no sequence: the longest "
                f"topic has {max(map(len, texts))} tokens"
            )
        train_rows, test_rows = (torch.from_numpy(np.concatenate(rows)) for rows in (train, test))
        group_of = torch.tensor(groups)
        return Dataset(
            kind="language",
            train_inputs=train_rows[:, :-1].contiguous(),
            train_targets=train_rows[:, 1:].contiguous(),
            test_inputs=test_rows[:, :-1].contiguous(),
            test_targets=test_rows[:, 1:].contiguous(),
            classes=tokenizer.tokens.vocabulary,
            labels=group_of,
            groups=group_of,
            tokens=tokenizer.tokens,
            metrics=("perplexity",),
        )


@dataclass(frozen=True)
class Glue:
    """GLUE-format text classification: `train` and `dev` files (TSV or CSV) of a folder, or generated reviews.

    As bytes, the sentences are joined by byte 1 and padded with byte 0; a tokenizer has its own ways. What is too long
    loses the ends of its longest sentences. Classes are the labels that occur in training, sorted (as numbers where all
    are integers).

    Args:
        path: folder with `train.tsv` or `train.csv`, and `dev` likewise (or MNLI's `dev_matched`), the test set; null
            for short generated reviews, good or bad.
        columns: the text columns; empty: by the column names of the GLUE tasks.
        label: the label column; empty: `label`, `gold_label`, `is_duplicate` or `Quality`, whichever there is.
        length: tokens per sample.
        drop_malformed: leave out rows with a wrong number of columns (QQP has some) instead of refusing the file.
        tokenizer: directory of a tokenizer of `transformers`; null for bytes, or for that of a model's directory.
        metrics: what to score by beside accuracy, `matthews` or `f1` (of the second class); null: Matthews correlation
            for files like CoLA's, F1 for those like MRPC's and QQP's.
    """

    path: str | None = None
    columns: tuple[str, ...] = ()
    label: str = ""
    length: Count = 128
    drop_malformed: bool = False
    tokenizer: str | None = None
    metrics: tuple[Literal["matthews", "f1"], ...] | None = None

    def load(self) -> Dataset:
        """Read both files.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is malformed, lacks a column, or has a label that training has not.
        """
        tokenizer = make_tokenizer(self.tokenizer)
        if self.path is None:
            train, dev = _reviews(600, seed=0), _reviews(200, seed=1)
            train_name, dev_name = "the generated reviews", "the generated reviews"
        else:
            train_file, dev_file = _find(self.path, "train"), _find(self.path, "dev", "dev_matched")
            train, dev = self._read(train_file), self._read(dev_file)
            train_name, dev_name = train_file.name, str(dev_file)
        numeric = all(label.removeprefix("-").isdecimal() for label in train.labels)
        names = sorted(set(train.labels), key=int if numeric else str)
        number = {name: c for c, name in enumerate(names)}
        if unknown := sorted(set(dev.labels) - set(number)):
            raise ValueError(f"{dev_name}: label {unknown[0]!r} is not one of {train_name}'s: {', '.join(names)}")
        metrics: tuple[Metric, ...] = train.metrics if self.metrics is None else self.metrics
        if "f1" in metrics and len(names) != 2:
            raise ValueError(f"metrics: f1 needs two classes, and {train_name} has {len(names)}: {', '.join(names)}")
        targets = torch.tensor([number[label] for label in train.labels])
        return Dataset(
            kind="text",
            train_inputs=tokenizer.rows(train.texts, self.length),
            train_targets=targets,
            test_inputs=tokenizer.rows(dev.texts, self.length),
            test_targets=torch.tensor([number[label] for label in dev.labels]),
            classes=len(names),
            labels=targets,
            groups=None,
            tokens=tokenizer.tokens,
            metrics=metrics,
        )

    def _read(self, file: Path) -> _Samples:
        rows: Iterator[tuple[int, list[str]]] = _rows(file)
        number, header = next(rows, (0, [""]))
        if len(header) == 4 and header[1] in ("0", "1") and header[2] in ("", "*"):  # CoLA comes without a header
            rows, header = chain([(number, header)], rows), _COLA_COLUMNS
        columns, label_name = self._columns(file, header), self._label(file, header)
        if self.length < 2 * len(columns):
            raise ValueError(
                f"length = {self.length}: expected at least {2 * len(columns)} for {len(columns)} text columns"
            )
        samples = _Samples(metrics=_METRICS.get("mark" if header is _COLA_COLUMNS else label_name, ()))
        at, label = [header.index(name) for name in columns], header.index(label_name)
        for number, row in rows:
            if len(row) == len(header) and row[label]:
                samples.texts.append([row[i] for i in at])
                samples.labels.append(row[label])
            elif not self.drop_malformed:
                found = f"no {label_name}" if len(row) == len(header) else f"{len(row)} columns"
                raise ValueError(
                    f"{file}, line {number}: expected {len(header)} columns and a label in column {label + 1} "
                    f"({label_name}), found {found}; drop_malformed leaves such rows out"
                )
        if not samples.labels:
            raise ValueError(f"{file}: expected a header and at least one row, found {number} lines and no row")
        return samples

    def _columns(self, file: Path, header: list[str]) -> tuple[str, ...]:
        known = (self.columns,) if self.columns else _TEXT_COLUMNS
        for names in known:
            if all(name in header for name in names):
                return names
        expected = " or ".join(" + ".join(names) for names in known)
        raise ValueError(f"{file}: expected the text columns {expected}, found {', '.join(header)}")

    def _label(self, file: Path, header: list[str]) -> str:
        known = (self.label,) if self.label else _LABEL_COLUMNS
        for name in known:
            if name in header:
                return name
        raise ValueError(f"{file}: expected the label column {' or '.join(known)}, found {', '.join(header)}")


def _find(path: str, *stems: str) -> Path:
    names = [f"{stem}.{suffix}" for stem in stems for suffix in ("tsv", "csv")]
    for name in names:
        if (file := Path(path) / name).is_file():
            return file
    raise FileNotFoundError(f"{path}: expected the file {' or '.join(names)}")


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows with their line numbers. Quotes mean nothing in GLUE's TSV files: QNLI and MRPC have unbalanced ones."""
    try:
        # Only "\n" ends a line of a TSV file; csv wants line ends untouched.
        with file.open(encoding="utf-8-sig", newline="\n" if file.suffix == ".tsv" else "") as stream:
            if file.suffix == ".tsv":
                for number, line in enumerate(stream, 1):
                    yield number, line.rstrip("\r\n").split("\t")
            else:
                reader = csv.reader(stream, strict=True)
                for row in reader:
                    yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: truncated or corrupt file of {file.stat().st_size} bytes: {error}") from error


def _reviews(samples: int, seed: int) -> _Samples:
    """Generated sentences such as "the plot was never dull", labelled by what they say: 1 for praise."""
    rng = np.random.Generator(np.random.Philox(seed))
    things = ("plot", "acting", "music", "ending", "film", "dialogue", "pace", "cast")
    words = (("dull", "clumsy", "awful", "tedious", "weak"), ("fresh", "moving", "superb", "witty", "strong"))
    adverbs = (("", "very ", "simply ", "often "), ("not ", "never ", "hardly "))
    drawn = _Samples()
    for _ in range(samples):
        praise, negated = (int(bit) for bit in rng.integers(2, size=2))
        adverb, word = rng.choice(adverbs[negated]), rng.choice(words[praise ^ negated])
        drawn.texts.append([f"the {rng.choice(things)} was {adverb}{word}"])
        drawn.labels.append(str(praise))
    return drawn
