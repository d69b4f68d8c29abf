"""Identities between algorithms, and with centralised training by torch's own optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import CLASSES, CLIENTS, run_rounds, tiny_engine, tiny_model
from torch import Tensor, nn

from fedkernels.algorithms import FedAdamW, FedAvg, FedBcgd, FedMuon, FedPac, LocalAdamW, LocalMuon, Scaffold
from fedkernels.contract import Algorithm
from fedkernels.data.partition import Partition
from fedkernels.federated import engine as engine_module
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.objective import Objective
from fedkernels.federated.schedule import sample_cohort
from fedkernels.optim import AdamW, Muon, Shampoo

SMALLEST = 1e-300  # takes the path of a positive option, and adds nothing in float64
SAMPLES = 150
FULL_BATCH = LocalWork(SAMPLES, local_steps=4)


def trained(algorithm: Algorithm, rounds: int = 3, **options: Any) -> dict[str, Tensor]:
    """The server model by name after some rounds."""
    engine = tiny_engine(algorithm, **options)
    run_rounds(engine, rounds)
    return {name: value.clone() for name, value in engine.named_parameters().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


def one_client() -> Partition:
    return Partition(np.arange(SAMPLES), np.array([0, SAMPLES]))


def equal_clients(clients: int, copies: bool = False) -> Partition:
    """Clients with as many samples each, different ones or the same."""
    samples = np.tile(np.arange(30), clients) if copies else np.arange(30 * clients)
    return Partition(samples, 30 * np.arange(clients + 1))


def bare_model() -> nn.Module:
    """Hidden matrices alone: nothing for Muon to leave to AdamW."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 8, bias=False), nn.Tanh(), nn.Linear(8, CLASSES, bias=False)
    ).double()  # fmt: skip


