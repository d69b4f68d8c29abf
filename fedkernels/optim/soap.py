"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..contract import Move
from ..kernels.fused_adamw import fused_adamw
from ..kernels.rows import zero_rows
from ..layout import Layout, Route
from .kronecker import NULL_SHARE, accumulate, eigenbasis, factor_size, factors, multiply
from .muon import require_matrices
from .steps import active_rows, step_along


@dataclass(frozen=True, kw_only=True)
class Soap:
    """Adam on `Q_LᵀGQ_R` for the layout's matrices, and on everything else as it is.

    `L ← β_s L + (1−β_s)GGᵀ`, `R ← β_s R + (1−β_s)GᵀG`; `P = Q_L Adam(Q_LᵀGQ_R) Q_Rᵀ + λy`, where Q_L and Q_R are the
    eigenvectors of L and R as they were before the first step. After every `refresh_every`-th step
    `Q ← qr((L + 10⁻⁶ tr(L) I)Q)`, one step of orthogonal iteration, with the columns in falling order of `diag(QᵀLQ)`;
    the shift keeps those of the null space, whose image is rounding. v is permuted with the columns, m turned into the
    new basis. Where L and R start at zero the first step only builds them and nothing moves; it counts towards
    `refresh_every`, and not in Adam's bias correction.

    Memory: `2(rows² + cols²)` floats per matrix and client besides m and v.

    Args:
        beta1: β₁, decay of the first moment.
        beta2: β₂, decay of the second moment.
        shampoo_beta: β_s, decay of the factors.
        eps: Adam's ε.
        weight_decay: λ, decoupled, of all parameters.
        refresh_every: local steps between refreshes of the eigenbasis.
        route: `hidden` gives SOAP the hidden weight matrices, `all_matrices` every tensor of two or more dimensions.

    Raises:
        ValueError: state was asked for a layout without a matrix.

    Reference: Vyas et al., SOAP: Improving and stabilizing Shampoo using Adam, 2024 (arXiv 2409.11321), Algorithm 3.
    """

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.95
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    shampoo_beta: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    refresh_every: Annotated[int, Field(ge=1)] = 10
    route: Route = "hidden"

    shared: ClassVar[tuple[str, ...]] = ("H",)
    counters: ClassVar[tuple[str, ...]] = ()
    shardable: ClassVar[bool] = False

    def init(self, y: Tensor, layout: Layout) -> dict[str, Tensor]:
        size = factor_size(require_matrices(layout, "SOAP"))
        state = {name: zero_rows(y) for name in ("m", "v")}
        state |= {name: y.new_zeros(len(y), size) for name in ("H", "Q")}  # L and R, Q_L and Q_R
        return {**state, "skipped": torch.zeros(len(y), 1, dtype=torch.float64, device=y.device)}

    def step(self, state: dict[str, Tensor], g: Tensor, y: Tensor, k: int, layout: Layout, move: Move) -> None:
        with active_rows(move.active, state.values()):
            start = state["H"].clone() if k == 1 else None
            accumulate(state["H"], g, layout, self.shampoo_beta)
            if start is not None:
                fresh = ~start.any(1, keepdim=True)
                state["skipped"].copy_(fresh)
                self._set_basis(state, torch.where(fresh, state["H"], start), layout)
            moving: Tensor | float = (1 - state["skipped"]).to(y.dtype) if k == 1 else 1.0
            # Times zero rather than replaced by it: a gradient of NaN stays one.
            turned = multiply(g, state["Q"], layout, transpose=True).mul_(moving)
            p = multiply(self._adam(state, turned, k), state["Q"], layout).add_(moving * y, alpha=self.weight_decay)
            if k % self.refresh_every == 0:
                self._refresh(state, layout)
        step_along(p, y, move)

    def _adam(self, state: dict[str, Tensor], g: Tensor, k: int) -> Tensor:
        """Adam's direction, which is the step from zero at η = −1."""
        p = zero_rows(g)
        fused_adamw(
            p,
            state["m"],
            state["v"],
            g,
            lr=-p.new_ones(()),
            step=(k - state["skipped"]).clamp_(min=1),
            v_steps=p.new_zeros(()),
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=0.0,
        )
        return p

    def _set_basis(self, state: dict[str, Tensor], start: Tensor, layout: Layout) -> None:
        for pair, basis in zip(factors(start, layout), factors(state["Q"], layout), strict=True):
            for a, q in zip(pair, basis, strict=True):
                q.copy_(eigenbasis(a))

    def _refresh(self, state: dict[str, Tensor], layout: Layout) -> None:
        m = multiply(state["m"], state["Q"], layout)
        pairs = zip(layout.slabs, factors(state["H"], layout), factors(state["Q"], layout), strict=True)
        for slab, (left, right), (q_left, q_right) in pairs:
            rows, cols = _iterate(left, q_left), _iterate(right, q_right)
            v = slab.view(state["v"])
            v.copy_(v.take_along_dim(rows[..., :, None], -2).take_along_dim(cols[..., None, :], -1))
        state["m"].copy_(multiply(m, state["Q"], layout, transpose=True))


def _iterate(a: Tensor, q: Tensor) -> Tensor:
    """One step of orthogonal iteration on `q [..., n, n]`, in place; returns the order `[..., n]` of its columns."""
    image = a @ q
    order = (q * image).sum(-2).argsort(dim=-1, descending=True, stable=True)
    # The shift has the same eigenvectors, and keeps those of the null space, whose image is rounding.
    shift = NULL_SHARE * a.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    image = (image + shift * q).take_along_dim(order[..., None, :], -1)
    q.copy_(torch.linalg.qr(image).Q)
    return order
