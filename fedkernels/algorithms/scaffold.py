"""SCAFFOLD: stochastic controlled averaging."""

from __future__ import annotations

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
class Scaffold(Algorithm):
    """Control variates that cancel client drift; every client keeps `c_i`.

    Clients `y ← y − η(∇f_i(y) − c_i + c)`, then `c_i⁺ = c_i − c + (x − y)/(Kη)`;
    server `x ← x + η_g Δ̄`, `c ← c + (|S|/N)·mean(c_i⁺ − c_i)`.

    The mean of Δ is weighted as the run says. That of c_i⁺ − c_i is not, so that `c` stays the plain mean of all c_i.

    Args:
        local: the clients' optimizer; plain SGD is the paper's, and the one for which `c_i` is a mean gradient.
        server_lr: the global step size η_g.

    Reference: Karimireddy et al., SCAFFOLD: Stochastic controlled averaging for federated learning, 2020
    (arXiv 1910.06378), Algorithm 1 with option II; the comments give its lines.
    """

    local: LocalOptimizer = Sgd()
    server_lr: Annotated[float, Field(gt=0)] = 1.0

    down = ("x", "c")
    keep = ("c_i",)
    shardable = True

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"delta": Wire(), "delta_c": Wire(reduce="sum")}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"x": x.clone(), "c": torch.zeros_like(x)}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        correction = s.c - k.c_i
        y, _ = run_local(task, s.x, self.local, grad=lambda y, b: task.grad(y, b).add_(correction))  # line 10
        delta = y - s.x
        delta_c = -s.c - delta / (task.steps * task.lr)  # line 12: c_i⁺ − c_i, option II
        k.c_i = k.c_i + delta_c  # line 14
        return {"delta": delta, "delta_c": delta_c}  # line 13

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        return {
            "x": s.x + self.server_lr * agg.delta,  # line 16
            "c": s.c + agg.delta_c / r.population,  # line 17: |S|/N times the mean is the sum over N
        }
