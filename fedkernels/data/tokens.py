"""Text as rows of token ids: bytes, or the tokens of a tokenizer that `transformers` reads from a directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

_PAD, _SEPARATOR = 0, 1
# The two bytes with a meaning become spaces where a text happens to contain them.
_FREE = bytes.maketrans(bytes((_PAD, _SEPARATOR)), b"  ")
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


@dataclass(frozen=True)
class Tokens:
    """What models must know of the tokens they read.

    Args:
        vocabulary: number of token ids.
        pad: the id that fills up short texts.
        path: directory of the tokenizer; None for bytes.
    """

    vocabulary: int = 256
    pad: int = _PAD
    path: str | None = None


BYTES = Tokens()


class Tokenizer(Protocol):
    """Turns texts into token ids."""

    @property
    def tokens(self) -> Tokens: ...

    def rows(self, samples: Sequence[Sequence[str]], length: int) -> Tensor:
        """Token ids `[n, length]` of samples of one or two texts, padded or cut; longer texts are cut first."""
        ...

    def ids(self, text: str) -> np.ndarray:
        """All token ids of a text, in order."""
        ...


class ByteTokenizer:
    """UTF-8 bytes: texts of a sample joined by byte 1 and padded with byte 0.

    Example:
        >>> bytes(ByteTokenizer().rows([["ab", "cdefgh"]], 8)[0].tolist())
        b'ab\\x01cdefg'
    """

    tokens = BYTES

    def rows(self, samples: Sequence[Sequence[str]], length: int) -> Tensor:
        joined = bytearray()
        for texts in samples:
            joined += _encode([text.encode() for text in texts], length)
        return torch.frombuffer(joined, dtype=torch.uint8).view(len(samples), length)

    def ids(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)


class LibraryTokenizer:
    """A tokenizer of `transformers`, as its `save_pretrained` wrote it; where it has no padding, the end pads.

    Raises:
        FileNotFoundError: no tokenizer in the directory.
        ValueError: one that cannot be read, or no `transformers` package.
    """

    def __init__(self, path: str) -> None:
        if not has_tokenizer(path):
            raise FileNotFoundError(f"{path}: expected a tokenizer, one of the files {', '.join(_FILES)}")
        try:
            from transformers import AutoTokenizer
        except ModuleNotFoundError:
            raise ValueError("tokenizer: needs the transformers package: pip install 'fedkernels[hf]'") from None
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as error:  # damaged files raise what the parsers of three formats raise
            raise ValueError(f"{path}: cannot read the tokenizer: {error}") from error
        self._tokenizer.padding_side = "right"
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._tokenizer.pad_token_id is None:
            raise ValueError(f"{path}: expected a tokenizer with a padding or an end token, found neither")
        self.tokens = Tokens(len(self._tokenizer), self._tokenizer.pad_token_id, path)

    def rows(self, samples: Sequence[Sequence[str]], length: int) -> Tensor:
        columns = [list(column) for column in zip(*samples, strict=True)]
        encoded = self._tokenizer(
            *columns, padding="max_length", truncation="longest_first", max_length=length, return_tensors="np"
        )
        return torch.from_numpy(encoded["input_ids"].astype(np.int32))

    def save(self, folder: Path) -> None:
        """Write it as `save_pretrained` does."""
        self._tokenizer.save_pretrained(folder)

    def ids(self, text: str) -> np.ndarray:
        # One text is many samples, so that its length is none to warn of.
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return np.asarray(encoded["input_ids"], np.int32)


def has_tokenizer(path: str) -> bool:
    """Whether a directory has the files of a tokenizer."""
    return any((Path(path) / name).is_file() for name in _FILES)


def make_tokenizer(path: str | None) -> Tokenizer:
    """The tokenizer of a directory, or bytes."""
    return ByteTokenizer() if path is None else LibraryTokenizer(path)


def _encode(texts: list[bytes], length: int) -> bytes:
    """`texts` joined by the separator in exactly `length` bytes; the longest are cut first."""
    room, kept = length - (len(texts) - 1), list(texts)
    for left, i in zip(range(len(texts), 0, -1), sorted(range(len(texts)), key=lambda i: len(texts[i])), strict=True):
        kept[i] = texts[i][: room // left]
        room -= len(kept[i])
    return bytes((_SEPARATOR,)).join(text.translate(_FREE) for text in kept).ljust(length, bytes((_PAD,)))
