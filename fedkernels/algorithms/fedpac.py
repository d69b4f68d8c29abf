"""FedPAC: clients of any preconditioned optimizer with an aligned preconditioner and a corrected direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..contract import Algorithm, LocalOptimizer, Round, Task, Vectors
from ..federated.local import run_local
from ..layout import CurvatureBlocks, Layout, Role
from ..optim import Soap
from ..wire import Wire


@dataclass(frozen=True, kw_only=True)
class FedPac(Algorithm):
    """Clients start from the mean preconditioner Θ of the last cohort and mix β of the global direction G into steps.

    Clients from `Θ_i = Θ`, first moment 0: `y ← y − η[(1−β)P_{Θ_i}(∇f_i(y)) + βG]`, with weight decay inside P and Θ_i
    learning on. Server `x ← x + Δ̄`, `G = −Δ̄/(Kη)`, `Θ = mean Θ_i`; for an optimizer that corrects the bias of Θ also
    `t ← t + K`, the steps that Θ has seen.

    What Θ is, the optimizer says: the Kronecker factors of SOAP and Shampoo (no eigenbasis, no moment), Sophia's h,
    Muon's M, AdamW's v. `metrics` reports `preconditioner_drift`, the mean of `‖Θ_i − Θ̄‖²_F` over the cohort, and
    `preconditioner_drift_relative`, its share of `‖Θ̄‖²_F`; both weighted as the run weights clients.

    Args:
        local: the clients' optimizer P.
        beta: β, weight of the global direction; the published code's default is 0.85.
        align: False restarts Θ at zero each round and sends none of it; it rides along for the drift alone.
        second_moment: how AdamW's v travels: `full`, or as FedAdamW's means, `hessian` one per curvature block and
            `tensor` one per tensor. Drift is then that of the means.

    Raises:
        ValueError: means of a Θ that is not AdamW's v, or that is not sent; or the layout was asked for with an
            optimizer that has no preconditioner, or a matrix optimizer for a model without matrices.

    Reference: Liu et al., Taming preconditioner drift: Unlocking the potential of second-order optimizers for federated
    learning on non-IID data, 2026 (arXiv 2602.19271).
    """

    local: LocalOptimizer = Soap()
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    align: bool = True
    second_moment: Literal["full", "hessian", "tensor"] = "full"

    def __post_init__(self) -> None:
        if self.second_moment == "full":
            return
        asked = f"second_moment is {self.second_moment!r}, means of a second moment v"
        if self.local.shared != ("v",):
            has = ", ".join(self.local.shared) or "no preconditioner"
            raise ValueError(f"{asked}, but {type(self.local).__name__} has {has}; expected 'full' or AdamW")
        if not self.align:
            raise ValueError(f"{asked}, but without align no preconditioner is sent; expected 'full'")

    @property
    def theta(self) -> dict[str, str]:
        """The optimizer's names of Θ, by the names of server vectors and wires."""
        return {f"theta_{name}": name for name in self.local.shared}

    @property
    def down(self) -> tuple[str, ...]:
        return ("x", "G", *self.theta, *self._counted) if self.align else ("x", "G")

    @property
    def _counted(self) -> tuple[str, ...]:
        return ("t",) if self.local.counters else ()

    def _blocks(self, layout: Layout) -> CurvatureBlocks | None:
        return None if self.second_moment == "full" else layout.curvature_blocks(self.second_moment)

    def layout(self, module: nn.Module, roles: Mapping[str, Role] | None = None) -> Layout:
        if not self.theta:
            raise ValueError(f"fedpac aligns a preconditioner, and {type(self.local).__name__} has none; use fedavg")
        return super().layout(module, roles)

    def up(self, layout: Layout) -> dict[str, Wire]:
        state = self.local.init(torch.empty(1, layout.d, device="meta"), layout)
        blocks = self._blocks(layout)
        sizes = {wire: blocks.size if blocks else state[name].shape[1] for wire, name in self.theta.items()}
        theta = {wire: Wire(size, state=True, diagnostic=not self.align) for wire, size in sizes.items()}
        return {"delta": Wire(), **theta, "theta_square": Wire("scalar", diagnostic=True)}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        state = {"x": x.clone(), "G": torch.zeros_like(x)}
        if self.align:
            wires = self.up(layout)
            state |= {wire: x.new_zeros(wires[wire].size(layout)) for wire in self.theta}
            state |= {name: x.new_zeros(1, dtype=torch.float64) for name in self._counted}
        return state

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        blocks = self._blocks(task.layout)
        if self.align:
            state = {name: blocks.expand(s[wire]) if blocks else s[wire] for wire, name in self.theta.items()}
            if self._counted:  # Θ has seen t steps when this round starts, the first moment none: see FedAdamW
                state |= dict.fromkeys(self.local.counters, s.t)
        y, end = run_local(task, s.x, self.local, state=state, share=1 - self.beta, alpha=self.beta, G=s.G)
        theta = {wire: blocks.mean(end[name]) if blocks else end[name] for wire, name in self.theta.items()}
        square = torch.stack([t.double().square().sum(1, keepdim=True) for t in theta.values()]).sum(0)
        return {"delta": y - s.x, **theta, "theta_square": square}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        new = {"x": s.x + agg.delta, "G": agg.delta / -(r.steps * r.lr)}
        if self.align:
            new |= {wire: agg[wire] for wire in self.theta} | {name: s[name] + r.steps for name in self._counted}
        return new

    def metrics(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, float]:
        mean = sum(float(agg[wire].double().square().sum()) for wire in self.theta)
        drift = max(0.0, float(agg.theta_square) - mean)  # mean ‖Θ_i‖² − ‖Θ̄‖²
        return {"preconditioner_drift": drift, "preconditioner_drift_relative": drift / mean if mean else 0.0}
