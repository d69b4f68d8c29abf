"""Text datasets as byte tokens: a bundled corpus for language models, GLUE-format files for classification."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .datasets import Count, Dataset, Fraction

_PAD, _SEPARATOR = 0, 1
# The two bytes with a meaning become spaces where a text happens to contain them.
_FREE = bytes.maketrans(bytes((_PAD, _SEPARATOR)), b"  ")

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


@dataclass(frozen=True)
class Topics:
    """Python's own help text (`pydoc_data.topics`) for a byte-level language model; a topic is a natural client.

    The text is that of the running Python, so it differs a little between Python versions.

    Args:
        length: tokens per sequence, a byte each.
        test_fraction: share held out at the end of every topic that is long enough to spare a sequence.
    """

    length: Count = 64
    test_fraction: Fraction = 0.1

    def load(self) -> Dataset:
        """Cut every topic into sequences of `length + 1` bytes: inputs, and targets one byte ahead.

        A topic shorter than one sequence joins the next one by name (the last one joins the one before).

        Raises:
            ValueError: no topic is long enough to hold a sequence out.

        Example:
            >>> data = Topics(length=32).load()
            >>> data.input_shape, bool((data.train_inputs[:, 1:] == data.train_targets[:, :-1]).all())
            ((32,), True)
        """
        from pydoc_data.topics import topics

        texts = [b""]
        for _, topic in sorted(topics.items()):
            if len(texts[-1]) > self.length:
                texts.append(b"")
            texts[-1] += topic.encode()
        if len(texts) > 1 and len(texts[-1]) <= self.length:
            short = texts.pop()
            texts[-1] += short
        train, test, groups = [], [], []
        for group, text in enumerate(texts):
            n = len(text) // (self.length + 1)
            rows = np.frombuffer(text, np.uint8, n * (self.length + 1)).reshape(n, self.length + 1)
            kept = n - int(n * self.test_fraction)
            train.append(rows[:kept])
            test.append(rows[kept:])
            groups += [group] * kept
        if not sum(map(len, test)):
            raise ValueError(
                f"length = {self.length} and test_fraction = {self.test_fraction} hold out no sequence: the longest "
                f"topic has {max(map(len, texts))} bytes"
            )
        train_rows, test_rows = (torch.from_numpy(np.concatenate(rows)) for rows in (train, test))
        group_of = torch.tensor(groups)
        return Dataset(
            kind="language",
            train_inputs=train_rows[:, :-1].contiguous(),
            train_targets=train_rows[:, 1:].contiguous(),
            test_inputs=test_rows[:, :-1].contiguous(),
            test_targets=test_rows[:, 1:].contiguous(),
            classes=256,
            labels=group_of,
            groups=group_of,
        )


@dataclass(frozen=True)
class Glue:
    """GLUE-format text classification: `train` and `dev` files (TSV or CSV) of a folder, as bytes.

    The sentences' UTF-8 bytes are joined by byte 1 and padded with byte 0; what is too long loses the ends of its
    longest sentences. Classes are the labels that occur in training, sorted (as numbers where all are integers).

    Args:
        path: folder with `train.tsv` or `train.csv`, and `dev` likewise (or MNLI's `dev_matched`), the test set.
        columns: the text columns; empty: by the column names of the GLUE tasks.
        label: the label column; empty: `label`, `gold_label`, `is_duplicate` or `Quality`, whichever there is.
        length: bytes per sample.
        drop_malformed: leave out rows with a wrong number of columns (QQP has some) instead of refusing the file.
    """

    path: str
    columns: tuple[str, ...] = ()
    label: str = ""
    length: Count = 128
    drop_malformed: bool = False

    def load(self) -> Dataset:
        """Read both files.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is malformed, lacks a column, or has a label that training has not.
        """
        train_file, dev_file = _find(self.path, "train"), _find(self.path, "dev", "dev_matched")
        train_inputs, train_labels = self._read(train_file)
        test_inputs, test_labels = self._read(dev_file)
        numeric = all(label.removeprefix("-").isdecimal() for label in train_labels)
        names = sorted(set(train_labels), key=int if numeric else str)
        number = {name: c for c, name in enumerate(names)}
        if unknown := sorted(set(test_labels) - set(number)):
            raise ValueError(f"{dev_file}: label {unknown[0]!r} is not one of {train_file.name}'s: {', '.join(names)}")
        targets = torch.tensor([number[label] for label in train_labels])
        return Dataset(
            kind="text",
            train_inputs=train_inputs,
            train_targets=targets,
            test_inputs=test_inputs,
            test_targets=torch.tensor([number[label] for label in test_labels]),
            classes=len(names),
            labels=targets,
            groups=None,
        )

    def _read(self, file: Path) -> tuple[Tensor, list[str]]:
        """Byte tokens uint8 `[n, length]` and the labels as written."""
        rows: Iterator[tuple[int, list[str]]] = _rows(file)
        number, header = next(rows, (0, [""]))
        if len(header) == 4 and header[1] in ("0", "1") and header[2] in ("", "*"):  # CoLA comes without a header
            rows, header = chain([(number, header)], rows), _COLA_COLUMNS
        texts = [header.index(name) for name in self._columns(file, header)]
        label = header.index(self._label(file, header))
        if self.length < 2 * len(texts):
            raise ValueError(
                f"length = {self.length}: expected at least {2 * len(texts)} for {len(texts)} text columns"
            )
        tokens, labels = bytearray(), []
        for number, row in rows:
            if len(row) == len(header) and row[label]:
                tokens += _encode([row[i].encode() for i in texts], self.length)
                labels.append(row[label])
            elif not self.drop_malformed:
                raise ValueError(
                    f"{file}, line {number}: expected {len(header)} columns and a label, found {len(row)} columns; "
                    "drop_malformed leaves such rows out"
                )
        if not labels:
            raise ValueError(f"{file}: expected a header and at least one row, found {number} lines and no row")
        return torch.frombuffer(tokens, dtype=torch.uint8).view(len(labels), self.length), labels

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


def _encode(texts: list[bytes], length: int) -> bytes:
    """`texts` joined by the separator in exactly `length` bytes; the longest are cut first."""
    room, kept = length - (len(texts) - 1), list(texts)
    for left, i in zip(range(len(texts), 0, -1), sorted(range(len(texts)), key=lambda i: len(texts[i])), strict=True):
        kept[i] = texts[i][: room // left]
        room -= len(kept[i])
    return bytes((_SEPARATOR,)).join(text.translate(_FREE) for text in kept).ljust(length, bytes((_PAD,)))
