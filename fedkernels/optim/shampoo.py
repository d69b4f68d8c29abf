"""Shampoo: preconditioning by roots of Kronecker factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..contract import Move
from ..layout import Layout, Route
from .adamw import AdamW
from .kronecker import accumulate, factor_size, factors, inverse_root
from .muon import require_matrices
from .steps import active_rows, step_along


@dataclass(frozen=True, kw_only=True)
class Shampoo:
    """Shampoo on the layout's matrices, with factors that are averages, and AdamW on everything else.

    `L ← βL + (1−β)GGᵀ`, `R ← βR + (1−β)GᵀG`, `P = ηₘ (L̂ + εI)^(−1/q) G (R̂ + εI)^(−1/q) + λy`, where
    `L̂ = L/(1−β^(k₀+k))` corrects the average's start at zero and `k₀ = state["H_steps"]` counts the steps that L and R
    have seen before this round. The roots are those of the first step and of every `refresh_every`-th after it.

    The paper sums where this averages: a sum that outlives the rounds would end the training. Its root of a matrix's
    factors is q = 4; the published code of FedPAC takes q = 2.

    Args:
        beta: β, decay of the factors.
        eps: ε.
        root: q.
        refresh_every: local steps between roots.
        weight_decay: λ, decoupled, of all parameters.
        lr_multiplier: ηₘ, the learning rate of the matrices relative to that of the other parameters.
        adamw_beta1: β₁ of the AdamW that trains embeddings, norms, biases and the output head.
        adamw_beta2: its β₂.
        adamw_eps: its ε.
        route: `hidden` gives Shampoo the hidden weight matrices, `all_matrices` every tensor of two or more dimensions.

    Raises:
        ValueError: state was asked for a layout without a matrix.

    Reference: Gupta, Koren and Singer, Shampoo: Preconditioned stochastic tensor optimization, 2018
    (arXiv 1802.09568), Algorithm 1.
    """

    beta: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-4
    root: Literal[2, 4] = 4
    refresh_every: Annotated[int, Field(ge=1)] = 10
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    lr_multiplier: Annotated[float, Field(gt=0)] = 1.0
    adamw_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adamw_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    adamw_eps: Annotated[float, Field(gt=0)] = 1e-10
    route: Route = "hidden"

    shared: ClassVar[tuple[str, ...]] = ("H",)
    counters: ClassVar[tuple[str, ...]] = ("H_steps",)
    shardable: ClassVar[bool] = False

    def _adamw(self) -> AdamW:
        return AdamW(beta1=self.adamw_beta1, beta2=self.adamw_beta2, eps=self.adamw_eps, weight_decay=self.weight_decay)

    def init(self, y: Tensor, layout: Layout) -> dict[str, Tensor]:
        size = factor_size(require_matrices(layout, "Shampoo"))
        state = {name: y.new_zeros(len(y), size) for name in ("H", "roots")}
        steps = torch.zeros(len(y), 1, dtype=torch.float64, device=y.device)
        return {**state, "H_steps": steps, **self._adamw().init(layout.vectors(y), layout)}

    def step(self, state: dict[str, Tensor], g: Tensor, y: Tensor, k: int, layout: Layout, move: Move) -> None:
        with active_rows(move.active, [state["H"], state["roots"]]):
            accumulate(state["H"], g, layout, self.beta)
            if (k - 1) % self.refresh_every == 0:
                corrected = state["H"] / (1 - self.beta ** (state["H_steps"] + k)).to(y.dtype)
                for pair, roots in zip(factors(corrected, layout), factors(state["roots"], layout), strict=True):
                    for a, root in zip(pair, roots, strict=True):
                        root.copy_(inverse_root(a, self.root, self.eps))
        for slab, (left, right) in zip(layout.slabs, factors(state["roots"], layout), strict=True):
            at = slice(slab.start, slab.stop)
            p = (left @ slab.view(g) @ right.mT).flatten(1)
            step_along(p, y[:, at], move.on(at), weight_decay=self.weight_decay, factor=self.lr_multiplier)
        self._adamw().step_runs(state, g, y, layout.vector_runs, move)
