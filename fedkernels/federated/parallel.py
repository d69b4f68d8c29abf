"""Gradients of one client by a group of ranks, behind the signature of every evaluator.

Each rank takes its share of the client's mini-batch. With `ddp` it has the whole model and gradients are summed; a
`ShardedModule` has this rank's shard of the parameters and leaves its shard of the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..contract import Algorithm, Batch
from ..wire import Wire
from .collectives import Collectives
from .evaluators import Evaluator
from .groups import ClientGroup
from .objective import Objective
from .sharding import WHOLE, Cut, ShardedLayout

Sharding = Literal["none", "ddp", "fsdp2", "deepspeed"]


@dataclass(frozen=True, kw_only=True)
class DeepSpeedSettings:
    """What `sharding: deepspeed` leaves to choose.

    Args:
        offload: `cpu` keeps the shards of DeepSpeed's parameters and gradients in host memory.
    """

    offload: Literal["none", "cpu"] = "none"


def cut_of(sharding: Sharding, shards: int) -> Cut:
    """How a kind of sharding deals vectors out."""
    units: dict[Sharding, Literal["row", "element"]] = {"fsdp2": "row", "deepspeed": "element"}
    return Cut(units[sharding], shards) if sharding in units else WHOLE


def check_shardable(sharding: Sharding, algorithm: Algorithm, wires: Mapping[str, Wire]) -> None:
    """Refuse what needs vectors whole.

    Raises:
        ValueError: an algorithm, a local optimizer or a codec that does.
    """
    from ..algorithms import ALGORITHMS
    from ..optim import OPTIMIZERS

    def refuse(what: str, table: Mapping[str, type[Any]]) -> ValueError:
        able = ", ".join(name for name, cls in table.items() if cls.shardable)
        return ValueError(f"sharding: {sharding} is not for {what}, which needs vectors whole; it is for {able}")

    if not algorithm.shardable:
        raise refuse(type(algorithm).__name__, ALGORITHMS)
    if algorithm.local is not None and not algorithm.local.shardable:
        raise refuse(f"the local optimizer {type(algorithm.local).__name__}", OPTIMIZERS)
    if coded := [name for name, wire in wires.items() if wire.codec is not None]:
        codec = type(wires[coded[0]].codec).__name__
        raise ValueError(f"sharding: {sharding} sends floats, and wire {coded[0]!r} has the codec {codec}; use ddp")


def shard(
    objective: Objective,
    layout: ShardedLayout,
    sharding: Sharding,
    collectives: Collectives,
    deepspeed: DeepSpeedSettings | None,
) -> ShardedModule:
    """Deal the objective's module out over the ranks of a group."""
    module, device = objective.module, objective.device
    if sharding == "deepspeed":
        from .zero import Zero3

        return Zero3(module, layout, device, collectives, deepspeed or DeepSpeedSettings())
    from .fsdp import Fsdp2

    return Fsdp2(module, layout, device)


def share_of(batch: Batch, group: ClientGroup) -> tuple[Batch, Tensor]:
    """This rank's samples of every client's mini-batch, and the share `[C]` they have of its weight.

    The losses of the ranks, each a mean over its samples, times the shares add up to the mean over the mini-batch. A
    rank without samples gets one of share 0, since it takes part in what the group computes together.
    """
    clients, size = batch.targets.shape[:2]
    mine = slice(group.index, None, group.size) if group.index < size else slice(0, 1)
    inputs, targets = batch.inputs[:, mine], batch.targets[:, mine]
    if batch.weights is None:
        samples = targets.shape[1] if group.index < size else 0
        return replace(batch, inputs=inputs, targets=targets), inputs.new_full(
            (clients,), samples / size, dtype=torch.float64
        )
    weights = batch.weights[:, mine]
    held = weights.sum(1) if group.index < size else weights.new_zeros(clients)
    # Padding lies at the end, so a rank of which all samples are padding has them in place of others.
    weights = torch.where(held[:, None] > 0, weights, 1)
    share = held.double() / batch.weights.sum(1).clamp(min=1)
    return replace(batch, inputs=inputs, targets=targets, weights=weights), share


class DataParallel:
    """Every rank of the group has the whole model; gradients and losses are summed over it."""

    def __init__(self, inner: Evaluator, group: ClientGroup) -> None:
        self._inner = inner
        self._group = group

    def __call__(self, y: Tensor, batch: Batch, g: Tensor) -> Tensor:
        part, share = share_of(batch, self._group)
        losses = self._inner(y, part, g)
        share = share.to(y.dtype)
        g.mul_(share[:, None])
        self._group.sum(g)
        return self._group.sum(losses * share)


class ShardedModule(Protocol):
    """The objective's module, its parameters dealt out over the ranks of a group."""

    def bind(self, row: Tensor, grad_row: Tensor | None) -> None:
        """Compute at the shard `row [d]` from here on, and leave gradients in the shard `grad_row [d]`."""
        ...

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits; every rank of the group calls it, or none."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Write this rank's shard of the sum of all ranks' gradients to the bound row."""
        ...


class ShardedLoop:
    """One client after another, each by the whole group."""

    def __init__(self, objective: Objective, module: ShardedModule, group: ClientGroup) -> None:
        self._objective = objective
        self._module = module
        self._group = group

    def __call__(self, y: Tensor, batch: Batch, g: Tensor) -> Tensor:
        g.zero_()
        losses = torch.zeros(len(y), dtype=y.dtype, device=y.device)
        active = [True] * len(y) if batch.active is None else batch.active.tolist()
        part, share = share_of(batch, self._group)
        share = share.to(y.dtype)
        for c in range(len(y)):
            if active[c]:
                self._module.bind(y[c], g[c])
                weights = None if part.weights is None else part.weights[c]
                loss = self._objective.loss(self._module.forward, part.inputs[c], part.targets[c], weights) * share[c]
                self._module.backward(loss)
                losses[c] = loss.detach()
        return self._group.sum(losses)
