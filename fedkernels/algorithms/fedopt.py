"""FedAdam, FedYogi and FedAdagrad: adaptive optimizers at the server."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..contract import Algorithm, LocalOptimizer, Round, Task, Vectors
from ..federated.local import run_local
from ..layout import Layout
from ..optim import Sgd
from ..wire import Wire


@dataclass(frozen=True, kw_only=True)
class FedOpt(Algorithm):
    """Local SGD whose mean update −Δ̄ is the gradient of an adaptive optimizer at the server.

    Clients `y ← y − η P(∇f_i(y))`; server `m ← β₁m + (1−β₁)Δ̄`, v by the rule of the subclass,
    `x ← x + η_g m/(√v + τ)`. There is no bias correction: v starts at τ².

    Args:
        local: the clients' optimizer P, its state reset each round.
        server_lr: η_g, about the size of the server's step in every coordinate.
        beta1: β₁, decay of the first moment.
        tau: τ, degree of adaptivity: the larger beside Δ̄, the nearer the step is to a multiple of m.

    Reference: Reddi et al., Adaptive federated optimization, 2021 (arXiv 2003.00295), Algorithm 2.
    """

    local: LocalOptimizer = Sgd()
    server_lr: Annotated[float, Field(gt=0)] = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    tau: Annotated[float, Field(gt=0)] = 1e-3

    shardable = True

    @abstractmethod
    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        """v after a round with `square = Δ̄²`, `[d]` each."""

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"delta": Wire()}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"x": x.clone(), "m": torch.zeros_like(x), "v": torch.full_like(x, self.tau**2)}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        y, _ = run_local(task, s.x, self.local)
        return {"delta": y - s.x}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        m = self.beta1 * s.m + (1 - self.beta1) * agg.delta
        v = self.second_moment(s.v, agg.delta.square())
        return {"x": s.x + self.server_lr * m / (v.sqrt() + self.tau), "m": m, "v": v}


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(FedOpt):
    """FedOpt with Adagrad's rule `v ← v + Δ̄²`.

    Args:
        beta1: β₁; the paper runs it without momentum. The other keys are those of FedOpt.

    Reference: Reddi et al., Adaptive federated optimization, 2021 (arXiv 2003.00295), Algorithm 2.
    """

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return v + square


@dataclass(frozen=True, kw_only=True)
class FedYogi(FedOpt):
    """FedOpt with Yogi's rule `v ← v − (1−β₂) Δ̄² sign(v − Δ̄²)`, which moves v by no more than the new square.

    Args:
        beta2: β₂; the other keys are those of FedOpt.

    Reference: Reddi et al., Adaptive federated optimization, 2021 (arXiv 2003.00295), Algorithm 2.
    """

    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self.beta2) * square * torch.sign(v - square)


@dataclass(frozen=True, kw_only=True)
class FedAdam(FedOpt):
    """FedOpt with Adam's rule `v ← β₂v + (1−β₂)Δ̄²`.

    Args:
        beta2: β₂, decay of the second moment; the other keys are those of FedOpt.

    Reference: Reddi et al., Adaptive federated optimization, 2021 (arXiv 2003.00295), Algorithm 2.
    """

    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99

    def second_moment(self, v: Tensor, square: Tensor) -> Tensor:
        return self.beta2 * v + (1 - self.beta2) * square
