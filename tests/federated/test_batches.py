"""Mini-batches: what fills the places of samples that a client does not have."""

from __future__ import annotations

import pytest
import torch
from support import tiny_engine

from fedkernels.algorithms import DpFedAvg, FedAvg
from fedkernels.federated.batches import LocalWork
from fedkernels.privacy.mechanism import Privacy


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("together", [1, 4])
def test_nobody_is_spoilt_by_a_sample_of_somebody_else(together: int, private: bool) -> None:
    """Weight 0 is not enough: 0 times infinity is NaN."""
    privacy = Privacy(noise_multiplier=1, clip=1, delta=0.01, noise_seed=7)
    engine = tiny_engine(
        DpFedAvg() if private else FedAvg(),
        cohort=12,
        sampling="poisson",
        clients_per_batch=together,
        on_nonfinite="drop_client",
        work=LocalWork(8, local_steps=5, local_epochs=3),
        privacy=privacy if private else None,
    )
    for sample in (0, 77):
        images = engine.objective._inputs.double()
        images[sample] = torch.inf
        engine.objective._inputs = images
        owner = next(i for i in range(12) if sample in engine.batches.partition[i])
        engine.run_round()
        assert all(line.startswith(f"client {owner} sent NaN") for line in engine.dropped)
        assert len(engine.dropped) <= 1
        engine.objective._inputs[sample] = 0


def test_the_places_that_are_left_over_hold_the_clients_own() -> None:
    engine = tiny_engine(FedAvg(), work=LocalWork(8, local_steps=5, local_epochs=3))
    taken: list[torch.Tensor] = []
    load = engine.objective.train_batch
    engine.objective.train_batch = lambda indices, crops: taken.append(indices) or load(indices, crops)  # type: ignore
    clients = range(12)
    for batches in (engine.batches.draw(clients, 0), engine.batches.sweep(clients)):
        for _ in batches:
            pass
    for c in clients:
        assert {int(i) for indices in taken for i in indices[c]} <= set(engine.batches.partition[c].tolist())
