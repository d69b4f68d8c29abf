"""Models by name: each configuration builds a module that maps inputs to logits and says what its parameters are."""

from __future__ import annotations

from .image_transformers import Deit, Swin, Vit
from .language import Gpt2, Llama, Roberta
from .lora import Lora
from .pretrained import Pretrained
from .transformer import TransformerModule
from .vision import Cnn, Cnn3x3, LeNet5, Mlp, ResNet18

MODELS: dict[str, type] = {
    "mlp": Mlp,
    "lenet5": LeNet5,
    "cnn": Cnn,
    "cnn3x3": Cnn3x3,
    "resnet18": ResNet18,
    "vit": Vit,
    "deit": Deit,
    "swin": Swin,
    "gpt2": Gpt2,
    "llama": Llama,
    "roberta": Roberta,
    "pretrained": Pretrained,
}

__all__ = [
    "MODELS",
    "Cnn",
    "Cnn3x3",
    "Deit",
    "Gpt2",
    "LeNet5",
    "Llama",
    "Lora",
    "Mlp",
    "Pretrained",
    "ResNet18",
    "Roberta",
    "Swin",
    "TransformerModule",
    "Vit",
]