PAIRS: dict[str, tuple[Algorithm, Algorithm, dict[str, Any]]] = {
    "fedprox with no pull is fedavg": (FedAvg(prox_mu=SMALLEST), FedAvg(), {"lr": 0.5}),
    "the first step is at x, where fedprox does not pull": (
        FedAvg(prox_mu=5.0), FedAvg(), {"lr": 0.5, "work": LocalWork(8, local_steps=1)}
    ),
    "fedavgm without momentum is fedavg": (FedAvg(server_momentum=SMALLEST), FedAvg(), {"lr": 0.5}),
    "fedavg of adamw is local adamw": (FedAvg(local=AdamW(eps=1e-5)), LocalAdamW(local=AdamW(eps=1e-5)), {}),
    "fedavg of muon is local muon": (FedAvg(local=Muon(momentum=0.98)), LocalMuon(), {}),
    "fedadamw without G and v is local adamw": (FedAdamW(alpha=0.0, second_moment="none"), LocalAdamW(), {}),
    "fedmuon without G and M is local muon": (
        FedMuon(alpha=0.0, share_momentum=False, lr_multiplier=0.5),
        LocalMuon(local=Muon(momentum=0.98, lr_multiplier=0.5)),
        {},
    ),
    "fedbcgd of one block is fedavgm": (FedBcgd(blocks=1), FedAvg(server_momentum=0.45), {"lr": 0.5}),
    "fedbcgd of one block without momentum is fedavg": (FedBcgd(blocks=1, momentum=0.0), FedAvg(), {"lr": 0.5}),
    "fedbcgd of one block, weighted": (
        FedBcgd(blocks=1, momentum=0.0), FedAvg(), {"lr": 0.5, "weighting": "samples"}
    ),
    "scaffold of one client is fedavg": (Scaffold(), FedAvg(), {"lr": 0.5, "partition": one_client(), "cohort": 1}),
    "fedbcgd of equal clients is fedavgm": (
        FedBcgd(blocks=4),
        FedAvg(server_momentum=0.45),
        {"lr": 0.5, "partition": equal_clients(5, copies=True), "cohort": 5, "work": FULL_BATCH},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_two_algorithms_coincide(name: str) -> None:
    left, right, options = PAIRS[name]
    assert_same(trained(left, **options), trained(right, **options))


@pytest.mark.parametrize(
    ("algorithm", "baseline"),
    [
        (Scaffold(), FedAvg()),
        *((FedAdamW(second_moment=rule), LocalAdamW()) for rule in ("hessian", "tensor", "full")),
        (FedMuon(alpha=0.0), LocalMuon()),
    ],
    ids=["scaffold", "fedadamw-hessian", "fedadamw-tensor", "fedadamw-full", "fedmuon"],
)
def test_the_first_round_is_the_baselines_and_the_second_is_not(algorithm: Algorithm, baseline: Algorithm) -> None:
    assert_same(trained(algorithm, rounds=1), trained(baseline, rounds=1))
    second, other = trained(algorithm, rounds=2), trained(baseline, rounds=2)
    assert max(float((second[name] - other[name]).abs().max()) for name in second) > 1e-4


@pytest.mark.parametrize("algorithm", [FedMuon(), LocalMuon(), FedMuon(route="all_matrices")])
def test_muon_refuses_a_model_without_matrices_before_the_first_round(algorithm: Algorithm) -> None:
    module = nn.Sequential(nn.Flatten(), nn.LayerNorm(16)).double()
    with pytest.raises(ValueError, match="Muon needs hidden weight matrices, and this model has none"):
        tiny_engine(algorithm, module=module)


def test_fedmuon_takes_alpha_off_the_first_rounds_update() -> None:
    """Before round 1, G = 0: the whole local direction is scaled by 1 − α, as by a smaller learning rate."""
    assert_same(trained(FedMuon(alpha=0.75), rounds=1, lr=0.4), trained(LocalMuon(), rounds=1, lr=0.1))


def test_equal_clients_weigh_alike() -> None:
    options = {"partition": equal_clients(5), "cohort": 3, "lr": 0.5}
    assert_same(trained(FedAvg(), weighting="samples", **options), trained(FedAvg(), weighting="uniform", **options))


def centralised(
    optimizer: Callable[[Any], torch.optim.Optimizer], steps: int, rounds: int, batch: int = SAMPLES
) -> dict[str, Tensor]:
    """Torch's optimizer on the tiny model, over the batches of one client that has all samples."""
    engine = tiny_engine(FedAvg(), partition=one_client(), cohort=1, work=LocalWork(batch, local_steps=steps))
    model = tiny_model()
    opt = optimizer(model.parameters())
    for r in range(rounds):
        for local in engine.batches.draw([0], r):
            keep = torch.ones(batch, dtype=torch.bool) if local.weights is None else local.weights[0] > 0
            opt.zero_grad()
            F.cross_entropy(model(local.inputs[0][keep]), local.targets[0][keep]).backward()
            opt.step()
    return {name: p.detach() for name, p in model.named_parameters()}


ALONE: dict[str, Any] = {"partition": one_client(), "cohort": 1, "schedule": "constant", "clip_norm": float("inf")}


def test_fedavg_of_one_client_is_sgd() -> None:
    found = trained(FedAvg(), lr=0.3, work=LocalWork(40, local_steps=7), **ALONE)
    assert_same(found, centralised(lambda p: torch.optim.SGD(p, lr=0.3), 7, 3, batch=40))


def test_fedavg_with_one_step_of_everyone_is_sgd_on_everything() -> None:
    """Weighted by samples, and whatever the sizes of the clients."""
    options = {"cohort": CLIENTS, "schedule": "constant", "clip_norm": float("inf"), "weighting": "samples"}
    found = trained(FedAvg(), lr=0.3, work=LocalWork(SAMPLES, local_steps=1), **options)
    assert_same(found, centralised(lambda p: torch.optim.SGD(p, lr=0.3), 1, 3))


def test_fedavgm_with_one_step_of_everyone_is_heavy_ball() -> None:
    options = {"cohort": CLIENTS, "schedule": "constant", "clip_norm": float("inf"), "weighting": "samples"}
    found = trained(FedAvg(server_momentum=0.7), 4, lr=0.3, work=LocalWork(SAMPLES, local_steps=1), **options)
    assert_same(found, centralised(lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.7), 1, 4))


def test_local_adamw_of_one_client_in_one_round_is_adamw() -> None:
    found = trained(LocalAdamW(local=AdamW(weight_decay=0.2)), 1, lr=0.02, work=LocalWork(40, local_steps=9), **ALONE)
    assert_same(found, centralised(lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.2), 9, 1, batch=40), 1e-10)


