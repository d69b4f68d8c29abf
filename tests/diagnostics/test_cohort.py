"""A watched round against the round the engine runs, and an engine that is left as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import CASES
from support import run_rounds, tiny_engine

from fedkernels.algorithms import FedAvg, FedMuon, Scaffold
from fedkernels.contract import Algorithm, Batch
from fedkernels.diagnostics.cohort import train_cohort
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.engine import NonFiniteUpdateError
from fedkernels.federated.schedule import sample_cohort

WORK = LocalWork(8, local_steps=3, local_epochs=2)


@pytest.mark.parametrize("algorithm", [FedAvg(), Scaffold()], ids=str)
def test_the_mean_of_the_clients_is_the_next_server(algorithm: Algorithm) -> None:
    engine = tiny_engine(algorithm, schedule="constant")
    run_rounds(engine, 2)
    cohort = train_cohort(engine, engine.settings.lr)
    row = engine.run_round()
    assert len(cohort.clients) == row["cohort"] == 6
    torch.testing.assert_close(engine.server.x, cohort.y.mean(0), rtol=1e-12, atol=1e-14)


def test_what_clients_send_is_what_the_server_gets() -> None:
    engine = tiny_engine(FedMuon(), schedule="constant")
    run_rounds(engine, 2)
    before = engine.server.x.clone()
    cohort = train_cohort(engine, engine.settings.lr)
    torch.testing.assert_close(cohort.up["delta"], cohort.y - before, rtol=1e-12, atol=1e-14)
    engine.run_round()
    torch.testing.assert_close(engine.server.M_bar, cohort.up["M"].mean(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_every_algorithm_is_left_as_it_was(name: str) -> None:
    """A run that is looked at in between ends as one that is not."""

    watched, other = (CASES[name].engine(work=WORK) for _ in range(2))
    run_rounds(watched, 2)
    cohort = train_cohort(watched, 0.01)
    assert cohort.y.shape == (len(watched.draw_cohort()[0]), watched.layout.d)
    assert torch.equal(cohort.y, train_cohort(watched, 0.01).y)
    after, rows = run_rounds(watched, 2)
    expected, all_rows = run_rounds(other, 4)
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in all_rows[2:]]
    for vector, value in expected.items():
        assert torch.equal(after[vector], value), vector
    assert watched.evaluate() == other.evaluate()


def test_results_do_not_depend_on_clients_per_batch() -> None:
    ends = [train_cohort(tiny_engine(Scaffold(), clients_per_batch=c), 0.05) for c in (1, 4)]
    assert torch.equal(ends[0].y, ends[1].y)
    assert torch.equal(ends[0].gradient_norms.sort().values, ends[1].gradient_norms.sort().values)


def test_gradients_are_watched_before_they_are_clipped() -> None:
    engine = tiny_engine(FedAvg(), clip_norm=0.1, work=WORK)
    cohort = train_cohort(engine, 0.0)  # every gradient at x
    norms = []
    g = torch.empty(1, engine.layout.d, dtype=torch.float64)
    for client in cohort.clients:
        for batch in engine.batches.draw([client], engine.round):
            engine.evaluator(engine.server.x[None], batch, g)
            norms.append(float(g.norm()))
    assert len(norms) == engine.batches.steps(cohort.clients).sum()
    np.testing.assert_allclose(np.sort(cohort.gradient_norms.numpy()), np.sort(norms), rtol=1e-12)
    assert min(norms) > 0.1


def test_a_client_that_diverges_is_named() -> None:
    engine = tiny_engine(FedAvg(), clip_norm=float("inf"))

    def broken(y: torch.Tensor, batch: Batch, g: torch.Tensor) -> torch.Tensor:
        g.fill_(torch.nan)
        return g[:, 0]

    engine.settle()
    engine._evaluator = broken
    with pytest.raises(NonFiniteUpdateError, match=r"client \d+ ends local training at NaN or infinity with lr 0.05"):
        train_cohort(engine, 0.05)


def test_an_empty_cohort_is_an_error() -> None:
    engine = tiny_engine(FedAvg(), sampling="poisson", cohort=1)
    sizes = [len(sample_cohort("poisson", 0, r, engine.population, 1)) for r in range(50)]
    engine.round = sizes.index(0)
    with pytest.raises(ValueError, match=f"no client was sampled for round {engine.round + 1}"):
        train_cohort(engine, 0.05)
