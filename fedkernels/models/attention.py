"""Transformers of the `transformers` library, from a configuration alone: ViT and GPT-2."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout import Role, infer_roles
from .vision import Size, TaskKind, image_shape

PAD_TOKEN = 0
BYTE_TOKENS = 256
_ATTENTION = "fedkernels_sdpa"


@dataclass(frozen=True)
class Vit:
    """Vision transformer; the defaults are ViT-Tiny of depth 6 for 32-pixel images.

    Args:
        dim: hidden size, a multiple of `heads`.
        depth: number of layers.
        heads: attention heads.
        patch: side of a patch in pixels; both sides of the image are multiples of it.
        mlp_ratio: hidden width of the MLPs over `dim`.

    Reference: Dosovitskiy et al., An image is worth 16x16 words, 2021.
    """

    dim: Size = 192
    depth: Size = 6
    heads: Size = 3
    patch: Size = 4
    mlp_ratio: Size = 4

    def build(self, kind: TaskKind, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """A module from images `[b, c, h, w]` to logits `[b, classes]`, initialised from torch's generator.

        Raises:
            ValueError: not an image task, sizes that do not divide, or no `transformers` package.
        """
        channels, height, width = image_shape("vit", kind, input_shape)
        _check_heads("vit", self.dim, self.heads)
        if height % self.patch or width % self.patch:
            raise ValueError(f"vit: image {height}x{width} is not a multiple of patch {self.patch}")
        transformers = _transformers("vit")
        config = transformers.ViTConfig.from_dict(
            {
                "hidden_size": self.dim,
                "num_hidden_layers": self.depth,
                "num_attention_heads": self.heads,
                "intermediate_size": self.mlp_ratio * self.dim,
                "image_size": (height, width),
                "patch_size": self.patch,
                "num_channels": channels,
                "num_labels": classes,
                "attn_implementation": _register_attention(),
            }
        )
        return _Logits(transformers.ViTForImageClassification(config))

    def roles(self, module: nn.Module) -> dict[str, Role]:
        """What every parameter is, by name."""
        return transformer_roles(module, self.dim // self.heads)


@dataclass(frozen=True)
class Gpt2:
    """GPT-2: next-token prediction with a tied head, or byte-text classification at the last byte.

    The input length sets the number of positions. A language model's vocabulary is `classes`; a classifier reads byte
    tokens and takes the features at the last token that is not padding (0), which under causal attention has seen
    everything before it and no right padding.

    Args:
        dim: hidden size, a multiple of `heads`.
        depth: number of layers.
        heads: attention heads.

    Reference: Radford et al., Language models are unsupervised multitask learners, 2019.
    """

    dim: Size = 128
    depth: Size = 2
    heads: Size = 4

    def build(self, kind: TaskKind, input_shape: tuple[int, ...], classes: int) -> nn.Module:
        """A module from int64 tokens `[b, length]` to logits `[b, length, classes]` or, for text, `[b, classes]`.

        Args:
            kind: of the task; this model takes `language` and `text`.
            input_shape: of one sample, `(length,)`.
            classes: number of logits, for `language` the vocabulary size.

        Raises:
            ValueError: an image task, sizes that do not divide, or no `transformers` package.
        """
        if kind == "image" or len(input_shape) != 1:
            raise ValueError(f"gpt2 takes language or text of shape (length,), not {kind} of shape {input_shape}")
        _check_heads("gpt2", self.dim, self.heads)
        transformers = _transformers("gpt2")
        config = transformers.GPT2Config.from_dict(
            {
                "vocab_size": classes if kind == "language" else BYTE_TOKENS,
                "n_positions": input_shape[0],
                "n_embd": self.dim,
                "n_layer": self.depth,
                "n_head": self.heads,
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
                "use_cache": False,
                # GPT-2's own ids lie outside small vocabularies.
                "bos_token_id": None,
                "eos_token_id": None,
                "attn_implementation": _register_attention(),
            }
        )
        if kind == "language":
            return _Logits(transformers.GPT2LMHeadModel(config))
        return _LastToken(transformers.GPT2Model(config), self.dim, classes)

    def roles(self, module: nn.Module) -> dict[str, Role]:
        """What every parameter is, by name."""
        return transformer_roles(module, self.dim // self.heads)


def transformer_roles(module: nn.Module, head_dim: int) -> dict[str, Role]:
    """What every parameter of a ViT, GPT-2, Llama or RoBERTa of `transformers` is, by name.

    Queries and keys have one curvature block per head, also where fewer heads of keys serve all queries, and where one
    weight holds queries, keys and values side by side; other matrices one per output, embeddings one per token.

    Args:
        module: the model, or a module around it; its output layer is called as `transformers` does, or `head`.
        head_dim: outputs of one attention head.
    """
    inferred = infer_roles(module)
    roles = {}
    # By parameter, not by module: a tied head would show up a second time under its own name.
    for name, p in module.named_parameters():
        roles[name] = inferred[name]
        if re.search(r"\b(q_proj|k_proj|query|key)\.weight$", name):
            roles[name] = Role("matrix", 0, ((0, p.shape[0], p.shape[0] // head_dim),))
        elif name.endswith("c_attn.weight"):  # GPT-2's matrices are (in, out)
            dim, out = p.shape
            roles[name] = Role("matrix", 1, ((0, 2 * dim, 2 * dim // head_dim), (2 * dim, out, out - 2 * dim)))
        elif re.search(r"\b(c_proj|c_fc)\.weight$", name):
            roles[name] = Role("matrix", 1, ((0, p.shape[1], p.shape[1]),))
        elif re.search(r"\b(cls_token|position_embeddings)$", name):
            roles[name] = Role("embedding", 1, ((0, p.shape[1], p.shape[1]),))
        elif re.search(r"\b(classifier|classifier\.out_proj|lm_head|score|head)\.weight$", name):
            roles[name] = Role("head", 0, ((0, p.shape[0], p.shape[0]),))
    return roles


class _Logits(nn.Module):
    """The logits of a `transformers` model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x).logits
        return logits