def test_fedadamw_of_one_client_without_first_moment_is_adamw_over_rounds() -> None:
    """v and its step count outlive the round."""
    algorithm = FedAdamW(alpha=0.0, beta1=0.0, weight_decay=0.2, second_moment="full")
    found = trained(algorithm, 3, lr=0.02, work=LocalWork(40, local_steps=3), **ALONE)
    expected = centralised(
        lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.2, betas=(0.0, 0.999)), 3, 3, batch=40
    )
    assert_same(found, expected, 1e-10)


def test_fedmuon_of_one_client_is_muon_over_rounds() -> None:
    """Where everything is a matrix, M outlives the round and nothing else has to."""
    options = {"lr": 0.02, **ALONE}
    found = trained(FedMuon(alpha=0.0), 3, module=bare_model(), work=LocalWork(SAMPLES, local_steps=4), **options)
    expected = trained(LocalMuon(), 1, module=bare_model(), work=LocalWork(SAMPLES, local_steps=12), **options)
    assert_same(found, expected, 1e-10)


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
@pytest.mark.parametrize("cohort", [5, CLIENTS])
def test_the_servers_control_variate_is_the_mean_of_the_clients(cohort: int, weighting: str) -> None:
    """Of all clients alike, whatever their weights in the mean of updates; c_i = 0 before a client's first round."""
    engine = tiny_engine(Scaffold(server_lr=0.7), cohort=cohort, weighting=weighting, lr=0.5)
    for _ in range(3):
        engine.run_round()
        mean = engine.store.get(range(CLIENTS))["c_i"].mean(0)
        assert mean.abs().max() > 1e-3
        torch.testing.assert_close(engine.server.c, mean, rtol=1e-12, atol=1e-12)


