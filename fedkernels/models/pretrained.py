"""A model of the `transformers` library from a local directory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..data.tokens import BYTES, Tokens
from .attention import register_attention
from .transformer import Transformer, library
from .vision import TaskKind

_AUTO = {
    "image": "AutoModelForImageClassification",
    "language": "AutoModelForCausalLM",
    "text": "AutoModelForSequenceClassification",
}
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Pretrained(Transformer):
    """A model from a directory that `save_pretrained` wrote: ViT, DeiT, Swin, GPT-2, Llama, RoBERTa and the like.

    The task decides on the head: image classification, next token, or classification of texts. A head that the
    directory lacks, or has for another number of classes, starts at random; anything else that is missing is an error.
    Nothing is downloaded. Dropout is switched off: a client's randomness must follow from seed, round and client.
    Images of another size than the model's are stretched to it. Weights are read as float32.

    Args:
        path: the directory, with `config.json` and weights; its tokenizer is used where the data names none.
        lora, activation_checkpointing: as for every transformer.
    """

    path: str

    def build(self, kind: TaskKind, input_shape: tuple[int, ...], classes: int, tokens: Tokens = BYTES) -> nn.Module:
        """A module from inputs to logits `[b, classes]`, for `language` `[b, length, vocabulary]`.

        Raises:
            FileNotFoundError: no directory, or one without configuration or weights.
            ValueError: files that cannot be read, a model for other tasks, tokens or lengths, or no `transformers`.
        """
        self._check_files()
        transformers = library("pretrained")
        config: Any = self._read(lambda: transformers.AutoConfig.from_pretrained(self.path, local_files_only=True))
        self._check_sizes(config, kind, input_shape, tokens)
        for name in vars(config):
            if re.search(r"drop(out|_path)?(_|$)|pdrop$", name) and isinstance(getattr(config, name), float):
                setattr(config, name, 0.0)
        config.use_cache = False
        if kind == "text":
            config.pad_token_id = tokens.pad
        if kind != "language":
            config.num_labels = classes
        auto = getattr(transformers, _AUTO[kind])
        model, report = self._read(
            lambda: auto.from_pretrained(
                self.path,
                config=config,
                local_files_only=True,
                dtype="float32",
                attn_implementation=register_attention(),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        )
        absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
        if absent := {name for name in absent if not re.match(r"(classifier|score|lm_head)\b", name)}:
            raise ValueError(
                f"model.path: {self.path}: weights missing or of another shape: {', '.join(sorted(absent))}"
            )
        return self.wrap(model, kind, tokens.pad)

    def _check_files(self) -> None:
        folder = Path(self.path)
        if not folder.is_dir():
            raise FileNotFoundError(f"model.path: {self.path} is no directory; nothing is downloaded")
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"model.path: {self.path} has no config.json")
        if not any((folder / name).is_file() for name in _WEIGHTS):
            raise FileNotFoundError(f"model.path: {self.path} has no weights, expected one of {', '.join(_WEIGHTS)}")

    def _read(self, read: Any) -> Any:
        try:
            return read()
        except Exception as error:  # damaged files raise what the parsers of several formats raise
            raise ValueError(f"model.path: cannot read {self.path}: {' '.join(str(error).split())}") from error

    def _check_sizes(self, config: Any, kind: TaskKind, input_shape: tuple[int, ...], tokens: Tokens) -> None:
        what = f"model.path: {self.path} is a {config.model_type}"
        if (kind == "image") != hasattr(config, "num_channels"):
            raise ValueError(f"{what}, which does not take {kind} of shape {input_shape}")
        if kind == "image":
            if config.num_channels != input_shape[0]:
                raise ValueError(f"{what} for images of {config.num_channels} channels, not {input_shape[0]}")
            return
        if tokens.vocabulary > config.vocab_size:
            raise ValueError(f"{what} with {config.vocab_size} tokens, and the data has {tokens.vocabulary}")
        most = getattr(config, "max_position_embeddings", None)
        if config.model_type == "roberta" and most is not None:
            # Positions count from the one after the padding's own.
            most -= (tokens.pad if kind == "text" else config.pad_token_id) + 1
        if most is not None and input_shape[0] > most:
            raise ValueError(f"{what} of at most {most} tokens, and the samples have {input_shape[0]}")
