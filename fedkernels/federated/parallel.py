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
from .evaluators import Evaluator, pieces
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
    dealt: ShardedModule
    if sharding == "deepspeed":
        from .zero import Zero3

        dealt = Zero3(module, layout, device, collectives, deepspeed or DeepSpeedSettings())
    else:
        from .fsdp import Fsdp2

        dealt = Fsdp2(module, layout, device)
    # Before the hooks by which parameters are gathered.
    module.register_forward_pre_hook(lambda *_: layout.group.begin_step(), prepend=True)
    return dealt


def share_of(batch: Batch, group: ClientGroup) -> tuple[Batch, Tensor]:
    """This rank's samples of every client's mini-batch, and how many of them count, `[C]`.

    The mean losses of the ranks over their samples, times these counts, add up to the sum over the mini-batch. A rank
    without samples gets one that does not count, since it takes part in what the group computes together.
    """
    clients, size = batch.targets.shape[:2]
    some = group.index < size
    mine = slice(group.index, None, group.size) if some else slice(0, 1)
    inputs, targets = batch.inputs[:, mine], batch.targets[:, mine]
    part = replace(batch, inputs=inputs, targets=targets)
    if batch.weights is None:
        return part, torch.full((clients,), float(some * targets.shape[1]), device=inputs.device)
    weights = batch.weights[:, mine]
    count = weights.sum(1) * some
    # A rank of which all samples are padding has them in the place of others.
    return replace(part, weights=torch.where(count[:, None] > 0, weights, 1)), count


def size_of(batch: Batch) -> Tensor | int:
    """How many samples of every client's mini-batch count, `[C]` where some are padding."""
    return batch.targets.shape[1] if batch.weights is None else batch.weights.sum(1).clamp(min=1)


class DataParallel:
    """Every rank of the group has the whole model; gradients and losses are summed over it."""

    def __init__(self, inner: Evaluator, group: ClientGroup) -> None:
        self._inner = inner
        self._group = group

    def __call__(self, y: Tensor, batch: Batch, g: Tensor) -> Tensor:
        part, count = share_of(batch, self._group)
        losses = self._inner(y, part, g)
        share = count.to(y.dtype) / size_of(batch)
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
        """Add this rank's shard of the sum of all ranks' gradients to the bound row."""
        ...

    def frozen(self) -> dict[str, Tensor]:
        """Whole parameters that are not trained, on the host of the group's first rank; all its ranks call it."""
        ...


class ShardedLoop:
    """One client after another, each by the whole group.

    Args:
        microbatch_size: samples of a forward and backward pass on each rank; None for all it has of a mini-batch.
    """

    def __init__(
        self, objective: Objective, module: ShardedModule, group: ClientGroup, microbatch_size: int | None = None
    ) -> None:
        self._objective = objective
        self._module = module
        self._group = group
        self._piece_size = None if microbatch_size is None else microbatch_size * group.size

    def __call__(self, y: Tensor, batch: Batch, g: Tensor) -> Tensor:
        g.zero_()
        losses = torch.zeros(len(y), dtype=y.dtype, device=y.device)
        active = [True] * len(y) if batch.active is None else batch.active.tolist()
        # Cut before it is shared out, so that all ranks pass through the model equally often.
        cut = [share_of(piece, self._group) for piece, _ in pieces(batch, self._piece_size)]
        size = size_of(batch)
        shares = [count.to(y.dtype) / size for _, count in cut]
        for c in range(len(y)):
            if active[c]:
                self._module.bind(y[c], g[c])
                for (part, _), share in zip(cut, shares, strict=True):
                    weights = None if part.weights is None else part.weights[c]
                    loss = self._objective.loss(self._module.forward, part.inputs[c], part.targets[c], weights)
                    loss = loss * share[c]
                    self._group.begin_step()
                    self._module.backward(loss)
                    losses[c] += loss.detach()
        return self._group.sum(losses)
