"""Models by name: each configuration builds a module that maps inputs to logits and says what its parameters are."""

from __future__ import annotations

from .attention import Gpt2, Vit
from .vision import Cnn, Cnn3x3, LeNet5, Mlp, ResNet18

MODELS: dict[str, type] = {
    "mlp": Mlp,
    "lenet5": LeNet5,
    "cnn": Cnn,
    "cnn3x3": Cnn3x3,
    "resnet18": ResNet18,
    "vit": Vit,
    "gpt2": Gpt2,
}

__all__ = ["MODELS", "Cnn", "Cnn3x3", "Gpt2", "LeNet5", "Mlp", "ResNet18", "Vit"]
