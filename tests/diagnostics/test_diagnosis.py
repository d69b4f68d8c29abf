"""A whole diagnosis of a tiny engine against dense Hessians at x and at every y_i."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from diagnostics.dense import DenseLoss
from support import run_rounds, tiny_engine

from fedkernels.algorithms import FedAdamW, FedAvg, FedMuon
from fedkernels.diagnostics.cohort import train_cohort
from fedkernels.diagnostics.diagnosis import diagnose
from fedkernels.diagnostics.settings import DiagnosisSettings
from fedkernels.federated.engine import Engine

SETTINGS = DiagnosisSettings(tolerance=1e-6, probes=60, points=3, grid=2, ascent_steps=3)


@pytest.fixture(scope="module")
def engine() -> Engine:
    engine = tiny_engine(FedMuon(), cohort=3, lr=0.02)
    run_rounds(engine, 2)
    return engine


@pytest.fixture(scope="module")
def found(engine: Engine) -> dict[str, Any]:
    return diagnose(engine, SETTINGS)


def test_curvature_is_that_of_the_dense_hessians(engine: Engine, found: dict[str, Any]) -> None:
    partition, cohort = engine.batches.partition, train_cohort(engine, 0.02)
    places = [("global", partition.indices, engine.server.x)]
    places += [(c, partition[c], y) for c, y in zip(cohort.clients, cohort.y, strict=True)]
    measures = found["measures"]
    for place, indices, x in places:

        def at(name: str, place: str | int = place) -> dict[str, Any]:
            record = measures[name]
            return record["global"] if place == "global" else next(p for p in record["local"] if p["client"] == place)

        f = DenseLoss(engine.layout, indices)
        spectrum = torch.linalg.eigvalsh(f.hessian(x))
        (g,) = torch.autograd.grad(f(y := x.clone().requires_grad_()), y)
        assert at("loss")["value"] == pytest.approx(float(f(x)), rel=1e-10)
        assert at("gradient_norm")["value"] == pytest.approx(float(g.norm()), rel=1e-10)
        assert at("lambda_max")["value"] == pytest.approx(float(spectrum[-1]), rel=1e-8)
        assert at("lambda_max")["settled"]
        assert abs(at("trace")["value"] - float(spectrum.sum())) <= 4 * at("trace")["standard_error"]
        rise = float(f(x + SETTINGS.rho * g / g.norm()) - f(x))
        assert at("sharpness_one_step")["value"] == pytest.approx(rise, rel=1e-8)
        assert rise <= at("sharpness_ascent")["value"] * (1 + 1e-8)
        assert at("loss")["samples"] == len(indices)


def test_the_discrepancy_is_local_minus_global(found: dict[str, Any]) -> None:
    for record in found["measures"].values():
        local = [point["value"] for point in record["local"]]
        gap, at_x = record["discrepancy"], record["global"]["value"]
        assert len(local) == 3
        assert gap["local_mean"] == pytest.approx(np.mean(local), rel=1e-12)
        assert (gap["local_min"], gap["local_max"]) == (min(local), max(local))
        assert gap["difference"] == pytest.approx(np.mean(local) - at_x, rel=1e-12)
        assert gap["ratio"] == pytest.approx(np.mean(local) / at_x, rel=1e-12)


def test_every_measure_says_how_it_was_made(found: dict[str, Any]) -> None:
    for name, record in found["measures"].items():
        assert record["method"]
        assert record["seed"] == 0
        assert record["global"]["samples"] == found["global_samples"] == 150, name
    assert found["measures"]["lambda_max"]["tolerance"] == 1e-6
    assert found["measures"]["trace"]["probes"] == 60
    assert found["measures"]["sharpness_ascent"]["rho"] == 0.05
    assert found["settings"]["lr"] == 0.02
    assert found["round"] == 2


def test_slices_pass_through_the_model(found: dict[str, Any]) -> None:
    loss, slices = found["measures"]["loss"]["global"]["value"], found["slices"]
    assert slices["line"]["offsets"] == [-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1]
    assert slices["line"]["loss"][3] == slices["square"]["loss"][2][2] == loss
    assert len({*slices["line"]["loss"]}) == 7
    assert slices["square"]["loss"][2][::4] == slices["line"]["loss"][::6]  # the same first direction


def test_updates_and_drift_are_those_of_the_cohort(engine: Engine, found: dict[str, Any]) -> None:
    cohort = train_cohort(engine, 0.02)
    deltas = [y - engine.server.x for y in cohort.y]
    assert found["updates"]["clients"] == cohort.clients
    np.testing.assert_allclose(found["updates"]["norm"], [float(delta.norm()) for delta in deltas], rtol=1e-12)
    cosine = float(torch.nn.functional.cosine_similarity(deltas[0], deltas[2], dim=0))
    assert found["updates"]["cosine"][0][2] == pytest.approx(cosine, rel=1e-10)
    m = cohort.up["M"]
    drift = found["preconditioner_drift"]["M"]
    assert drift["value"] == pytest.approx(float((m - m.mean(0)).square().sum() / 3), rel=1e-12)
    assert sum(part["value"] for part in drift["by_layer"].values()) == pytest.approx(drift["value"], rel=1e-12)


def test_the_same_seed_finds_the_same_and_another_does_not(engine: Engine, found: dict[str, Any]) -> None:
    again = diagnose(engine, SETTINGS)
    assert json.dumps(again) == json.dumps(found)
    other = diagnose(engine, DiagnosisSettings(**{**SETTINGS.__dict__, "seed": 1}))
    assert other["slices"]["line"]["loss"][0] != found["slices"]["line"]["loss"][0]
    trace, other_trace = (d["measures"]["trace"]["global"]["value"] for d in (found, other))
    assert trace != other_trace
    assert other["updates"] == found["updates"]


def test_samples_are_capped(engine: Engine) -> None:
    settings = DiagnosisSettings(samples=10, probes=2, points=1, grid=1, ascent_steps=1)
    one, two = diagnose(engine, settings), diagnose(engine, settings)
    assert one == two
    assert one["global_samples"] == 10
    for point in one["measures"]["loss"]["local"]:
        assert point["samples"] == min(10, engine.sizes[point["client"]])


def test_clipped_gradients_are_counted() -> None:
    middle = float(train_cohort(tiny_engine(FedAvg(), cohort=3), 0.05).gradient_norms.median())
    engine = tiny_engine(FedAvg(), cohort=3, clip_norm=middle)
    norms = train_cohort(engine, 0.05).gradient_norms
    found = diagnose(engine, SETTINGS)["gradients"]
    assert 0 < found["clipped_fraction"] < 1
    assert found["clipped_fraction"] == pytest.approx(float((norms > middle).double().mean()), rel=1e-12)
    assert found["count"] == len(norms)


def test_block_means_drift_as_a_whole() -> None:
    engine = tiny_engine(FedAdamW(), cohort=3)
    found = diagnose(engine, SETTINGS)["preconditioner_drift"]
    assert list(found) == ["v"]
    assert found["v"]["value"] > 0
    assert found["v"]["by_layer"] == {}


def test_a_model_that_has_diverged_is_refused() -> None:
    engine = tiny_engine(FedAvg())
    engine.server.x = torch.full_like(engine.server.x, torch.nan)
    with pytest.raises(ValueError, match="the loss at the server's model is nan: a model that has diverged"):
        diagnose(engine, SETTINGS)
