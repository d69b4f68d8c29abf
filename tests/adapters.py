"""Federations of tiny transformers with low-rank adapters, in float64; importable by processes that start fresh."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from support import uneven_partition
from torch import Tensor, nn

from fedkernels.algorithms import FedAdamW, FedMuon
from fedkernels.contract import Algorithm
from fedkernels.data.datasets import Dataset
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.collectives import Collectives
from fedkernels.federated.engine import Engine
from fedkernels.federated.objective import Objective
from fedkernels.federated.settings import EngineSettings
from fedkernels.models import Llama, Lora, Roberta

LENGTH, CLASSES, VOCABULARY, RANK = 6, 3, 19, 2
LORA = Lora(rank=RANK, alpha=4)
MODELS = {
    "roberta": (Roberta(dim=8, depth=2, heads=2, mlp_ratio=2, lora=LORA), "text"),
    "llama": (Llama(dim=8, depth=2, heads=4, key_heads=2, hidden=12, lora=LORA), "language"),
}
ALGORITHMS: dict[str, type[Algorithm]] = {"fedadamw": FedAdamW, "fedmuon": FedMuon}


def texts(kind: str, samples: int = 150) -> Dataset:
    """Sequences of tokens that end in padding, with a class that most of them show; or the tokens that follow."""
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, CLASSES, samples))
    tokens = torch.from_numpy(rng.integers(1, VOCABULARY, (samples, LENGTH + 1)).astype(np.uint8))
    tokens[:, 2] = labels + 1
    if kind == "language":
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return Dataset("language", inputs, targets, inputs[:50], targets[:50], VOCABULARY, labels, None)
    inputs = tokens[:, :-1].contiguous()
    inputs[torch.arange(LENGTH) >= torch.from_numpy(rng.integers(3, LENGTH + 1, (samples, 1)))] = 0
    return Dataset("text", inputs, labels, inputs[:50], labels[:50], CLASSES, labels, None, metrics=("matthews",))


def adapter_engine(name: str, algorithm: str, collectives: Collectives | None = None, **settings: Any) -> Engine:
    """A federation of a tiny model by name."""
    torch.set_num_threads(1)
    model, kind = MODELS[name]
    data = texts(kind)
    torch.manual_seed(0)
    module = model.build(kind, data.input_shape, data.classes).double()  # type: ignore[arg-type]
    defaults = {
        "rounds": 4, "cohort": 6, "work": LocalWork(8, local_steps=3, local_epochs=3), "lr": 0.05, "evaluator": "loop",
    }  # fmt: skip
    return Engine(
        ALGORITHMS[algorithm](),
        Objective(module, data, torch.device("cpu")),
        uneven_partition(),
        EngineSettings(**(defaults | settings)),
        collectives,
        roles=model.roles(module),
    )


def frozen(module: nn.Module) -> dict[str, Tensor]:
    """What is not trained, copied."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}


def adapters_on_ranks(collectives: Collectives) -> dict[tuple[str, str], dict[str, Any]]:
    """Of every model and algorithm three rounds: the server's vector, the metrics, whether the base is as it was."""
    found = {}
    for name in MODELS:
        for algorithm in ALGORITHMS:
            engine = adapter_engine(name, algorithm, collectives)
            before = frozen(engine.objective.module)
            rows = [engine.run_round() | engine.evaluate() for _ in range(3)]
            after = frozen(engine.objective.module)
            untouched = all(torch.equal(after[key], value) for key, value in before.items())
            found[name, algorithm] = {"x": engine.server.x.numpy().copy(), "rows": rows, "untouched": untouched}
    return found
