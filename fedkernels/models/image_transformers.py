"""Image transformers of the `transformers` library, from a configuration alone: ViT, DeiT and Swin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..data.tokens import BYTES, Tokens
from .attention import register_attention
from .transformer import Transformer, check_heads, library
from .vision import Size, TaskKind, image_shape


@dataclass(frozen=True)
class Vit(Transformer):
    """Vision transformer; the defaults are ViT-Tiny of depth 6 for 32-pixel images.

    Args:
        dim: hidden size, a multiple of `heads`.
        depth: number of layers.
        heads: attention heads.
        patch: side of a patch in pixels; both sides of the image are multiples of it.
        mlp_ratio: hidden width of the MLPs over `dim`.
        lora, activation_checkpointing: as for every transformer.

    Reference: Dosovitskiy et al., An image is worth 16x16 words, 2021.
    """

    dim: Size = 192
    depth: Size = 6
    heads: Size = 3
    patch: Size = 4
    mlp_ratio: Size = 4

    def build(self, kind: TaskKind, input_shape: tuple[int, ...], classes: int, tokens: Tokens = BYTES) -> nn.Module:
        """A module from images `[b, c, h, w]` to logits `[b, classes]`, initialised from torch's generator.

        Raises:
            ValueError: not an image task, sizes that do not divide, or no `transformers` package.
        """
        fields = _vit_fields("vit", self, kind, input_shape, classes)
        transformers = library("vit")
        config = transformers.ViTConfig.from_dict(fields | {"attn_implementation": register_attention()})
        return self.wrap(transformers.ViTForImageClassification(config), kind)


@dataclass(frozen=True)
class Deit(Vit):
    """Data-efficient image transformer: a ViT with a distillation token beside the class token, head on the latter.

    Keys and defaults are those of `vit`, so that it is DeiT-Tiny of depth 6 for 32-pixel images.

    Reference: Touvron et al., Training data-efficient image transformers, 2021 (arXiv 2012.12877).
    """

    def build(self, kind: TaskKind, input_shape: tuple[int, ...], classes: int, tokens: Tokens = BYTES) -> nn.Module:
        """A module from images `[b, c, h, w]` to logits `[b, classes]`, initialised from torch's generator.

        Raises:
            ValueError: not an image task, sizes that do not divide, or no `transformers` package.
        """
        fields = _vit_fields("deit", self, kind, input_shape, classes)
        transformers = library("deit")
        config = transformers.DeiTConfig.from_dict(fields | {"attn_implementation": register_attention()})
        return self.wrap(transformers.DeiTForImageClassification(config), kind)


@dataclass(frozen=True)
class Swin(Transformer):
    """Swin transformer: attention within shifted windows, patches merged by two between stages.

    The defaults are small, for 32-pixel images: windows of 4 on 16x16 patches, then on 8x8.

    Args:
        dim: hidden size of the first stage, doubled by each that follows.
        depths: layers of every stage.
        heads: attention heads of every stage, doubled like the hidden size; all are as wide.
        window: side of a window in patches.
        patch: side of a patch in pixels; both sides of the image are multiples of it.
        mlp_ratio: hidden width of the MLPs over the hidden size.
        lora, activation_checkpointing: as for every transformer.

    Reference: Liu et al., Swin transformer: hierarchical vision transformer using shifted windows, 2021
    (arXiv 2103.14030).
    """

    dim: Size = 48
    depths: tuple[Size, ...] = (2, 2)
    heads: tuple[Size, ...] = (3, 6)
    window: Size = 4
    patch: Size = 2
    mlp_ratio: Size = 4

    def build(self, kind: TaskKind, input_shape: tuple[int, ...], classes: int, tokens: Tokens = BYTES) -> nn.Module:
        """A module from images `[b, c, h, w]` to logits `[b, classes]`, initialised from torch's generator.

        Raises:
            ValueError: not an image task, sizes that do not divide, or no `transformers` package.
        """
        channels, height, width = image_shape("swin", kind, input_shape)
        if not self.depths or len(self.depths) != len(self.heads):
            raise ValueError(f"swin: depths {self.depths} and heads {self.heads} must name the same number of stages")
        check_heads("swin", self.dim, self.heads[0])
        if self.heads != tuple(self.heads[0] * 2**stage for stage in range(len(self.heads))):
            raise ValueError(f"swin: heads {self.heads} must double from stage to stage, as the hidden size does")
        _check_patch("swin", height, width, self.patch)
        transformers = library("swin")
        config = transformers.SwinConfig.from_dict(
            {
                "embed_dim": self.dim,
                "depths": list(self.depths),
                "num_heads": list(self.heads),
                "window_size": self.window,
                "mlp_ratio": float(self.mlp_ratio),
                "drop_path_rate": 0.0,
                "image_size": (height, width),
                "patch_size": self.patch,
                "num_channels": channels,
                "num_labels": classes,
                "attn_implementation": register_attention(),
            }
        )
        return self.wrap(transformers.SwinForImageClassification(config), kind)


def _vit_fields(model: str, sizes: Vit, kind: TaskKind, input_shape: Sequence[int], classes: int) -> dict[str, Any]:
    channels, height, width = image_shape(model, kind, input_shape)
    check_heads(model, sizes.dim, sizes.heads)
    _check_patch(model, height, width, sizes.patch)
    return {
        "hidden_size": sizes.dim,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.mlp_ratio * sizes.dim,
        "image_size": (height, width),
        "patch_size": sizes.patch,
        "num_channels": channels,
        "num_labels": classes,
    }


def _check_patch(model: str, height: int, width: int, patch: int) -> None:
    if height % patch or width % patch:
        raise ValueError(f"{model}: image {height}x{width} is not a multiple of patch {patch}")
