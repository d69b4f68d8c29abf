"""Local Muon: the baseline that averages the parameters of Muon clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from ..contract import Algorithm, Round, Task, Vectors, Wire
from ..federated.local import run_local
from ..layout import Layout, Role
from ..optim import Muon
from ..optim.muon import require_matrices


@dataclass(frozen=True, kw_only=True)
class LocalMuon(Algorithm):
    """Muon at the clients with momentum reset each round, plain averaging at the server.

    Clients `M ← βM + (1−β)g`, `U = (1−β)g + βM`, `y ← y − η[ηₘ NS₅(U)·√max(1, out/in) + λy]`; server `x ← x + Δ̄`.

    Args:
        beta: β, momentum.
        weight_decay: λ, decoupled.
        lr_multiplier: ηₘ, learning rate of the matrices relative to `lr`, which trains the other parameters by AdamW.
        route: `hidden` gives Muon the hidden weight matrices, `all_matrices` every tensor of two or more dimensions.

    Raises:
        ValueError: the layout was asked for a model without such a matrix.

    References: FedAvg of McMahan et al., 2017 (arXiv 1602.05629) around Jordan et al., Muon, 2024
    (https://kellerjordan.github.io/posts/muon/).
    """

    beta: Annotated[float, Field(ge=0, lt=1)] = 0.98
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    lr_multiplier: Annotated[float, Field(gt=0)] = 1.0
    route: Literal["hidden", "all_matrices"] = "hidden"

    def layout(self, module: nn.Module, roles: Mapping[str, Role] | None = None) -> Layout:
        return require_matrices(Layout.of(module, roles, route=self.route))

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"delta": Wire()}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"x": x.clone()}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        muon = Muon(momentum=self.beta, weight_decay=self.weight_decay, lr_multiplier=self.lr_multiplier)
        y, _ = run_local(task, s.x, muon)
        return {"delta": y - s.x}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        return {"x": s.x + agg.delta}
