"""Identities of the private algorithms where noise and clip do nothing, and of Laplacian smoothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracles.comparison import both, check, conv, tiny
from oracles.federation import Federation
from oracles.private import private
from support import tiny_engine

from fedkernels.algorithms import DpFedAdamW, DpFedAvg, DpFedPgn, DpFedSam, FedAvg
from fedkernels.algorithms.dp_fedpgn import smooth
from fedkernels.contract import Algorithm, Round, Vectors
from fedkernels.federated import engine as engine_module
from fedkernels.federated.schedule import sample_cohort

# σC is 1e-24: below rounding, and no update comes near C.
OFF = private(clip=1e6, sigma=1e-30, lr=0.5)


def fedcm(f: Federation, rounds: int, gamma: float) -> dict[str, Any]:
    """FedCM (Xu et al., 2021): client steps `γ∇f_i(y) + (1−γ)g`, g the mean direction of the last cohort.

    The mean is over the expected cohort. Whoever is missing from it, or has steps left, counts as one who goes along
    with `(1−γ)g` for all K steps: that is the public term.
    """
    x, g = f.start(), f.zeros()
    K = f.nominal_steps
    for r in range(rounds):
        ids = f.cohort(r)
        public = {n: (1 - gamma) * K * f.lr(r) * g[n] for n in x}
        moved = {n: (1 - len(ids) / f.settings.cohort) * public[n] for n in x}
        for i in ids:
            y = dict(x)
            for step in f.steps(i, r):
                own = f.gradient(y, step)
                y = {n: y[n] - f.lr(r) * (gamma * own[n] + (1 - gamma) * g[n]) for n in y}
            moved = {n: moved[n] + (x[n] - y[n]) / f.settings.cohort for n in x}
        x = {n: x[n] - moved[n] for n in x}
        g = {n: moved[n] / (K * f.lr(r)) for n in x}
    return {"x": x, "g": g}


@pytest.mark.parametrize("gamma", [0.2, 0.7])
@pytest.mark.parametrize("model", [tiny, conv])
def test_dp_fedpgn_without_privacy_is_fedcm(model: Any, gamma: float) -> None:
    engine, f = both(DpFedPgn(gamma=gamma), model, OFF)
    check(engine, fedcm(f, 3, gamma))


def trained(algorithm: Algorithm, settings: dict[str, Any], scaled: bool = False) -> list[torch.Tensor]:
    """x after every round; `scaled` shrinks each update by the size of the cohort over its expectation."""
    engine = tiny_engine(algorithm, **settings)
    xs = []
    for _ in range(3):
        before = engine.server.x.clone()
        row = engine.run_round()
        if scaled:
            engine.server.x = before + (engine.server.x - before) * (row["cohort"] / engine.settings.cohort)
        xs.append(engine.server.x.clone())
    return xs


@pytest.mark.parametrize(
    "algorithm",
    [DpFedAvg(), DpFedPgn(gamma=1.0), DpFedPgn(gamma=1.0, variant="penalty", rho=0.0), DpFedSam(rho=0.0)],
    ids=["dp_fedavg", "dp_fedpgn", "dp_fedpgn-penalty", "dp_fedsam"],
)
def test_without_privacy_it_is_fedavg_over_the_expected_cohort(
    algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "sample_cohort", lambda sampling, seed, *rest: sample_cohort(sampling, 0, *rest))
    plain = {key: value for key, value in OFF.items() if key != "privacy"}
    for found, expected in zip(trained(algorithm, OFF), trained(FedAvg(), plain, scaled=True), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_dp_fedpgn_penalty_without_a_radius_is_mix() -> None:
    settings = private(clip=0.1, lr=0.5)
    left, right = (trained(DpFedPgn(variant=v, rho=0.0), settings) for v in ("penalty", "mix"))  # type: ignore[arg-type]
    for found, expected in zip(left, right, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("algorithm", [DpFedPgn(), DpFedAdamW()])
def test_the_clip_is_not_spent_on_the_public_term(algorithm: Algorithm) -> None:
    """With C next to nothing, clients send nothing, and the last direction goes on undamped."""
    engine = tiny_engine(algorithm, **private(clip=1e-12, sigma=1e-12, lr=0.5, schedule="constant"))
    direction = torch.ones(engine.layout.d, dtype=torch.float64)
    engine.server["g" if isinstance(algorithm, DpFedPgn) else "G"] = direction
    x = engine.server.x.clone()
    engine.run_round()
    share = 0.8 if isinstance(algorithm, DpFedPgn) else 0.5
    torch.testing.assert_close(engine.server.x, x - share * 5 * 0.5 * direction, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("d", [1, 2, 3, 8, 17, 40])
@pytest.mark.parametrize("laplacian", [0.0, 0.3, 10.0])
def test_smoothing_solves_the_circulant_system(d: int, laplacian: float) -> None:
    rng = np.random.default_rng(d)
    u = rng.standard_normal(d)
    second = np.zeros((d, d))
    for i in range(d):
        second[i, i] -= 2
        second[i, (i + 1) % d] += 1
        second[i, (i - 1) % d] += 1
    found = smooth(torch.from_numpy(u), laplacian).numpy()
    np.testing.assert_allclose(found, np.linalg.solve(np.eye(d) - laplacian * second, u), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(found.mean(), u.mean(), rtol=1e-11, atol=1e-13)
    assert np.square(found).sum() <= np.square(u).sum() * (1 + 1e-12)


def test_dp_fedpgn_smooths_what_was_released() -> None:
    rng = np.random.default_rng(0)
    x, g, u = (torch.from_numpy(rng.standard_normal(40)) for _ in range(3))
    r = Round(3, 6, 12, 5, 0.1)
    smoothed = DpFedPgn(laplacian=2.0).server(Vectors({"x": x, "g": g}), Vectors({"r": u}), r)
    plain = DpFedPgn().server(Vectors({"x": x, "g": g}), Vectors({"r": smooth(u, 2.0)}), r)
    assert all(torch.equal(smoothed[name], plain[name]) for name in ("x", "g"))
    assert not torch.equal(smooth(u, 2.0), u)