def test_a_control_variate_is_the_clients_mean_gradient() -> None:
    """With one local step from x, c_i⁺ = ∇f_i(x)."""
    engine = tiny_engine(Scaffold(), cohort=CLIENTS, lr=0.5, work=LocalWork(SAMPLES, local_steps=1))
    for _ in range(2):
        x = {name: p.clone() for name, p in engine.named_parameters().items()}
        engine.run_round()
    model = tiny_model()
    model.load_state_dict(x)
    for client in range(CLIENTS):
        inputs, targets = engine.objective.train_batch(torch.from_numpy(engine.batches.partition[client])[None], None)
        model.zero_grad()
        F.cross_entropy(model(inputs[0]), targets[0]).backward()
        expected = engine.layout.flatten({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(engine.store.get([client])["c_i"][0], expected, rtol=1e-10, atol=1e-12)


class LinearLoss(Objective):
    """The mean of the target's logit: for a linear model its gradient does not depend on the parameters."""

    def loss(
        self,
        forward: Callable[[Tensor], Tensor],
        inputs: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        count: Tensor | float | None = None,
    ) -> Tensor:
        picked = forward(inputs).gather(1, targets[:, None])[:, 0]
        weights = torch.ones_like(picked) if weights is None else weights
        return (picked * weights).sum() / (weights.sum() if count is None else count)


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
@pytest.mark.parametrize("work", [LocalWork(8, local_steps=3), LocalWork(8, local_epochs=2)], ids=["steps", "epochs"])
@pytest.mark.parametrize("alpha", [0.3, 0.9])
@pytest.mark.parametrize(
    ("with_alpha", "local_share"),
    [
        (lambda alpha: FedAdamW(alpha=alpha, weight_decay=0.0), lambda alpha: 1.0),
        (lambda alpha: FedAdamW(alpha=alpha, weight_decay=0.0, second_moment="full"), lambda alpha: 1.0),
        (lambda alpha: FedMuon(alpha=alpha, weight_decay=0.0), lambda alpha: 1 - alpha),
        (lambda alpha: FedPac(local=AdamW(weight_decay=0.0), beta=alpha), lambda alpha: 1 - alpha),
    ],
    ids=["fedadamw-hessian", "fedadamw-full", "fedmuon", "fedpac"],
)
def test_recursion_of_the_update(
    with_alpha: Callable[[float], Algorithm],
    local_share: Callable[[float], float],
    alpha: float,
    work: LocalWork,
    weighting: str,
) -> None:
    """`Δ̄_r = s L_r + α(K̄_rη_r/(K̄_{r−1}η_{r−1}))Δ̄_{r−1}`, s = 1 for FedAdamW and 1 − α for the others.

    Where gradients do not depend on the parameters, the local term L_r is the whole update of the run with α = 0. K̄ is
    the mean of the clients' steps, weighted as their updates.
    """

    def updates(algorithm: Algorithm) -> tuple[list[Tensor], list[float]]:
        """And how far from the start each round's clients go for a step of length 1, K̄η on average."""
        module = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES)).double()
        options = {"work": work, "weighting": weighting, "clip_norm": float("inf")}
        engine = tiny_engine(algorithm, module=module, objective=LinearLoss, **options)
        deltas, reaches = [], []
        for r in range(4):
            ids = sample_cohort("uniform", 0, r, CLIENTS, 6)
            weights = engine.sizes[ids] if weighting == "samples" else None
            x = engine.server.x.clone()
            reaches.append(engine.run_round()["lr"] * np.average(engine.batches.steps(ids), weights=weights))
            deltas.append(engine.server.x - x)
        return deltas, reaches

    local, reaches = updates(with_alpha(0.0))
    whole, _ = updates(with_alpha(alpha))
    previous, previous_reach = torch.zeros_like(whole[0]), reaches[0]
    for delta, own, reach in zip(whole, local, reaches, strict=True):
        expected = local_share(alpha) * own + alpha * reach / previous_reach * previous
        torch.testing.assert_close(delta, expected, rtol=1e-10, atol=1e-12)
        previous, previous_reach = delta, reach


@pytest.mark.parametrize(
    "algorithm",
    [
        FedAdamW(),
        FedAdamW(second_moment="full"),
        FedPac(local=AdamW()),
        FedPac(local=Shampoo(beta=0.7, refresh_every=2)),
    ],
    ids=["fedadamw-hessian", "fedadamw-full", "fedpac-adamw", "fedpac-shampoo"],
)  # fmt: skip
def test_a_round_without_clients_is_no_step_of_a_shared_moment(
    algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose first Poisson sample is empty, and then draws as another does from its first round, is that other."""
    options = {"sampling": "poisson", "schedule": "constant"}
    expected, rows = run_rounds(tiny_engine(algorithm, **options), 3)
    assert all(row["cohort"] for row in rows)
    late = tiny_engine(algorithm, **options)
    draw = late.batches.draw
    monkeypatch.setattr(late.batches, "draw", lambda clients, r: draw(clients, r - 1))

    def sample(sampling: Any, seed: int, r: int, *rest: int) -> Any:
        return sample_cohort(sampling, seed, r - 1, *rest) if r else np.array([], dtype=np.int64)

    monkeypatch.setattr(engine_module, "sample_cohort", sample)
    found, rows = run_rounds(late, 4)
    assert [row["cohort"] > 0 for row in rows] == [False, True, True, True]
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
