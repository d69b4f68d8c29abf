"""Every algorithm through the engine against loops over named tensors, on models of every parameter kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from oracles import Federation, Named
from support import CLASSES, tiny_data, tiny_model, tiny_roles, uneven_partition
from torch import Tensor, nn

from fedkernels.algorithms import ALGORITHMS, FedAdamW, FedAvg, FedBcgd, FedMuon, LocalAdamW, LocalMuon, Scaffold
from fedkernels.contract import Algorithm
from fedkernels.data.datasets import Dataset
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.engine import Engine, EngineSettings
from fedkernels.federated.objective import Objective
from fedkernels.layout import Role, infer_roles
from fedkernels.models import MODELS
from fedkernels.optim import AdamW, Muon, Sgd

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
    module = well_conditioned(choice.build("text", (6,), CLASSES), "model.h.0.attn.c_attn.bias")
    return module, choice.roles(module), Dataset("text", tokens, targets, tokens, targets, CLASSES, targets, None)


VIT_LAYER = "model.vit.layers.0."
VIT_QK = tuple(f"{VIT_LAYER}attention.{n}_proj.weight" for n in "qk")
GPT2_WEIGHTS = tuple(f"model.h.0.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
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
    """An algorithm and the oracle that must agree with it."""

    algorithm: Algorithm
    oracle: Callable[..., dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)


SGD, ADAMW, MUON = Sgd(momentum=0.9, weight_decay=0.1), AdamW(eps=1e-4, weight_decay=0.3), Muon(weight_decay=0.2)
ORACLE_SGD = partial(oracles.sgd, momentum=0.9, decay=0.1)
ORACLE_ADAMW = partial(oracles.adamw, eps=1e-4, decay=0.3)
ORACLE_MUON = partial(oracles.muon, beta=0.95, decay=0.2)
ADAMW_OPTIONS = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-4, "weight_decay": 0.3}
ORACLE_ADAMW_OPTIONS = {"betas": (0.8, 0.95), "eps": 1e-4, "decay": 0.3}
MUON_OPTIONS = {"beta": 0.9, "lr_multiplier": 0.5, "weight_decay": 0.3}
ORACLE_MUON_OPTIONS = {"beta": 0.9, "multiplier": 0.5, "decay": 0.3}
SERVER_OPTIONS = {"server_lr": 0.5, "prox_mu": 0.3, "server_momentum": 0.9}

CASES = {
    "fedavg": Case(FedAvg(), oracles.fedavg, {"lr": 0.5}),
    "fedavg-clipped": Case(FedAvg(), oracles.fedavg, {"lr": 2.0, "clip_norm": 0.1}),
    "fedavg-by-samples": Case(FedAvg(), oracles.fedavg, {"lr": 0.5, "weighting": "samples"}),
    "fedprox": Case(FedAvg(prox_mu=0.7), partial(oracles.fedavg, prox_mu=0.7), {"lr": 0.5}),
    "fedavgm": Case(FedAvg(server_momentum=0.6), partial(oracles.fedavg, server_momentum=0.6), {"lr": 0.5}),
    "fedavg-all": Case(FedAvg(**SERVER_OPTIONS), partial(oracles.fedavg, **SERVER_OPTIONS), {"lr": 0.5}),
    "fedavg-sgd": Case(FedAvg(local=SGD), partial(oracles.fedavg, local=ORACLE_SGD), {"lr": 0.1}),
    "fedavg-adamw": Case(FedAvg(local=ADAMW), partial(oracles.fedavg, local=ORACLE_ADAMW)),
    "fedprox-muon": Case(FedAvg(local=MUON, prox_mu=0.7), partial(oracles.fedavg, local=ORACLE_MUON, prox_mu=0.7)),
    "scaffold": Case(Scaffold(), oracles.scaffold, {"lr": 0.3}),
    "scaffold-slow": Case(Scaffold(server_lr=0.5), partial(oracles.scaffold, server_lr=0.5), {"lr": 0.3}),
    "scaffold-poisson": Case(Scaffold(), oracles.scaffold, {"lr": 0.3, "sampling": "poisson"}),
    "scaffold-sgd": Case(Scaffold(local=SGD), partial(oracles.scaffold, local=ORACLE_SGD), {"lr": 0.05}),
    "local_adamw": Case(LocalAdamW(), oracles.local_adamw),
    "local_adamw-options": Case(LocalAdamW(**ADAMW_OPTIONS), partial(oracles.local_adamw, **ORACLE_ADAMW_OPTIONS)),
    "local_muon": Case(LocalMuon(), oracles.local_muon),
    "local_muon-options": Case(LocalMuon(**MUON_OPTIONS), partial(oracles.local_muon, **ORACLE_MUON_OPTIONS)),
    "local_muon-all": Case(LocalMuon(route="all_matrices"), oracles.local_muon),
    **{
        f"fedadamw-{blocks}": Case(FedAdamW(second_moment=blocks), partial(oracles.fedadamw, second_moment=blocks))
        for blocks in ("hessian", "tensor", "full", "none")
    },
    "fedadamw-options": Case(
        FedAdamW(alpha=0.9, **ADAMW_OPTIONS),
        partial(oracles.fedadamw, alpha=0.9, **ORACLE_ADAMW_OPTIONS),
        {"weighting": "samples"},
    ),
    "fedmuon": Case(FedMuon(), oracles.fedmuon),
    "fedmuon-options": Case(
        FedMuon(alpha=0.8, **MUON_OPTIONS),
        partial(oracles.fedmuon, alpha=0.8, **ORACLE_MUON_OPTIONS),
        {"weighting": "samples"},
    ),
    "fedmuon-unshared": Case(FedMuon(share_momentum=False), partial(oracles.fedmuon, share_momentum=False)),
    "fedmuon-all": Case(FedMuon(route="all_matrices"), oracles.fedmuon),
}


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
    return engine, Federation(module, engine.batches, chosen, **facts)


def agree(engine: Engine, vector: Tensor, expected: Named) -> None:
    """Equal to rounding, relative to the largest entry of every tensor."""
    found = engine.layout.views(vector)
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        atol = 1e-10 * float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def check(engine: Engine, expected: dict[str, Any], rounds: int = 3) -> None:
    """The engine's state after some rounds equals the oracle's, and training moved every parameter."""
    start = {n: p.clone() for n, p in engine.named_parameters().items()}
    for _ in range(rounds):
        engine.run_round()
    assert engine.named_parameters().keys() == expected["x"].keys()
    assert [n for n, p in engine.named_parameters().items() if (p - start[n]).abs().max() < 1e-3] == []
    for name in {"x", "G", "c", "v"} & expected.keys() & engine.server.keys():
        agree(engine, engine.server[name], expected[name])
    if "c_i" in expected:
        assert set(engine.store.ids) == set(expected["c_i"])
        for client, c_i in expected["c_i"].items():
            agree(engine, engine.store.get([client])["c_i"][0], c_i)
    layout = engine.layout
    assert ("M_bar" in expected) == ("M_bar" in engine.server)
    if "M_bar" in expected:
        assert engine.server.M_bar.numel() == sum(m.numel() for m in expected["M_bar"].values())
        rest = torch.zeros(layout.d - layout.d_matrix, dtype=torch.float64)
        agree(engine, layout.merge(engine.server.M_bar, rest), expected["M_bar"])


def test_every_algorithm_has_an_oracle() -> None:
    tested = {type(case.algorithm) for case in CASES.values()} | {FedBcgd}
    assert tested == set(ALGORITHMS.values())


def test_the_federation_is_uneven() -> None:
    engine, f = both(FedAvg(), tiny, {})
    weights = [[w for *_, w in f.steps(i, r)] for r in range(3) for i in f.cohort(r)]
    assert len({len(steps) for steps in weights}) > 1
    assert any(0 < float(w.sum()) < 8 for steps in weights for w in steps)
    assert engine.nominal_steps == f.nominal_steps == 3
    cohorts = [set(f.cohort(r)) for r in range(3)]
    assert len(cohorts[0] & (cohorts[1] | cohorts[2])) > 0


@pytest.mark.parametrize("model", MODEL_FACTS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle(name: str, model: Callable[[], Built]) -> None:
    case = CASES[name]
    every_matrix = getattr(case.algorithm, "route", "hidden") == "all_matrices"
    engine, f = both(case.algorithm, model, case.settings, every_matrix=every_matrix)
    expected = case.oracle(f, 3)
    check(engine, expected)
    if isinstance(case.algorithm, FedAdamW):
        rule = case.algorithm.second_moment
        if rule == "none":
            assert "v_bar" not in engine.server
        else:
            v_bar = engine.server.v_bar
            assert v_bar.numel() == f.curvature_blocks(rule)
            full = v_bar if rule == "full" else engine.layout.curvature_blocks(rule).expand(v_bar)
            agree(engine, full, expected["v_bar"])


# Parameters of every block in module order, the shared head (or what `shared` names) left out.
BLOCKS: dict[str, tuple[Callable[[], Built], dict[str, Any], list[list[str]]]] = {
    "one": (tiny, {}, [["1.weight", "1.bias", "3.weight", "3.bias", "4.weight", "4.bias", "6.weight", "6.bias"]]),
    # 296 parameters to spread; 1.weight alone is 128.
    "three": (
        tiny,
        {},
        [["1.weight"], ["1.bias", "3.weight", "3.bias", "4.weight"], ["4.bias", "6.weight", "6.bias"]],
    ),
    "named": (
        tiny,
        {"shared": ("3.*", "*.bias")},
        [["1.weight"], ["4.weight"], ["6.weight", "8.weight"]],
    ),
    "nothing": (
        tiny,
        {"shared": ()},
        [
            ["1.weight", "1.bias", "3.weight", "3.bias"],
            ["4.weight", "4.bias", "6.weight", "6.bias", "8.weight", "8.bias"],
        ],
    ),
    "conv": (conv, {}, [["0.weight", "0.bias", "1.weight", "1.bias"], ["3.weight", "3.bias"]]),
}  # fmt: skip


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
@pytest.mark.parametrize("cohort", [2, 5])
@pytest.mark.parametrize("name", BLOCKS)
def test_fedbcgd(name: str, cohort: int, weighting: str) -> None:
    model, options, members = BLOCKS[name]
    settings = {"lr": 0.5, "cohort": cohort, "weighting": weighting}
    engine, f = both(FedBcgd(blocks=len(members), **options), model, settings)
    blocks = {n: b for b, names in enumerate(members) for n in names}
    check(engine, oracles.fedbcgd(f, 3, blocks=blocks))


def test_fedbcgd_options() -> None:
    engine, f = both(FedBcgd(blocks=3, momentum=0.0, local=SGD), tiny, {"lr": 0.1})
    blocks = {n: b for b, names in enumerate(BLOCKS["three"][2]) for n in names}
    check(engine, oracles.fedbcgd(f, 3, blocks=blocks, momentum=0.0, local=ORACLE_SGD))


@pytest.mark.parametrize("model", [vit, gpt2])
def test_fedbcgd_of_a_transformer(model: Callable[[], Built]) -> None:
    engine, f = both(FedBcgd(blocks=2), model, {"lr": 0.3})
    names = [n for n in f.start() if not n.endswith(("head.weight", "head.bias"))]
    names = [n for n in names if not n.startswith("model.classifier")]
    first = 1 if model is gpt2 else names.index("model.vit.layers.0.mlp.fc1.weight")
    check(engine, oracles.fedbcgd(f, 3, blocks={n: int(i >= first) for i, n in enumerate(names)}))
