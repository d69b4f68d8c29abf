"""FedNSAM: sharpness-aware minimisation at Nesterov's look-ahead point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..contract import Algorithm, Round, Task, Vectors
from ..federated.local import ascent, run_local, sam_gradient, shifted_gradient
from ..layout import Layout
from ..optim import Sgd
from ..wire import Wire


@dataclass(frozen=True, kw_only=True)
class FedNsam(Algorithm):
    """The server's momentum m points ahead, and back along it is uphill for everyone.

    `global`: clients from `y = x`, `y ← y − η(∇f_i(y + e) + λy)` with `e = γm − ρm/(‖m‖ + ε)` for the whole round.
    `local`: clients from `y = z = x + γm`, `y ← y − η(∇f_i(y + ρg/(‖g‖ + ε)) + λy)` with `g = ∇f_i(y)`.
    Δ is measured from where y started; server `m ← γm + Δ̄`, `x ← x + m`.

    Args:
        gamma: γ, momentum and look-ahead alike.
        rho: ρ, radius of the perturbation.
        weight_decay: λ, of y itself, not of the perturbed point.
        perturbation: `global` is the paper's abstract, with one gradient a step and m sent along; `local` is the
            published code, with two gradients a step and the look-ahead point sent in the place of x.

    Reference: FedNSAM: Consistency of local and global flatness for federated learning, 2026 (arXiv 2602.23827).
    """

    gamma: Annotated[float, Field(ge=0, lt=1)] = 0.85
    rho: Annotated[float, Field(ge=0)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3
    perturbation: Literal["global", "local"] = "global"

    @property
    def down(self) -> tuple[str, ...]:
        return ("x", "m") if self.perturbation == "global" else ("z",)

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"delta": Wire()}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        state = {"x": x.clone(), "m": torch.zeros_like(x)}
        return state if self.perturbation == "global" else {**state, "z": x.clone()}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        sgd = Sgd(weight_decay=self.weight_decay)
        if self.perturbation == "local":
            y, _ = run_local(task, s.z, sgd, grad=sam_gradient(task, self.rho))
            return {"delta": y - s.z}
        # m is a displacement downhill, so −m is the ascent direction.
        y, _ = run_local(task, s.x, sgd, grad=shifted_gradient(task, s.m, self.gamma - ascent(s.m, self.rho)))
        return {"delta": y - s.x}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        m = self.gamma * s.m + agg.delta
        x = s.x + m
        return {"x": x, "m": m} if self.perturbation == "global" else {"x": x, "m": m, "z": x + self.gamma * m}