class _LastToken(nn.Module):
    """A linear head on the features of the last token that is not padding."""

    def __init__(self, model: nn.Module, dim: int, classes: int) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.model(x).last_hidden_state
        positions = torch.arange(x.shape[1], device=x.device)
        last = (positions * (x != PAD_TOKEN)).argmax(1)
        logits: Tensor = self.head(features.take_along_dim(last[:, None, None], 1).squeeze(1))
        return logits


def _check_heads(model: str, dim: int, heads: int) -> None:
    if dim % heads:
        raise ValueError(f"{model}: dim {dim} is not a multiple of heads {heads}")


def _transformers(model: str) -> ModuleType:
    """The optional package, imported only where a model needs it."""
    try:
        import transformers
    except ModuleNotFoundError:
        message = f"model: {model} needs the transformers package: pip install 'fedkernels[hf]'"
        raise ValueError(message) from None
    return transformers


def _register_attention() -> str:
    """Name of our attention, made known to `transformers`.

    For a name it has no mask function for, `transformers` builds no mask: its "sdpa" inspects the positions each
    forward, which waits for the GPU and swaps the causal flag for a dense mask under capture and compilation. Its
    "eager" takes the softmax in float32 even for float64 models.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attention)
    return _ATTENTION


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Attention of `[b, heads, length, dim]` queries, keys and values as `[b, length, heads, dim]`."""
    if query.dtype == torch.bfloat16 and not query.is_cuda:
        # The fused CPU kernel's bf16 backward is several times slower than its fp32 one; plain products are fast.
        scores = (query @ key.mT).float() * scaling
        if module.is_causal:
            length = query.shape[-2]
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
            scores = scores.masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2), None
    out = F.scaled_dot_product_attention(query, key, value, is_causal=module.is_causal, scale=scaling)
    return out.transpose(1, 2), None
