"""Muon: momentum orthogonalised by Newton–Schulz."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..contract import Move
from ..kernels.muon_step import muon_step
from ..kernels.newton_schulz import Orthogonalization, newton_schulz
from ..kernels.rows import zero_rows
from ..layout import Layout, MatrixPart, Route
from .adamw import AdamW
from .steps import active_rows, step_along


def require_matrices(layout: Layout, optimizer: str = "Muon") -> Layout:
    """The layout, if there is something in it for a matrix optimizer to train.

    Raises:
        ValueError: it has no matrix.
    """
    if not layout.whole.slabs:
        raise ValueError(f"{optimizer} needs hidden weight matrices, and this model has none; use adamw or sgd")
    return layout


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon on the layout's matrices, AdamW on everything else.

    `M ← βM + (1−β)g`, `U = (1−β)g + βM` (Nesterov), `O = NS₅(U)·√max(1, out/in)`, `P = ηₘ O + λy`.

    Args:
        momentum: β.
        weight_decay: λ, decoupled, of all parameters.
        lr_multiplier: ηₘ, the learning rate of the matrices relative to that of the other parameters.
        ns_steps: steps of the orthogonalization.
        orthogonalization: whose coefficients those steps have.
        route: `hidden` gives Muon the hidden weight matrices, `all_matrices` every tensor of two or more dimensions.
        adamw_beta1: β₁ of the AdamW that trains embeddings, norms, biases and the output head.
        adamw_beta2: its β₂.
        adamw_eps: its ε.

    Raises:
        ValueError: state was asked for a layout without a matrix.

    Reference: Jordan et al., Muon, 2024 (https://kellerjordan.github.io/posts/muon/).
    """

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    lr_multiplier: Annotated[float, Field(gt=0)] = 1.0
    ns_steps: Annotated[int, Field(ge=1)] = 5
    orthogonalization: Orthogonalization = "newton_schulz"
    route: Route = "hidden"
    adamw_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adamw_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    adamw_eps: Annotated[float, Field(gt=0)] = 1e-10

    shared: ClassVar[tuple[str, ...]] = ("M",)
    counters: ClassVar[tuple[str, ...]] = ()
    shardable: ClassVar[bool] = True

    def _adamw(self) -> AdamW:
        return AdamW(beta1=self.adamw_beta1, beta2=self.adamw_beta2, eps=self.adamw_eps, weight_decay=self.weight_decay)

    def init(self, y: Tensor, layout: Layout) -> dict[str, Tensor]:
        require_matrices(layout)
        return {"M": zero_rows(layout.matrices(y)), **self._adamw().init(layout.vectors(y), layout)}

    def step(self, state: dict[str, Tensor], g: Tensor, y: Tensor, k: int, layout: Layout, move: Move) -> None:
        for slab in layout.slabs:
            M = state["M"][:, slab.matrix_start : slab.matrix_stop].unflatten(1, (slab.count, slab.rows, slab.cols))
            muon_step(
                slab.view(y),
                M,
                slab.view(g),
                lr=move.lr,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                scale=slab.scale * self.lr_multiplier,
                share=move.share,
                alpha=move.alpha,
                G=None if move.G is None else slab.view(move.G),
                active=move.active,
                steps=self.ns_steps,
                method=self.orthogonalization,
            )
        if layout.matrix_part is not None:
            self._step_part(layout.matrix_part, state["M"], g, y, move)
        self._adamw().step_runs(state, g, y, layout.vector_runs, move)

    def _step_part(self, part: MatrixPart, M: Tensor, g: Tensor, y: Tensor, move: Move) -> None:
        """The step of matrices that are dealt out over ranks, which are whole only where they are orthogonalized."""
        at = slice(part.start, part.stop)
        with active_rows(move.active, [M]):
            M.lerp_(g[:, at], 1 - self.momentum)
            u = torch.lerp(g[:, at], M, self.momentum)
        o = part.map(u, lambda matrices: newton_schulz(matrices, self.ns_steps, self.orthogonalization))
        step_along(o, y[:, at], move.on(at), weight_decay=self.weight_decay, factor=self.lr_multiplier)
