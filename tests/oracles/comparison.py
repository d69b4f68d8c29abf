"""The engine beside an oracle: models of every parameter kind, and what must agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from support import CLASSES, tiny_data, tiny_model, tiny_roles, uneven_partition
from torch import Tensor, nn

from fedkernels.contract import Algorithm
from fedkernels.data.datasets import Dataset
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.engine import Engine
from fedkernels.federated.objective import Objective
from fedkernels.federated.settings import EngineSettings
from fedkernels.layout import Layout, Role, infer_roles
from fedkernels.models import MODELS
from fedkernels.privacy.mechanism import seeded_normal

from .federation import Federation, Named

Built = tuple[nn.Module, dict[str, Role], Dataset]


def tiny() -> Built:
    module = tiny_model()
    return module, tiny_roles(module), tiny_data()


def conv() -> Built:
    """A tall convolution (12 x 9), a wide one (3 x 48)."""
    torch.manual_seed(1)
    module = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.GroupNorm(2, 12), nn.Tanh(), nn.Conv2d(12, 3, 2), nn.Tanh(), nn.Flatten(),
        nn.Linear(27, CLASSES),
    ).double()  # fmt: skip
    return module, infer_roles(module) | {"6.weight": Role("head", 0, ((0, CLASSES, CLASSES),))}, tiny_data()


def well_conditioned(module: nn.Module, key_bias: str) -> nn.Module:
    """Weights far enough from zero that attention matters, in float64, without the key bias.

    A key bias shifts every attention score alike: its gradient is rounding, which Adam divides by ε.
    """
    module.get_parameter(key_bias).requires_grad_(False)
    for p in module.parameters():
        p.data *= 10 if p.dim() >= 2 else 1
    return module.double()


def vit() -> Built:
    torch.manual_seed(2)
    choice = MODELS["vit"](dim=8, depth=1, heads=2, patch=2)
    module = choice.build("image", (1, 4, 4), CLASSES)
    module = well_conditioned(module, "model.vit.layers.0.attention.k_proj.bias")
    return module, choice.roles(module), tiny_data()


def gpt2() -> Built:
    torch.manual_seed(3)
    rng = np.random.default_rng(3)
    labels = rng.integers(0, CLASSES, 150)
    tokens = torch.from_numpy((1 + labels[:, None] + rng.integers(0, 3, (150, 6))).astype(np.uint8))
    targets = torch.from_numpy(labels)
    choice = MODELS["gpt2"](dim=8, depth=1, heads=2)
    module = well_conditioned(choice.build("text", (6,), CLASSES), "model.transformer.h.0.attn.c_attn.bias")
    return module, choice.roles(module), Dataset("text", tokens, targets, tokens, targets, CLASSES, targets, None)


VIT_LAYER = "model.vit.layers.0."
VIT_QK = tuple(f"{VIT_LAYER}attention.{n}_proj.weight" for n in "qk")
GPT2_WEIGHTS = tuple(
    f"model.transformer.h.0.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
)
MODEL_FACTS: dict[Callable[[], Built], dict[str, Any]] = {
    tiny: {"hidden": ("1.weight", "4.weight", "6.weight")},
    conv: {"hidden": ("0.weight", "3.weight")},
    vit: {
        "hidden": (
            "model.vit.embeddings.patch_embeddings.projection.weight",
            *VIT_QK,
            *(f"{VIT_LAYER}{n}.weight" for n in ("attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")),
        ),
        "heads": dict.fromkeys(VIT_QK, 2),
        "tokens": ("model.vit.embeddings.cls_token", "model.vit.embeddings.position_embeddings"),
    },
    gpt2: {"hidden": GPT2_WEIGHTS, "transposed": GPT2_WEIGHTS, "heads": {GPT2_WEIGHTS[0]: 2}},
}


@dataclass(frozen=True)
class Case:
    """An algorithm and the oracle that must agree with it.

    Args:
        oracle: called with the federation and a number of rounds, it returns what `check` expects.
        settings: of the engine, where they differ from those in `both`.
        expand: by name, how a server vector of another size becomes one `[d]` to compare by parameter.
        unseen: server vectors that the oracle does not have.
    """

    algorithm: Algorithm
    oracle: Callable[..., dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    expand: dict[str, Callable[[Layout, Tensor], Tensor]] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()


def both(
    algorithm: Algorithm, model: Callable[[], Built], settings: dict[str, Any], *, every_matrix: bool = False
) -> tuple[Engine, Federation]:
    """The engine and the oracle's federation over the same model, data and settings."""
    module, roles, data = model()
    facts = MODEL_FACTS[model]
    if every_matrix:
        every = tuple(n for n, p in module.named_parameters() if p.dim() >= 2)
        assert len(every) > len(facts["hidden"])
        facts = facts | {"hidden": every}
    work = LocalWork(8, local_steps=3, local_epochs=2)
    chosen = EngineSettings(**({"rounds": 4, "cohort": 4, "work": work, "lr": 0.05, "evaluator": "loop"} | settings))
    objective = Objective(module, data, torch.device("cpu"))
    engine = Engine(algorithm, objective, uneven_partition(), chosen, roles=roles)

    secret = chosen.seed if engine.mechanism is None else engine.mechanism.seed

    def normal(r: int) -> Named:
        z = seeded_normal(secret, r, engine.layout.d)
        return {n: t.clone() for n, t in engine.layout.views(torch.from_numpy(z)).items()}

    return engine, Federation(module, engine.batches, chosen, **facts, normal=normal, cohort_seed=secret)


def agree(engine: Engine, vector: Tensor, expected: Named | Tensor, what: str) -> None:
    """Equal to rounding, relative to the largest entry of every tensor."""
    if isinstance(expected, Tensor):
        found, expected = {what: vector}, {what: expected}
    elif vector.numel() != engine.layout.d:  # matrices only
        assert vector.numel() == sum(m.numel() for m in expected.values()), what
        rest = torch.zeros(engine.layout.d - engine.layout.d_matrix, dtype=vector.dtype)
        found = engine.layout.views(engine.layout.merge(vector, rest))
    else:
        found = engine.layout.views(vector)
        assert found.keys() == expected.keys(), what
    for name, value in expected.items():
        atol = 1e-10 * float(value.abs().max())
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=atol, msg=lambda m, name=name: f"{what}, {name}: {m}"
        )


def check(
    engine: Engine,
    expected: dict[str, Any],
    rounds: int = 3,
    expand: Mapping[str, Callable[[Layout, Tensor], Tensor]] | None = None,
    unseen: tuple[str, ...] = (),
) -> None:
    """The engine's state after some rounds equals the oracle's, and training moved every parameter.

    Args:
        expected: server vectors by name, as named tensors or as the flat tensor itself; under `kept`, by name and
            client, what stays with clients. All there is on either side must be in it, except the names in `unseen`.
        expand, unseen: as in `Case`.
    """
    start = {n: p.clone() for n, p in engine.named_parameters().items()}
    for _ in range(rounds):
        engine.run_round()
    assert [n for n, p in engine.named_parameters().items() if (p - start[n]).abs().max() < 1e-3] == []
    kept = expected.pop("kept", {})
    assert expected.keys() == engine.server.keys() - set(unseen)
    for name, value in expected.items():
        vector = engine.server[name]
        agree(engine, expand[name](engine.layout, vector) if expand and name in expand else vector, value, name)
    assert kept.keys() == set(engine.algorithm.keep)
    for name, clients in kept.items():
        assert set(engine.store.ids) == set(clients)
        for client, value in clients.items():
            agree(engine, engine.store.get([client])[name][0], value, f"{name} of client {client}")
