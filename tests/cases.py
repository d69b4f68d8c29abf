"""Every algorithm of the table on the tiny federation, with what it costs; importable by ranks in other processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from support import CLIENTS, run_rounds, tiny_engine

from fedkernels.algorithms import ALGORITHMS
from fedkernels.contract import Algorithm, Batch
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.codecs import Int8, TopK
from fedkernels.federated.collectives import Collectives
from fedkernels.federated.engine import Engine
from fedkernels.federated.schedule import sample_cohort
from fedkernels.optim import AdamW, Muon, Shampoo, Soap, Sophia
from fedkernels.privacy.mechanism import GaussianMechanism, Privacy

Result = dict[str, Any]

# The tiny model: 332 parameters, 256 of them in three hidden matrices, 36 in the head; its curvature blocks are 24 rows
# of matrices, 4 of the head, 2 norms and 28 biases.
D, D_MATRIX, D_HEAD, B = 332, 256, 36, 58
# Its matrices are 8 x 16, 8 x 8 and 8 x 8: so many floats have their Kronecker factors.
D_FACTORS = 5 * 8**2 + 16**2
COHORT, ROUNDS, BLOCKS = 6, 3, 3
BLOCK = (D - D_HEAD) / BLOCKS  # on average, beside the shared head
# At this ε directions of little curvature, whose eigenvectors rounding turns, are stepped along as in any basis.
SOAP = Soap(eps=0.05)
# With this ρ some coordinates are clipped and some are not, none of those so steep that rounding shows.
SOPHIA = Sophia(rho=1.0, hessian_every=2)
# At ρ = 1/2 the 8 x 16 matrix goes at rank ⌊64/25⌋ = 2 and the two 8 x 8 ones at ⌊32/17⌋ = 1.
D_LOW_RANK = 2 * 25 + 2 * 17
WORK = LocalWork(8, local_steps=3, local_epochs=2)


@dataclass(frozen=True)
class Case:
    """An algorithm of the table with options, and what it costs in floats.

    Args:
        up, down: floats of one client, on average over the cohort where clients send blocks.
        whole: floats of the wires that are not cut into blocks; None where that is all of `up`.
        kept: floats of state that stays with a client.
        settings: of the engine.
        diagnostic: floats that ride along for metrics.
        up_bytes: bytes of one client's upload for an itemsize, where a codec makes them other than `up` floats.
    """

    algorithm: str
    up: float
    down: int
    options: dict[str, Any] = field(default_factory=dict)
    whole: int | None = None
    kept: int = 0
    diagnostic: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    up_bytes: Callable[[int], int] | None = None

    @property
    def private(self) -> bool:
        return "privacy" in self.settings

    @property
    def cohort_seed(self) -> int:
        return GaussianMechanism(self.settings["privacy"], 1).seed if self.private else 0

    def cohort(self, r: int, size: int = COHORT) -> np.ndarray:
        return sample_cohort(self.settings.get("sampling", "uniform"), self.cohort_seed, r, CLIENTS, size)

    def build(self) -> Algorithm:
        return ALGORITHMS[self.algorithm](**self.options)

    def engine(self, **settings: Any) -> Engine:
        return tiny_engine(self.build(), **(self.settings | settings))


PRIVATE: dict[str, Any] = {
    "sampling": "poisson",
    "on_nonfinite": "drop_client",
    "privacy": Privacy(noise_multiplier=0.7, clip=0.05, delta=0.01, noise_seed=7),
}
CASES = {
    "fedavg": Case("fedavg", D, D),
    "fedavg-all": Case("fedavg", D, D, {"prox_mu": 0.3, "server_momentum": 0.9, "server_lr": 0.5}),
    "fedprox": Case("fedprox", D, D),
    "fedavgm": Case("fedavgm", D, D),
    "fedadam": Case("fedadam", D, D),
    "fedyogi": Case("fedyogi", D, D),
    "fedadagrad": Case("fedadagrad", D, D),
    "fedcm": Case("fedcm", D, 2 * D),
    "fedacg": Case("fedacg", D, D),
    "feddyn": Case("feddyn", D, D, kept=D),
    "fedlada": Case("fedlada", 2 * D, 3 * D),
    "scaffold": Case("scaffold", 2 * D, 2 * D, kept=D),
    "local_adamw": Case("local_adamw", D, D),
    "local_muon": Case("local_muon", D, D),
    "local_soap": Case("local_soap", D, D, {"local": SOAP}),
    "local_sophia": Case("local_sophia", D, D, {"local": SOPHIA}),
    "local_shampoo": Case("local_shampoo", D, D),
    "fedadamw": Case("fedadamw", D + B, 2 * D + B + 1),
    "fedadamw-tensor": Case("fedadamw", D + 10, 2 * D + 11, {"second_moment": "tensor"}),
    "fedadamw-full": Case("fedadamw", 2 * D, 3 * D + 1, {"second_moment": "full"}),
    "fedadamw-none": Case("fedadamw", D, 2 * D, {"second_moment": "none"}),
    "fedmuon": Case("fedmuon", D + D_MATRIX, 2 * D + D_MATRIX),
    "fedmuon-unshared": Case("fedmuon", D, 2 * D, {"share_momentum": False}),
    "fednsam": Case("fednsam", D, 2 * D),
    "fednsam-local": Case("fednsam", D, D, {"perturbation": "local"}),
    "fedsam": Case("fedsam", D, D),
    "mofedsam": Case("mofedsam", D, 2 * D),
    "fedgamma": Case("fedgamma", 2 * D, 2 * D, kept=D),
    "fedlesam": Case("fedlesam", D, D, kept=D),
    "fedsmoo": Case("fedsmoo", 2 * D, 2 * D, kept=2 * D),
    "fedbcgd": Case("fedbcgd", BLOCK + D_HEAD, D, {"blocks": BLOCKS}, whole=D_HEAD),
    "fedbcgd-layers": Case("fedbcgd", BLOCK + D_HEAD, D, {"blocks": BLOCKS, "cut_rows": False}, whole=D_HEAD),
    "fedbcgd-named": Case(
        "fedbcgd", D / BLOCKS, D, {"blocks": (("*.bias",), ("1.*", "8.*"), ("*",)), "shared": ()}, whole=0
    ),
    "fedbcgd_plus": Case("fedbcgd_plus", 2 * (BLOCK + D_HEAD), 2 * D, {"blocks": BLOCKS}, whole=2 * D_HEAD, kept=D),
    "fedbcgd_plus-ema-svrg": Case(
        "fedbcgd_plus",
        2 * (BLOCK + D_HEAD),
        2 * D,
        {"blocks": BLOCKS, "control": "ema", "svrg": True},
        whole=2 * D_HEAD,
        kept=D,
    ),
    "dp_fedavg": Case("dp_fedavg", D, D, settings=PRIVATE),
    "dp_fedsam": Case("dp_fedsam", D, D, settings=PRIVATE),
    "dp_fedadamw": Case("dp_fedadamw", D, 2 * D, settings=PRIVATE),
    "dp_fedpgn": Case("dp_fedpgn", D, 2 * D, settings=PRIVATE),
    "dp_fedpgn-all": Case(
        "dp_fedpgn", D, 2 * D, {"variant": "penalty", "laplacian": 1.0, "sparsify": 0.3}, settings=PRIVATE
    ),
    "fedpac": Case("fedpac", D + D_FACTORS, 2 * D + D_FACTORS, {"local": SOAP}, diagnostic=1),
    "fedpac-sophia": Case("fedpac", 2 * D, 3 * D, {"local": SOPHIA}, diagnostic=1),
    "fedpac-muon": Case("fedpac", D + D_MATRIX, 2 * D + D_MATRIX, {"local": Muon()}, diagnostic=1),
    "fedpac-shampoo": Case("fedpac", D + D_FACTORS, 2 * D + D_FACTORS + 1, {"local": Shampoo()}, diagnostic=1),
    "fedpac-adamw": Case("fedpac", 2 * D, 3 * D + 1, {"local": AdamW()}, diagnostic=1),
    "fedpac-adamw-hessian": Case(
        "fedpac", D + B, 2 * D + B + 1, {"local": AdamW(), "second_moment": "hessian"}, diagnostic=1
    ),
    "fedpac-unaligned": Case("fedpac", D, 2 * D, {"local": SOAP, "align": False}, diagnostic=D_FACTORS + 1),
    "fedmuon-low-rank": Case(
        "fedmuon",
        D + D_MATRIX,
        2 * D + D_MATRIX,
        {"momentum_rank": 0.5, "orthogonalization": "polar_express"},
        up_bytes=lambda itemsize: (D + D_LOW_RANK) * itemsize,
    ),
    "fedavg-int8": Case(
        "fedavg", D, D, settings={"codec": Int8(chunk=50)}, up_bytes=lambda itemsize: D + 4 * math.ceil(D / 50)
    ),
    "scaffold-topk": Case(
        "scaffold",
        2 * D,
        2 * D,
        settings={"codec": TopK(fraction=0.25)},
        kept=3 * D,
        up_bytes=lambda itemsize: 2 * (D // 4) * (itemsize + 4),
    ),
}


def state(engine: Engine) -> dict[str, np.ndarray]:
    """Server vectors, and the state kept at clients of this rank, as numpy."""
    kept = {f"client {i} {n}": v[0] for i in engine.store.ids for n, v in engine.store.get([i]).items()}
    return {name: value.detach().clone().numpy() for name, value in ({**engine.server} | kept).items()}


def run(case: Case, *, stop: int = ROUNDS, poisoned: dict[int, set[int]] | None = None, **options: Any) -> Result:
    """Final state and metrics after `stop` rounds; `poisoned` maps rounds to the clients whose samples are NaN then."""
    engine = case.engine(**({"rounds": 10, "clip_norm": 0.5, "work": WORK} | options))
    if poisoned:
        poison(engine, poisoned)
    _, rows = run_rounds(engine, stop)
    return {"state": state(engine), "rows": rows}


def poison(engine: Engine, poisoned: dict[int, set[int]]) -> None:
    draw = engine.batches.draw

    def poisoned_draw(clients: Sequence[int], r: int) -> Iterator[Batch]:
        for batch in draw(clients, r):
            inputs = batch.inputs.clone()
            inputs[[client in poisoned.get(r, ()) for client in clients]] = torch.nan
            yield replace(batch, inputs=inputs)

    engine.batches.draw = poisoned_draw  # type: ignore[method-assign]


# Clients that drop out the first time they are drawn, some of which train on another rank later.
DROPS: dict[str, Any] = {
    "stop": 5, "poisoned": {1: {5, 10}, 2: {5}, 3: {5}}, "on_nonfinite": "drop_client",
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "float64": {},
    "float32": {"dtype": torch.float32},
    "poisson": {"stop": 4, "sampling": "poisson", "cohort": 4},
    "drops": DROPS,
}


def run_everything(collectives: Collectives) -> dict[str, dict[str, Result]]:
    return {
        name: {kind: run(case, **options, collectives=collectives) for kind, options in RUNS.items()}
        for name, case in CASES.items()
    }
