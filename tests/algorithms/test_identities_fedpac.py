"""Identities of FedPAC and its optimizers, and its measure of drift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support import run_rounds, tiny_engine
from torch import Tensor, nn

from fedkernels.algorithms import (
    FedAdamW,
    FedAvg,
    FedBcgd,
    FedMuon,
    FedPac,
    LocalAdamW,
    LocalMuon,
    LocalShampoo,
    LocalSoap,
    LocalSophia,
)  # fmt: skip
from fedkernels.algorithms import fedpac as fedpac_module
from fedkernels.contract import Algorithm, LocalOptimizer, Task
from fedkernels.federated.local import run_local
from fedkernels.optim import AdamW, Muon, Sgd, Shampoo, Soap, Sophia

LOCAL: dict[str, type[FedAvg]] = {
    "soap": LocalSoap, "sophia": LocalSophia, "muon": LocalMuon, "shampoo": LocalShampoo, "adamw": LocalAdamW,
}  # fmt: skip
OPTIMIZERS: dict[str, LocalOptimizer] = {
    "soap": Soap(refresh_every=2), "sophia": Sophia(hessian_every=2), "muon": Muon(momentum=0.98),
    "shampoo": Shampoo(refresh_every=2), "adamw": AdamW(),
}  # fmt: skip
every_optimizer = pytest.mark.parametrize("name", LOCAL)


def trained(algorithm: Algorithm, rounds: int = 3, **options: Any) -> Tensor:
    engine = tiny_engine(algorithm, **options)
    run_rounds(engine, rounds)
    return engine.server.x.clone()


@every_optimizer
def test_fedpac_without_alignment_and_correction_is_local_x(name: str) -> None:
    found = trained(FedPac(local=OPTIMIZERS[name], beta=0.0, align=False))
    assert torch.equal(found, trained(LOCAL[name](local=OPTIMIZERS[name])))


@every_optimizer
def test_the_first_round_without_correction_is_local_xs_and_the_second_is_not(name: str) -> None:
    fedpac, local = FedPac(local=OPTIMIZERS[name], beta=0.0), LOCAL[name](local=OPTIMIZERS[name])
    assert torch.equal(trained(fedpac, 1), trained(local, 1))
    assert (trained(fedpac, 2) - trained(local, 2)).abs().max() > 1e-5


@every_optimizer
def test_the_first_round_takes_beta_off_the_update(name: str) -> None:
    """Before round 1, G = 0: all of the step is scaled by 1 − β, as by a smaller learning rate."""
    fedpac, local = FedPac(local=OPTIMIZERS[name], beta=0.75), LOCAL[name](local=OPTIMIZERS[name])
    torch.testing.assert_close(trained(fedpac, 1, lr=0.04), trained(local, 1, lr=0.01), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("route", ["hidden", "all_matrices"])
def test_fedpac_of_muon_is_fedmuon(beta: float, route: Any) -> None:
    muon = Muon(momentum=0.9, weight_decay=0.2, lr_multiplier=0.5, route=route)
    fedmuon = FedMuon(alpha=beta, beta=0.9, weight_decay=0.2, lr_multiplier=0.5, route=route)
    assert torch.equal(trained(FedPac(local=muon, beta=beta)), trained(fedmuon))


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
@pytest.mark.parametrize("rule", ["hessian", "tensor", "full"])
def test_fedpac_of_adamw_without_correction_is_fedadamw(rule: Any, weighting: str) -> None:
    adamw = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.2}
    fedpac = FedPac(local=AdamW(**adamw), second_moment=rule, beta=0.0)
    fedadamw = FedAdamW(alpha=0.0, second_moment=rule, **adamw)
    assert torch.equal(trained(fedpac, weighting=weighting), trained(fedadamw, weighting=weighting))


def test_means_of_what_is_no_second_moment_are_refused() -> None:
    for local, has in ((Soap(), "Soap has H"), (Sophia(), "Sophia has h"), (Sgd(), "Sgd has no preconditioner")):
        with pytest.raises(ValueError, match=f"second_moment is 'hessian', .* but {has}; expected 'full' or AdamW"):
            FedPac(local=local, second_moment="hessian")
    with pytest.raises(ValueError, match=r"second_moment is 'tensor', .* but without align no preconditioner is sent"):
        FedPac(local=AdamW(), second_moment="tensor", align=False)


def test_local_x_has_the_optimizer_of_its_name() -> None:
    expected = {
        LocalSoap: Soap(), LocalSophia: Sophia(), LocalMuon: Muon(momentum=0.98), LocalShampoo: Shampoo(),
        LocalAdamW: AdamW(),
    }  # fmt: skip
    assert {cls: cls().local for cls in expected} == expected


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {"align": align}) for name in LOCAL for align in (True, False)] + [("adamw", {"second_moment": "hessian"})],
)
def test_drift_is_the_spread_of_the_clients_preconditioners(
    name: str, weighting: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, with the clients' Θ_i taken from their local runs."""
    optimizer = OPTIMIZERS[name]
    thetas: list[Tensor] = []

    def recorded(task: Task, *args: Any, **rest: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        y, end = run_local(task, *args, **rest)
        theta = torch.cat([end[part] for part in optimizer.shared], 1).double()
        rule = options.get("second_moment")
        thetas.extend(task.layout.curvature_blocks(rule).mean(theta) if rule else theta)
        return y, end

    monkeypatch.setattr(fedpac_module, "run_local", recorded)
    settings = {"weighting": weighting, "dtype": torch.float32, "clients_per_batch": 4}
    engine = tiny_engine(FedPac(local=optimizer, **options), **settings)
    sizes: list[float] = []
    train = engine._train

    def counted(positions: list[int], cohort: list[int], *rest: Any) -> list[str]:
        sizes.extend(engine.sizes[[cohort[p] for p in positions]])
        return train(positions, cohort, *rest)

    monkeypatch.setattr(engine, "_train", counted)
    for _ in range(3):
        thetas.clear()
        sizes.clear()
        row = engine.run_round()
        weights = torch.tensor(sizes if weighting == "samples" else [1.0] * len(thetas)).double()
        weights = weights / weights.sum()
        mean = sum(w * theta for w, theta in zip(weights, thetas, strict=True))
        drift = sum(w * (theta - mean).square().sum() for w, theta in zip(weights, thetas, strict=True))
        assert row["preconditioner_drift"] == pytest.approx(float(drift), rel=1e-5)
        relative = float(drift / mean.square().sum())  # type: ignore[union-attr]
        assert row["preconditioner_drift_relative"] == pytest.approx(relative, rel=1e-5)
        assert relative > 1e-3


def test_a_client_alone_has_no_drift() -> None:
    """Not even the rounding of float32, in which the vectors are."""
    engine = tiny_engine(FedPac(), cohort=1, dtype=torch.float32)
    drifts = [engine.run_round()["preconditioner_drift_relative"] for _ in range(4)]
    assert max(drifts) < 1e-12


@pytest.mark.parametrize("optimizer", [Muon(), Soap(), Shampoo()], ids=["Muon", "SOAP", "Shampoo"])
@pytest.mark.parametrize("cls", [FedPac, FedAvg, FedBcgd])
def test_a_matrix_optimizer_refuses_a_model_without_matrices(
    cls: Any, optimizer: LocalOptimizer, request: pytest.FixtureRequest
) -> None:
    options = {"blocks": 1} if cls is FedBcgd else {}
    who = request.node.callspec.id.split("-")[-1]
    module = nn.Sequential(nn.Flatten(), nn.LayerNorm(16)).double()
    with pytest.raises(ValueError, match=f"{who} needs hidden weight matrices, and this model has none"):
        tiny_engine(cls(local=optimizer, **options), module=module)


@pytest.mark.parametrize("cls", [FedPac, FedAvg, FedBcgd])
def test_the_optimizer_says_which_parameters_are_matrices(cls: Any) -> None:
    hidden, every = (tiny_engine(cls(local=Soap(route=route))).layout for route in ("hidden", "all_matrices"))
    assert every.d_matrix - hidden.d_matrix == every["8.weight"].stop - every["8.weight"].start == 32


def test_an_optimizer_without_preconditioner_is_refused() -> None:
    with pytest.raises(ValueError, match="fedpac aligns a preconditioner, and Sgd has none; use fedavg"):
        tiny_engine(FedPac(local=Sgd()))
