"""The configurations that ship with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import run_rounds

from fedkernels.algorithms import ALGORITHMS
from fedkernels.config import load
from fedkernels.federated.collectives import Collectives
from fedkernels.models import MODELS
from fedkernels.train import build

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DIGITS = sorted((CONFIGS / "digits").glob("*.yaml"))
TEXT = sorted((CONFIGS / "text").glob("*.yaml"))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_configuration_loads_and_says_what_it_is(path: Path) -> None:
    assert load(path, {}).run_dir == Path("runs") / f"{path.parent.name}-{path.stem}"
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_a_configuration_on_digits(name: str) -> None:
    assert isinstance(load(CONFIGS / "digits" / f"{name}.yaml", {}).algorithm, ALGORITHMS[name])


@pytest.mark.parametrize("path", DIGITS, ids=lambda path: path.stem)
def test_a_round_of_every_configuration_on_digits(path: Path) -> None:
    engine, _, _ = build(load(path, {"local_steps": 2}), Collectives())
    before = engine.server.x.clone()
    _, rows = run_rounds(engine, 2)
    assert all(row["train_loss"] > 0 for row in rows)
    assert float((engine.server.x - before).abs().max()) > 0


@pytest.mark.parametrize("path", TEXT, ids=lambda path: path.stem)
def test_a_round_of_every_configuration_on_text(path: Path) -> None:
    engine, data, _ = build(load(path, {"local_steps": 1, "cohort": 2, "evaluator": "loop"}), Collectives())
    before = engine.server.x.clone()
    _, rows = run_rounds(engine, 2)
    assert all(row["train_loss"] > 0 for row in rows)
    assert float((engine.server.x - before).abs().max()) > 0
    assert engine.objective.score_names[2:] == (("test_perplexity",) if data.kind == "language" else ())
    adapted = "lora" in path.stem
    assert any(not p.requires_grad for p in engine.objective.module.parameters()) == adapted


@pytest.mark.parametrize("name", ["swin", "deit"])
def test_a_step_of_the_image_transformers_for_cifar(name: str) -> None:
    """On generated images of CIFAR's size."""
    images = {"name": "synthetic", "classes": 100, "samples": 400, "test_samples": 4}
    few = {"local_steps": 1, "batch_size": 2, "cohort": 1, "clients": 4, "evaluator": "loop", "data": images}
    engine, _, _ = build(load(CONFIGS / "cifar100" / f"{name}_fedadamw.yaml", few), Collectives())
    assert isinstance(load(CONFIGS / "cifar100" / f"{name}_fedadamw.yaml", {}).model, MODELS[name])
    before = engine.server.x.clone()
    engine.run_round()
    assert float((engine.server.x - before).abs().max()) > 0
