"""Plain vision models: a perceptron, three small convolutional networks and ResNet-18, none with buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..data.tokens import BYTES, Tokens
from ..layout import Role, infer_roles

TaskKind = Literal["image", "language", "text"]
Size = Annotated[int, Field(ge=1)]


def image_shape(model: str, kind: TaskKind, input_shape: Sequence[int], min_side: int = 1) -> tuple[int, int, int]:
    """The `(channels, height, width)` of an image task.

    Args:
        model: name for the error message.
        kind: of the task.
        input_shape: of one sample.
        min_side: smallest height and width the model can take, in pixels.

    Raises:
        ValueError: the task is not about images, or they are smaller than `min_side` pixels.
    """
    if kind != "image" or len(input_shape) != 3:
        raise ValueError(f"{model} takes images (channels, height, width), not {kind} of shape {tuple(input_shape)}")
    channels, height, width = input_shape
    if min(height, width) < min_side:
        raise ValueError(f"{model} takes images of at least {min_side}x{min_side} pixels, not {height}x{width}")
    return channels, height, width


class _WithHead:
    """Roles of modules whose output layer is called `head`: the rest follows from the module types."""

    def roles(self, module: nn.Module) -> dict[str, Role]:
        """What every parameter is, by name."""
        roles = infer_roles(module)
        return roles | {"head.weight": replace(roles["head.weight"], kind="head")}


@dataclass(frozen=True)
class Mlp(_WithHead):
    """Multi-layer perceptron on flattened images, GELU.

    Args:
        hidden: widths of the hidden layers; empty for a linear model.
    """

    hidden: tuple[Size, ...] = (64,)

    def build(self, kind: TaskKind, input_shape: tuple[int, ...], classes: int, tokens: Tokens = BYTES) -> nn.Module:
        """A module from images `[b, c, h, w]` to logits `[b, classes]`, initialised from torch's generator.

        Args:
            kind: of the task; this model takes `image`.
            input_shape: of one sample, `(channels, height, width)`.
            classes: number of logits.
            tokens: of texts; images have none.

        Example:
            >>> [tuple(p.shape) for p in Mlp((5,)).build("image", (1, 2, 2), 3).parameters()]
            [(5, 4), (5,), (3, 5), (3,)]

        Raises:
            ValueError: not an image task.
        """
        channels, height, width = image_shape("mlp", kind, input_shape)
        return _Mlp([channels * height * width, *self.hidden], classes)


class _Mlp(nn.Module):
    def __init__(self, widths: list[int], classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = F.gelu(layer(x))
        logits: Tensor = self.head(x)
        return logits


@dataclass(frozen=True)
class LeNet5(_WithHead):
    """LeNet-5: two 5x5 convolutions with max pooling, three fully connected layers, ReLU.

    A convolution pads by 2 where its input is smaller than in the original (32 and 14 pixels), so that 28-pixel images
    give the original's 400 features and small ones such as 8x8 are still halved twice rather than used up.

    Args:
        width: multiplies the channels 6, 16 and the features 120, 84.

    Reference: LeCun et al., Gradient-based learning applied to document recognition, 1998.
    """

    width: Size = 1

    def build(self, kind: TaskKind, input_shape: tuple[int, ...], classes: int, tokens: Tokens = BYTES) -> nn.Module:
        """A module from images `[b, c, h, w]` to logits `[b, classes]`, initialised from torch's generator.

        Raises:
            ValueError: not an image task, or images smaller than 4x4 pixels.
        """
        channels, height, width = image_shape("lenet5", kind, input_shape, min_side=4)
        w, padding, sides = self.width, [], (height, width)
        for original_side in (32, 14):
            padding.append(2 if min(sides) < original_side else 0)
            sides = ((sides[0] + 2 * padding[-1] - 4) // 2, (sides[1] + 2 * padding[-1] - 4) // 2)
        features = (16 * w * sides[0] * sides[1], 120 * w, 84 * w)
        return _ConvNet((channels, 6 * w, 16 * w), padding, features, classes)


@dataclass(frozen=True)
class Cnn(_WithHead):
    """The convolutional network of the FedAvg paper: 5x5 convolutions with 32 and 64 channels, 512 features, ReLU.

    Convolutions keep the image size and each is followed by 2x2 max pooling: 1,663,370 parameters on 1x28x28 images
    with 10 classes.

    Reference: McMahan et al., Communication-efficient learning of deep networks from decentralized data, 2017.
    """

    def build(self, kind: TaskKind, input_shape: tuple[int, ...], classes: int, tokens: Tokens = BYTES) -> nn.Module:
        """A module from images `[b, c, h, w]` to logits `[b, classes]`, initialised from torch's generator.

        Raises:
            ValueError: not an image task, or images smaller than 4x4 pixels.
        """
        channels, height, width = image_shape("cnn", kind, input_shape, min_side=4)
        return _ConvNet((channels, 32, 64), (2, 2), (64 * (height // 4) * (width // 4), 512), classes)


@dataclass(frozen=True)
class Cnn3x3(_WithHead):
    """The convolutional network of Adaptive federated optimization, without dropout.

    Two 3x3 convolutions with 32 and 64 channels, one 2x2 max pooling, 128 features, ReLU: 1,626,442 parameters on
    3x32x32 images with 10 classes.

    Reference: Reddi et al., Adaptive federated optimization, 2021.
    """

    def build(self, kind: TaskKind, input_shape: tuple[int, ...], classes: int, tokens: Tokens = BYTES) -> nn.Module:
        """A module from images `[b, c, h, w]` to logits `[b, classes]`, initialised from torch's generator.

        Raises:
            ValueError: not an image task, or images smaller than 6x6 pixels.
        """
        channels, height, width = image_shape("cnn3x3", kind, input_shape, min_side=6)
        return _Cnn3x3(channels, 64 * ((height - 4) // 2) * ((width - 4) // 2), classes)


class _Cnn3x3(nn.Module):
    def __init__(self, channels: int, features: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.hidden = nn.Linear(features, 128)
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        logits: Tensor = self.head(F.relu(self.hidden(x.flatten(1))))
        return logits


class _ConvNet(nn.Module):
    """5x5 convolutions, each with ReLU and 2x2 max pooling, then fully connected layers."""

    def __init__(self, channels: Sequence[int], padding: Sequence[int], features: Sequence[int], classes: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 5, padding=p) for (a, b), p in zip(pairwise(channels), padding, strict=True)
        )
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(features))
        self.head = nn.Linear(features[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = F.max_pool2d(F.relu(convolution(x)), 2)
        x = x.flatten(1)
        for layer in self.layers:
            x = F.relu(layer(x))
        logits: Tensor = self.head(x)
        return logits


@dataclass(frozen=True)
class ResNet18(_WithHead):
    """ResNet-18 with group norm, whose statistics stay inside a sample and so need no averaging between clients.

    Images of up to 64 pixels enter by a 3x3 convolution, larger ones by the original 7x7 with stride 2 and max pooling.

    Args:
        groups: groups of every group norm; two is customary in federated learning.
        width: channels of the first stage, a multiple of `groups`.

    References: He et al., Deep residual learning for image recognition, 2016; two groups from Reddi et al., Adaptive
    federated optimization, 2021.
    """

    groups: Size = 2
    width: Size = 64

    def build(self, kind: TaskKind, input_shape: tuple[int, ...], classes: int, tokens: Tokens = BYTES) -> nn.Module:
        """A module from images `[b, c, h, w]` to logits `[b, classes]`, initialised from torch's generator.

        Raises:
            ValueError: not an image task, or a width that is not a multiple of the groups.
        """
        channels, height, width = image_shape("resnet18", kind, input_shape)
        if self.width % self.groups:
            raise ValueError(f"resnet18: width {self.width} is not a multiple of groups {self.groups}")
        return _ResNet18(channels, self.width, self.groups, classes, large_images=max(height, width) > 64)


class _ResNet18(nn.Module):
    def __init__(self, channels: int, width: int, groups: int, classes: int, *, large_images: bool) -> None:
        super().__init__()
        kernel, stride = (7, 2) if large_images else (3, 1)
        self.stem = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(groups, width)
        self.pool = nn.MaxPool2d(3, 2, padding=1) if large_images else nn.Identity()
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.blocks = nn.Sequential(
            *(
                block
                for a, b in pairwise(widths)
                for block in (_Residual(a, b, 1 if a == b else 2, groups), _Residual(b, b, 1, groups))
            )
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm(self.stem(x))))
        logits: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return logits


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.shortcut = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(groups, outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))
