"""What all models of the `transformers` library share: adapters, recomputation, and a module from inputs to logits."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout import Role
from .lora import Lora
from .roles import transformer_roles
from .vision import TaskKind


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """What every model of `transformers` can be told.

    Args:
        lora: train low-rank adapters on a frozen base; null trains everything.
        activation_checkpointing: keep the inputs of layers only and compute the rest again in backward; for the
            evaluators `loop` and `compiled`.
    """

    lora: Lora | None = None
    activation_checkpointing: bool = False

    def roles(self, module: nn.Module) -> dict[str, Role]:
        """What every parameter is, by name."""
        assert isinstance(module, TransformerModule)
        return transformer_roles(module, module.head_dim)

    def wrap(self, model: Any, kind: TaskKind, pad: int = 0) -> TransformerModule:
        """The module from inputs to logits, with adapters and recomputation where they are asked for."""
        if self.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        return TransformerModule(self.lora.apply(model, kind) if self.lora else model, kind, pad)


class TransformerModule(nn.Module):
    """A model of `transformers`, perhaps with adapters of `peft`, as a map from inputs to logits.

    Args:
        model: with a head for the kind of task.
        pad: the token id that texts are padded with.
    """

    def __init__(self, model: Any, kind: TaskKind, pad: int) -> None:
        super().__init__()
        self.model = model
        self._kind = kind
        self._pad = pad
        self._causal = any(getattr(child, "is_causal", False) for child in model.modules())
        self.train()  # from_pretrained returns a model for evaluation

    @property
    def library_model(self) -> Any:
        """The model of `transformers`, inside its adapters where there are any."""
        return self.model.get_base_model() if self.adapted else self.model

    @property
    def adapted(self) -> bool:
        """Whether it has adapters of `peft`."""
        return hasattr(self.model, "peft_config")

    @property
    def head_dim(self) -> int:
        """Outputs of one attention head."""
        config = self.library_model.config
        heads = config.num_attention_heads
        if isinstance(heads, (list, tuple)):  # Swin: a number for every stage, whose heads are all as wide
            return int(config.embed_dim // heads[0])
        return int(getattr(config, "head_dim", None) or config.hidden_size // heads)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[b, classes]` of images or texts, `[b, length, vocabulary]` of a language model."""
        logits: Tensor
        if self._kind == "image":
            size = self.library_model.config.image_size
            size = (size, size) if isinstance(size, int) else tuple(size)
            if tuple(x.shape[-2:]) != size:
                x = F.interpolate(x, size, mode="bilinear", align_corners=False)
            logits = self.model(pixel_values=x).logits
            return logits
        mask = torch.ones_like(x, dtype=torch.bool) if self._kind == "language" else x != self._pad
        if not self._causal:
            mask = mask[:, None, None, :]  # of four dimensions, so that it reaches the attention as it is
        # A causal model sees no padding before its last token, and its attention never gets the mask.
        logits = self.model(input_ids=x, attention_mask=mask).logits
        return logits


def library(model: str) -> ModuleType:
    """The optional package `transformers`, imported only where a model needs it, and without its progress bars.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        message = f"model: {model} needs the transformers package: pip install 'fedkernels[hf]'"
        raise ValueError(message) from None
    transformers.logging.disable_progress_bar()
    return transformers


def check_heads(model: str, dim: int, heads: int) -> None:
    """Raise a ValueError unless heads share the hidden size evenly."""
    if dim % heads:
        raise ValueError(f"{model}: dim {dim} is not a multiple of heads {heads}")
