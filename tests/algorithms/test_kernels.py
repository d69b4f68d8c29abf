"""Every algorithm on the reference steps and on the compiled ones: the same training to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import CASES, ROUNDS, SOAP, WORK
from support import run_rounds, tiny_engine
from torch import nn

from fedkernels.algorithms import FedAdamW, FedAvg, FedMuon
from fedkernels.contract import Algorithm
from fedkernels.data.datasets import Digits
from fedkernels.data.partition import Dirichlet
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.engine import Engine
from fedkernels.federated.objective import Objective
from fedkernels.federated.settings import EngineSettings
from fedkernels.kernels import dispatch
from fedkernels.kernels.dispatch import INTERPRETED, BackendError, KernelsName
from fedkernels.optim import Soap

# Of one local step, relative to the largest entry. Adam divides small gradients, rounding included, by their own size;
# SOAP also turns with the eigenvectors of little curvature.
FLOAT32_ULPS, SOAP_ULPS = 32, 256


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_backends_agree(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    soap = isinstance(case.build().local, Soap)
    ulps = SOAP_ULPS if soap else FLOAT32_ULPS
    tolerance = 1e-12 if dtype == torch.float64 else ulps * ROUNDS * 3 * torch.finfo(dtype).eps
    (expected, rows), (found, others) = (
        run_rounds(case.engine(kernels=backend, dtype=dtype, work=WORK), ROUNDS) for backend in ("reference", "cpp")
    )
    assert found.keys() == expected.keys()
    for vector, value in expected.items():
        torch.testing.assert_close(found[vector], value, rtol=0, atol=tolerance * float(value.abs().max()), msg=vector)
    losses = [[row["train_loss"] for row in run if row["train_loss"] is not None] for run in (rows, others)]
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


def digits(algorithm: Algorithm, kernels: KernelsName) -> Engine:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 10))
    data = Digits().load()
    partition = Dirichlet(alpha=0.3).split(data.labels.numpy(), None, 20, seed=0)
    work = LocalWork(batch_size=16, local_steps=5, local_epochs=2)
    settings = EngineSettings(rounds=20, cohort=5, work=work, lr=0.01, evaluator="loop", kernels=kernels)
    return Engine(algorithm, Objective(module, data, torch.device("cpu")), partition, settings)


@pytest.mark.parametrize("algorithm", [FedAdamW(), FedMuon()], ids=["fedadamw", "fedmuon"])
def test_loss_curves_of_digits_agree(algorithm: Algorithm) -> None:
    """In float32, where rounding grows with the training, and far slower than the loss falls."""
    engines = [digits(algorithm, kernels) for kernels in ("reference", "cpp")]
    expected, found = ([row["train_loss"] for row in run_rounds(engine, 15)[1]] for engine in engines)
    assert found == pytest.approx(expected, rel=1e-3)
    assert expected[-1] < 0.8 * expected[0]
    accuracies = [engine.evaluate()["test_accuracy"] for engine in engines]
    assert abs(accuracies[0] - accuracies[1]) < 0.01


@pytest.mark.parametrize(
    ("algorithm", "ops"),
    [
        (FedAvg(), {"fused_sgd"}),
        (FedAvg(local=SOAP), {"fused_adamw", "fused_sgd"}),
        (CASES["fednsam"].build(), {"fused_sam", "fused_sgd", "row_norm"}),
        (CASES["fedsam"].build(), {"fused_sam", "fused_sgd"}),
        (FedMuon(), {"fused_adamw", "muon_step"}),
    ],
    ids=["fedavg", "soap", "fednsam", "fedsam", "fedmuon"],
)
@pytest.mark.parametrize("kernels", ["auto", "reference", "cpp"])
def test_a_run_says_what_its_ops_ran_on(algorithm: Algorithm, ops: set[str], kernels: KernelsName) -> None:
    engine = tiny_engine(algorithm, kernels=kernels)
    assert engine.kernels.summary() == f"kernels {kernels}: none ran"
    engine.run_round()
    backend = "cpp" if kernels == "auto" else kernels
    assert {op: engine.kernels.chosen[op].backend for op in ops} == dict.fromkeys(ops, backend)
    why = "the fastest on cpu" if kernels == "auto" else "asked for by kernels"
    for op in ops:
        assert f"{op} on {backend} ({why})" in engine.kernels.summary()


@pytest.mark.skipif(INTERPRETED, reason="Triton runs on CPU tensors there")
def test_a_backend_that_cannot_run_ends_before_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"^kernels=triton cannot run fused_sgd: runs on cuda, not on cpu$"):
        tiny_engine(FedAvg(), kernels="triton")
    monkeypatch.setitem(dispatch.MISSING, "cpp", "extension not built")
    with pytest.raises(BackendError, match=r"^kernels=cpp cannot run fused_sgd: extension not built$"):
        tiny_engine(FedAvg(), kernels="cpp")


def test_the_variable_is_stronger_than_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDKERNELS_BACKEND", "reference")
    engine = tiny_engine(FedAvg(), kernels="cpp")
    engine.run_round()
    assert engine.kernels.chosen["fused_sgd"].why == "asked for by FEDKERNELS_BACKEND"


def test_the_key_is_the_runs_alone() -> None:
    """Two engines that take turns keep to their own backend, and the bits of an engine that is alone."""
    alone = run_rounds(tiny_engine(FedAdamW(), kernels="reference"), 2)[0]
    engines = {kernels: tiny_engine(FedAdamW(), kernels=kernels) for kernels in ("reference", "cpp")}
    for _ in range(2):
        for engine in engines.values():
            engine.run_round()
    for kernels, engine in engines.items():
        assert engine.kernels.chosen["fused_adamw"].backend == kernels
    assert np.array_equal(engines["reference"].server.x.numpy(), alone["x"].numpy())
