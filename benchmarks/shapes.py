"""Parameter shapes of models that people train, for kernel benchmarks; nothing is allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from fedkernels.layout import Layout
from fedkernels.models import Gpt2, Llama, Lora, Roberta, Vit
from fedkernels.models.transformer import Transformer


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
_MODELS: dict[str, tuple[Transformer, str, tuple[int, ...], int]] = {
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
