"""Every algorithm through the engine against loops over named tensors, on models of every parameter kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from oracles import CASES
from oracles.blocks import fedbcgd, rows_between
from oracles.comparison import MODEL_FACTS, Built, both, check, conv, gpt2, tiny, vit

from fedkernels.algorithms import ALGORITHMS, FedAdamW, FedAvg, FedBcgd, FedBcgdPlus


def test_every_algorithm_has_an_oracle() -> None:
    assert {type(case.algorithm) for case in CASES.values()} == set(ALGORITHMS.values())


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
    optimizer = case.algorithm.local or case.algorithm
    every_matrix = getattr(optimizer, "route", "hidden") == "all_matrices"
    engine, f = both(case.algorithm, model, case.settings, every_matrix=every_matrix)
    check(engine, case.oracle(f, 3), expand=case.expand, unseen=case.unseen)


@pytest.mark.parametrize("model", MODEL_FACTS)
@pytest.mark.parametrize("rule", ["hessian", "tensor", "full"])
def test_curvature_blocks_are_those_of_the_paper(rule: Any, model: Callable[[], Built]) -> None:
    engine, f = both(FedAdamW(second_moment=rule), model, {})
    assert engine.server.v_bar.numel() == f.curvature_blocks(rule)


# Parameters of every block in module order, the shared head (or what `shared` names) left out.
BLOCKS: dict[str, tuple[Callable[[], Built], dict[str, Any], list[list[str]]]] = {
    "one": (tiny, {}, [["1.weight", "1.bias", "3.weight", "3.bias", "4.weight", "4.bias", "6.weight", "6.bias"]]),
    # 296 parameters to spread; 1.weight alone is 128.
    "three": (
        tiny,
        {},
        [["1.weight"], ["1.bias", "3.weight", "3.bias", "4.weight"], ["4.bias", "6.weight", "6.bias"]],
    ),
    "shared": (
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
    "named": (
        tiny,
        {"blocks": (("*.bias",), ("[46].*",), ("*.weight",))},
        [["1.bias", "3.bias", "4.bias", "6.bias"], ["4.weight", "6.weight"], ["1.weight", "3.weight"]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
@pytest.mark.parametrize("cohort", [2, 5])
@pytest.mark.parametrize("name", BLOCKS)
def test_fedbcgd(name: str, cohort: int, weighting: str) -> None:
    model, options, members = BLOCKS[name]
    settings = {"lr": 0.5, "cohort": cohort, "weighting": weighting}
    engine, f = both(FedBcgd(**{"blocks": len(members), "cut_rows": False} | options), model, settings)
    blocks = {n: b for b, names in enumerate(members) for n in names}
    check(engine, fedbcgd(f, 3, blocks=blocks))


@pytest.mark.parametrize("algorithm", [FedBcgd(blocks=12), FedBcgdPlus(blocks=12)], ids=["fedbcgd", "fedbcgd_plus"])
def test_more_blocks_than_layers(algorithm: FedBcgd) -> None:
    engine, f = both(algorithm, tiny, {"lr": 0.5, "cohort": 10})
    blocks = rows_between(f, list(f.start())[:-2], (32, 64, 80, 112, 135, 160, 184, 208, 232, 256, 280))
    assert len({b for rows in blocks.values() for b in rows}) == 12
    check(engine, fedbcgd(f, 3, blocks=blocks, control="exact" if isinstance(algorithm, FedBcgdPlus) else None))


@pytest.mark.parametrize("model", [vit, gpt2])
def test_fedbcgd_of_a_transformer(model: Callable[[], Built]) -> None:
    engine, f = both(FedBcgd(blocks=2, cut_rows=False), model, {"lr": 0.3})
    names = list(f.start())[: -1 if model is gpt2 else -2]  # the head, which of GPT-2 has no bias, is shared
    first = 1 if model is gpt2 else names.index("model.vit.layers.0.mlp.fc1.weight")
    check(engine, fedbcgd(f, 3, blocks={n: int(i >= first) for i, n in enumerate(names)}))
