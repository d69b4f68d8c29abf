"""Parameter shapes of models that people train, for kernel benchmarks; nothing is allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from fedkernels.layout import Layout
from fedkernels.models import Gpt2, LeNet5, Llama, Lora, ResNet18, Roberta, Vit


@dataclass(frozen=True)
class Shapes:
    """What is trained of a model.

    Args:
        d: parameters, the length of the flat vector.
        matrices: `(count, rows, cols)` of what matrix optimizers get, the largest groups first.
    """

    d: int
    matrices: tuple[tuple[int, int, int], ...]


_LORA = Lora(rank=16)
_MODELS: dict[str, tuple[Any, str, tuple[int, ...], int]] = {
    "lenet5": (LeNet5(), "image", (3, 32, 32), 10),
    "resnet18": (ResNet18(), "image", (3, 32, 32), 100),
    # Depth 6, patch 4, on CIFAR-100: the papers' own.
    "vit_tiny": (Vit(), "image", (3, 32, 32), 100),
    "vit_b": (Vit(768, 12, 12, 16), "image", (3, 224, 224), 1000),
    "gpt2": (Gpt2(768, 12, 12), "language", (1024,), 50_257),
    # Llama-3.2-1B.
    "llama_1b": (Llama(2048, 16, 32, 8, 8192), "language", (1024,), 128_256),
    "llama_1b_lora_r16": (Llama(2048, 16, 32, 8, 8192, lora=_LORA), "language", (1024,), 128_256),
    "roberta_base_lora_r16": (Roberta(768, 12, 12, lora=_LORA), "text", (512,), 2),
}
NAMES = tuple(_MODELS)


@cache
def shapes(name: str) -> Shapes:
    """The shapes of a model of `NAMES`, read off its module on the meta device.

    Example:
        >>> shapes("llama_1b_lora_r16").matrices
        ((32, 16, 2048), (16, 2048, 16), (16, 512, 16))
    """
    model, kind, input_shape, classes = _MODELS[name]
    build: Callable[..., nn.Module] = model.build  # type: ignore[attr-defined]
    with torch.device("meta"):
        module = build(kind, input_shape, classes)
    layout = Layout.of(module, model.roles(module))
    count: Counter[tuple[int, int]] = Counter()
    for slab in layout.slabs:
        count[slab.rows, slab.cols] += slab.count
    groups = sorted(((n, *shape) for shape, n in count.items()), key=lambda group: -group[0] * group[1] * group[2])
    return Shapes(layout.d, tuple(groups))


@dataclass(frozen=True)
class Workload:
    """A model trained by `clients` at once: rows `[C, d]`, and matrices of all of them."""

    name: str
    clients: int
    d: int
    matrices: tuple[tuple[int, int, int], ...]


def workload(name: str) -> Workload:
    """The workload of `MODEL` or `MODEL x CLIENTS`.

    Raises:
        ValueError: no such model, or no number of clients.

    Example:
        >>> workload("lenet5 x 10").clients
        10
    """
    model, _, clients = name.partition(" x ")
    if model not in NAMES or not (clients or "1").isdecimal() or int(clients or 1) < 1:
        raise ValueError(f"shape {name!r}: expected MODEL or 'MODEL x CLIENTS', MODEL one of {', '.join(NAMES)}")
    of_one, count = shapes(model), int(clients or 1)
    return Workload(name, count, of_one.d, tuple((count * n, *sides) for n, *sides in of_one.matrices))
