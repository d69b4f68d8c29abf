"""Language models of the `transformers` library, from a configuration alone: GPT-2, Llama and RoBERTa."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..data.tokens import BYTES, Tokens
from .attention import register_attention
from .transformer import Transformer, check_heads, library
from .vision import Size, TaskKind


@dataclass(frozen=True)
class Gpt2(Transformer):
    """GPT-2: next-token prediction with a tied head, or classification of texts at their last token.

    The input length sets the number of positions. A classifier takes the features at the last token that is not
    padding, which under causal attention has seen everything before it and no padding after it.

    Args:
        dim: hidden size, a multiple of `heads`.
        depth: number of layers.
        heads: attention heads.
        lora, activation_checkpointing: as for every transformer.

    Reference: Radford et al., Language models are unsupervised multitask learners, 2019.
    """

    dim: Size = 128
    depth: Size = 2
    heads: Size = 4

    def build(self, kind: TaskKind, input_shape: tuple[int, ...], classes: int, tokens: Tokens = BYTES) -> nn.Module:
        """A module from int64 tokens `[b, length]` to logits `[b, length, classes]` or, for text, `[b, classes]`.

        Args:
            kind: of the task; this model takes `language` and `text`.
            input_shape: of one sample, `(length,)`.
            classes: number of logits, for `language` the vocabulary size.
            tokens: vocabulary and padding of texts.

        Raises:
            ValueError: an image task, sizes that do not divide, or no `transformers` package.
        """
        length = _length("gpt2", kind, input_shape)
        check_heads("gpt2", self.dim, self.heads)
        transformers = library("gpt2")
        config = transformers.GPT2Config.from_dict(
            {
                "n_positions": length,
                "n_embd": self.dim,
                "n_layer": self.depth,
                "n_head": self.heads,
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
                **_common_fields(kind, classes, tokens),
            }
        )
        language = kind == "language"
        model = (transformers.GPT2LMHeadModel if language else transformers.GPT2ForSequenceClassification)(config)
        return self.wrap(model, kind, tokens.pad)


@dataclass(frozen=True)
class Llama(Transformer):
    """Llama: rotary positions, RMS norms, gated MLPs and grouped queries; next-token prediction or classification.

    The head of the language model is tied to its embedding, as in the small models of the family. A classifier takes
    the features at the last token that is not padding.

    Args:
        dim: hidden size, a multiple of `heads`.
        depth: number of layers.
        heads: attention heads.
        key_heads: heads of keys and values, each for `heads / key_heads` heads of queries.
        hidden: width of the gated MLPs.
        lora, activation_checkpointing: as for every transformer.

    Reference: Touvron et al., Llama: open and efficient foundation language models, 2023 (arXiv 2302.13971).
    """

    dim: Size = 128
    depth: Size = 2
    heads: Size = 4
    key_heads: Size = 2
    hidden: Size = 352

    def build(self, kind: TaskKind, input_shape: tuple[int, ...], classes: int, tokens: Tokens = BYTES) -> nn.Module:
        """A module from int64 tokens `[b, length]` to logits `[b, length, classes]` or, for text, `[b, classes]`.

        Raises:
            ValueError: an image task, sizes that do not divide, or no `transformers` package.
        """
        length = _length("llama", kind, input_shape)
        check_heads("llama", self.dim, self.heads)
        if self.heads % self.key_heads:
            raise ValueError(f"llama: heads {self.heads} is not a multiple of key_heads {self.key_heads}")
        transformers = library("llama")
        config = transformers.LlamaConfig.from_dict(
            {
                "hidden_size": self.dim,
                "num_hidden_layers": self.depth,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.key_heads,
                "intermediate_size": self.hidden,
                "max_position_embeddings": length,
                "tie_word_embeddings": True,
                **_common_fields(kind, classes, tokens),
            }
        )
        language = kind == "language"
        model = (transformers.LlamaForCausalLM if language else transformers.LlamaForSequenceClassification)(config)
        return self.wrap(model, kind, tokens.pad)


@dataclass(frozen=True)
class Roberta(Transformer):
    """RoBERTa: classification of texts at their first token; attention sees everything but padding.

    Args:
        dim: hidden size, a multiple of `heads`.
        depth: number of layers.
        heads: attention heads.
        mlp_ratio: hidden width of the MLPs over `dim`.
        lora, activation_checkpointing: as for every transformer.

    Reference: Liu et al., RoBERTa: a robustly optimized BERT pretraining approach, 2019 (arXiv 1907.11692).
    """

    dim: Size = 128
    depth: Size = 2
    heads: Size = 4
    mlp_ratio: Size = 4

    def build(self, kind: TaskKind, input_shape: tuple[int, ...], classes: int, tokens: Tokens = BYTES) -> nn.Module:
        """A module from int64 tokens `[b, length]` to logits `[b, classes]`.

        Raises:
            ValueError: not a text task, sizes that do not divide, or no `transformers` package.
        """
        if kind != "text":
            raise ValueError(f"roberta classifies texts: it takes text of shape (length,), not {kind} {input_shape}")
        length = _length("roberta", kind, input_shape)
        check_heads("roberta", self.dim, self.heads)
        transformers = library("roberta")
        config = transformers.RobertaConfig.from_dict(
            {
                "hidden_size": self.dim,
                "num_hidden_layers": self.depth,
                "num_attention_heads": self.heads,
                "intermediate_size": self.mlp_ratio * self.dim,
                # Positions count from the one after the padding's own.
                "max_position_embeddings": length + tokens.pad + 1,
                "type_vocab_size": 1,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
                **_common_fields(kind, classes, tokens),
            }
        )
        return self.wrap(transformers.RobertaForSequenceClassification(config), kind, tokens.pad)


def _length(model: str, kind: TaskKind, input_shape: Sequence[int]) -> int:
    if kind == "image" or len(input_shape) != 1:
        raise ValueError(f"{model} takes language or text of shape (length,), not {kind} of shape {tuple(input_shape)}")
    return input_shape[0]


def _common_fields(kind: TaskKind, classes: int, tokens: Tokens) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "vocab_size": classes if kind == "language" else tokens.vocabulary,
        "use_cache": False,
        # The families' own ids lie outside small vocabularies.
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": register_attention(),
    }
    return fields if kind == "language" else fields | {"num_labels": classes, "pad_token_id": tokens.pad}
