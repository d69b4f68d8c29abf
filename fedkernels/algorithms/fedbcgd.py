"""FedBCGD: block coordinate updates, where a client uploads one block of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from ..contract import Algorithm, LocalOptimizer, Round, Task, Vectors, layout_for
from ..federated.local import run_local
from ..layout import Layout, Role, infer_roles
from ..optim import Sgd
from ..wire import Wire


@dataclass(frozen=True, kw_only=True)
class FedBcgd(Algorithm):
    """Clients train all parameters and send one block and the shared block; the server keeps momentum per block.

    Clients `y ← y − η P(∇f_i(y))`; server `v_b ← γv_b + Δ̄_b`, `x_b ← x_b + v_b`, with Δ̄_b the mean over the clients
    that were assigned block b.

    Args:
        local: the clients' optimizer P, its state reset each round.
        blocks: N_b, contiguous runs of layers balanced by parameter count; or the parameters of every block as name
            patterns, of which the first match wins.
        cut_rows: whether runs may begin and end at a row inside a layer. Whole layers leave blocks as uneven as the
            model: of five, the largest has 3.9 times the mean in LeNet-5 of CIFAR-100 and 1.1 times in ResNet-18 and
            ViT-Tiny, with cuts 1.01 times. Blocks of patterns are whole tensors either way.
        momentum: γ; 0 is the plain form.
        shared: name patterns of the shared block; None shares the output head.

    Raises:
        ValueError: the layout was asked for more blocks than the model has rows or tensors, for a pattern without a
            match, an empty block, or patterns that leave parameters out.

    Reference: FedBCGD: Communication-efficient accelerated block coordinate gradient descent for federated learning,
    ACM MM 2024 (arXiv 2603.05116).
    """

    local: LocalOptimizer = Sgd()
    blocks: Annotated[int, Field(ge=1)] | tuple[tuple[str, ...], ...] = 5
    cut_rows: bool = True
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.45
    shared: tuple[str, ...] | None = None

    def layout(self, module: nn.Module, roles: Mapping[str, Role] | None = None) -> Layout:
        roles = roles or infer_roles(module)
        shared = self.shared
        if shared is None:
            heads = [name.rpartition(".")[0] for name, role in roles.items() if role.kind == "head"]
            shared = tuple(f"{head}.*" for head in heads)
        return layout_for(self.local, module, roles, blocks=self.blocks, cut_rows=self.cut_rows, shared=shared)

    def up(self, layout: Layout) -> dict[str, Wire]:
        return {"delta": Wire(only_block=True)}

    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        return {"x": x.clone(), "v": torch.zeros_like(x)}

    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        y, _ = run_local(task, s.x, self.local)
        return {"delta": y - s.x}

    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        v = self.momentum * s.v + agg.delta
        return {"x": s.x + v, "v": v}
