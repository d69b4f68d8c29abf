"""FedMuon: Muon clients with a shared momentum and a global direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from ..contract import Algorithm, Round, Task, Vectors
from ..federated.codecs import LowRank
from ..federated.local import run_local
from ..kernels.newton_schulz import Orthogonalization
from ..layout import Layout, Role, Route
from ..optim import Muon
from ..optim.muon import require_matrices
from ..wire import Wire


@dataclass(frozen=True, kw_only=True)
class FedMuon(Algorithm):
    """Clients start from the mean momentum M̄ of the last cohort and mix α of the global direction G into each step.

    Clients from `M = M̄`: `M ← βM + (1−β)g`, `O = ηₘ NS₅((1−β)g + βM)·√max(1, out/in)`,
    `y ← y − η[(1−α)(O + λy) + αG]`; embeddings, norms, biases and the head take AdamW in the place of O.
    Server `x ← x + Δ̄`, `G = −Δ̄/(Kη)`, `M̄ = mean M`.

    Args:
        alpha: α, weight of the global direction.
        beta: β, momentum.
        weight_decay: λ, decoupled.
        lr_multiplier: ηₘ, learning rate of the matrices relative to `lr`, which trains the other parameters by AdamW.
        share_momentum: False restarts M at zero each round and sends none of it.
        momentum_rank: ρ; clients send M as a truncated SVD of about ρ times the floats, matrix by matrix. None sends
            all of it.
        orthogonalization: the coefficients of NS₅.
        route: `hidden` gives Muon the hidden weight matrices, `all_matrices` every tensor of two or more dimensions.

    Raises:
        ValueError: a momentum_rank without a shared momentum, or the layout of a model without such a matrix.

    Reference: FedMuon: Accelerating federated learning with matrix orthogonalization, 2025 (arXiv 2510.27403). Two
    other methods bear the name: a bias-corrected linear-minimisation oracle with client state (arXiv 2509.26337) and
    arXiv 2510.03866.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.98
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    lr_multiplier: Annotated[float, Field(gt=0)] = 1.0
    share_momentum: bool = True
    momentum_rank: Annotated[float, Field(gt=0, le=1)] | None = None
    orthogonalization: Orthogonalization = "newton_schulz"
    route: Route = "hidden"

    shardable = True

    def __post_init__(self) -> None:
        if self.momentum_rank is not None and not self.share_momentum:
            raise ValueError(f"momentum_rank is {self.momentum_rank}, but without share_momentum no momentum is sent")

    @property
    def down(self) -> tuple[str, ...]:
        return ("x", "G", "M_bar") if self.share_momentum else ("x", "G")

    def layout(self, module: nn.Module, roles: Mapping[str, Role] | None = None) -> Layout:
        return require_matrices(Layout.of(module, roles, route=self.route))

    def up(self, layout: Layout) -> dict[str, Wire]:
        delta = {"delta": Wire()}
        codec = None if self.momentum_rank is None else LowRank(fraction=self.momentum_rank)
        return {**delta, "M": Wire("matrices", state=True, codec=codec)} if self.share_momentum else delta

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        state = {"x": x.clone(), "G": torch.zeros_like(x)}
        return {**state, "M_bar": torch.zeros_like(layout.matrices(x))} if self.share_momentum else state

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        muon = Muon(
            momentum=self.beta,
            weight_decay=self.weight_decay,
            lr_multiplier=self.lr_multiplier,
            orthogonalization=self.orthogonalization,
        )
        state = {"M": s.M_bar} if self.share_momentum else {}
        y, end = run_local(task, s.x, muon, state=state, share=1 - self.alpha, alpha=self.alpha, G=s.G)
        delta = {"delta": y - s.x}
        return {**delta, "M": end["M"]} if self.share_momentum else delta

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        new = {"x": s.x + agg.delta, "G": agg.delta / -(r.steps * r.lr)}
        return {**new, "M_bar": agg.M} if self.share_momentum else new
