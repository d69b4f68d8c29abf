"""DP-FedPGN: client-level differential privacy with a penalty on the global gradient norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..contract import Algorithm, Round, Task, Vectors
from ..federated.local import ascent, run_local, shifted_gradient
from ..layout import Layout
from ..optim import Sgd
from ..wire import Wire


@dataclass(frozen=True, kw_only=True)
class DpFedPgn(Algorithm):
    """Every local step mixes the client's gradient with the last released direction g, which is public.

    Clients `y ← y − η(γ∇f_i(w) + (1−γ)g)`, where `w = y` (`mix`) or `w = y + ρg/(‖g‖ + ε)` (`penalty`). Private
    is `r_i = (x − y_i) − (1−γ)Kηg`, the rest of the update being public. Server, with
    `u = (Σ_i clip_C(r_i) + N(0, σ²C²I))/(qN)`: `x ← x − [u + (1−γ)Kηg]`, `g ←` that bracket `/(Kη)`. Needs a `privacy`
    section.

    The published code takes C from each client's own data and clips layer by layer; neither is covered by an ε, and
    neither is done here.

    Args:
        variant: `mix`, or `penalty` for gradients at a point perturbed along g.
        gamma: γ, weight of the client's gradient.
        rho: ρ, radius of the perturbation; only read by `penalty`.
        laplacian: λ of Laplacian smoothing of u along the flat vector; 0 for none.
        sparsify: share of r_i, by size, that a client keeps before clipping (LUS); 1 for all. Every coordinate is
            noised nonetheless: which ones were kept is private.

    Reference: DP-FedPGN: Finding global flat minima for differentially private federated learning via penalizing
    gradient norm, 2025 (arXiv 2510.27504).
    """

    variant: Literal["mix", "penalty"] = "mix"
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.2
    rho: Annotated[float, Field(ge=0)] = 0.1
    laplacian: Annotated[float, Field(ge=0, lt=math.inf)] = 0.0
    sparsify: Annotated[float, Field(gt=0, le=1)] = 1.0

    down = ("x", "g")

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"r": Wire(private=True)}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"x": x.clone(), "g": torch.zeros_like(x)}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        # g is the last released ascent direction: along it the global loss rises fastest.
        uphill = shifted_gradient(task, s.g, ascent(s.g, self.rho)) if self.variant == "penalty" else None
        y, _ = run_local(task, s.x, Sgd(), grad=uphill, share=self.gamma, alpha=1 - self.gamma, G=s.g)
        r = s.x - y - self._public(s, task.round)
        return {"r": r if self.sparsify == 1 else keep_largest(r, self.sparsify)}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        u = smooth(agg.r, self.laplacian) if self.laplacian else agg.r
        step = u + self._public(s, r)
        return {"x": s.x - step, "g": step / (r.steps * r.lr)}

    def _public(self, s: Vectors, r: Round) -> Tensor:
        """(1−γ)Kηg with the nominal K: a client's own number of steps may depend on its data."""
        return (1 - self.gamma) * r.steps * r.lr * s.g


def smooth(u: Tensor, laplacian: float) -> Tensor:
    """Laplacian smoothing: `v [d]` with `(I − λL)v = u`, L the second difference of a circle of d points.

    `v = ifft(fft(u)/(1 − λ fft([−2, 1, 0, ..., 0, 1])))`, whose divisor at frequency k is `1 + 2λ(1 − cos(2πk/d))`.
    """
    d = u.numel()
    k = torch.arange(d // 2 + 1, dtype=torch.float64, device=u.device)
    divisor = 1 + 2 * laplacian * (1 - torch.cos(2 * math.pi / d * k))
    return torch.fft.irfft(torch.fft.rfft(u) / divisor.to(u.dtype), n=d)


def keep_largest(r: Tensor, share: float) -> Tensor:
    """`r [C, d]` with all but the `share·d` largest entries of every row zero; those that tie with the last stay."""
    size = r.abs()
    kept = max(1, round(share * r.shape[1]))
    least = size.topk(kept, dim=1).values[:, -1:]
    return torch.where(size < least, 0, r)  # NaN is not smaller, and stays to be seen
