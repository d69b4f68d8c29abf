"""FedBCGD+: block coordinate updates with control variates, and with snapshot gradients where asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..contract import Batch, Round, Task, Vectors
from ..federated.local import run_local
from ..layout import Layout
from ..wire import Wire
from .fedbcgd import FedBcgd


@dataclass(frozen=True, kw_only=True)
class FedBcgdPlus(FedBcgd):
    """FedBCGD whose clients correct their gradients by c − c_i and send a second wire, the change of c_i.

    Clients `y ← y − η P(∇f_i(y;ξ) + c − c_i)`, then `c_i⁺ = c_i − c + (x − y)/(Kη)`; server x and v as in FedBCGD. With
    `svrg`, `∇f_i(y;ξ) − ∇f_i(x;ξ) + ∇f_i(x)` stands for `∇f_i(y;ξ)`, where `∇f_i(x)` is over all of a client's samples.

    `(x − y)/(Kη)` is the client's mean direction, corrections included: with plain SGD as P and no momentum c_i⁺ is its
    mean gradient, with another P something of the size of that P's steps.

    `control` says what becomes of c_i⁺, where S_b are the clients of block b, and everyone for the shared block:

    * `exact`: `c_i ← c_i⁺` in the blocks sent, `c_b ← c_b + (|S_b|/N)·mean(c_i⁺ − c_i)` over S_b. As in SCAFFOLD that
      mean is unweighted, so `c` stays the plain mean of all c_i.
    * `ema`: `c_i ← c_i⁺` everywhere, `c_b ← c_b + ρ·mean(c_i⁺ − c)` over S_b, weighted as the run says. Where `c` is
      still 0, as in the first round and in a block that nobody has sent yet, ρ is 1: a client's c_i is already in
      effect there, and without a `c` of its size would cancel the gradient.

    Args:
        control: which of the two.
        rho_c: ρ; only read by `ema`.
        svrg: whether clients take snapshot gradients: a pass over their samples a round, twice the work a step.
        local, blocks, cut_rows, momentum, shared: as in FedBCGD.

    Reference: FedBCGD: Communication-efficient accelerated block coordinate gradient descent for federated learning,
    ACM MM 2024 (arXiv 2603.05116).
    """

    control: Literal["exact", "ema"] = "exact"
    rho_c: Annotated[float, Field(gt=0, le=1)] = 0.1
    svrg: bool = False

    down = ("x", "c")
    keep = ("c_i",)

    def up(self, layout: Layout) -> dict[str, Wire]:
        # |S_b|/N times the mean over S_b is the sum over N.
        reduce: Literal["sum", "mean"] = "sum" if self.control == "exact" else "mean"
        delta_c = Wire(reduce=reduce, only_block=True, state=self.control == "ema")
        return {**super().up(layout), "delta_c": delta_c}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {**super().init(x, layout), "c": torch.zeros_like(x)}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        correction = s.c - k.c_i
        x = s.x.expand_as(correction)
        if self.svrg:
            correction += task.full_grad(x)

        def grad(y: Tensor, batch: Batch) -> Tensor:
            g = task.grad(y, batch)
            if self.svrg:
                g = g.clone()
                g -= task.grad(x, batch)
            return g.add_(correction)

        y, _ = run_local(task, s.x, self.local, grad=grad)
        delta = y - s.x
        c_new = k.c_i - s.c - delta / (task.steps * task.lr)
        if self.control == "exact":
            delta_c = c_new - k.c_i
            k.c_i = torch.where(task.sent, c_new, k.c_i)
        else:
            delta_c = c_new - s.c
            k.c_i = c_new
        return {"delta": delta, "delta_c": delta_c}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        if self.control == "exact":
            change = agg.delta_c / r.population
        else:
            change = torch.where(s.c == 0, agg.delta_c, self.rho_c * agg.delta_c)
        return {**super().server(s, agg, r), "c": s.c + change}
