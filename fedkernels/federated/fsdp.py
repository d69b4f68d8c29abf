"""The objective's module under FSDP2."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from .sharding import ShardedLayout


class Fsdp2:
    """`fully_shard` on every block of the module and on what is around them.

    A block is what a `ModuleList` holds: its parameters are gathered when it computes and freed after it. Parameters
    without a dimension cannot be sharded by rows; the first rank holds them, and all others receive them.
    """

    def __init__(self, module: nn.Module, layout: ShardedLayout, device: torch.device) -> None:
        assert layout.group.process_group is not None
        mesh = DeviceMesh.from_group(layout.group.process_group, device.type)
        scalars = {parameter for parameter in module.parameters() if parameter.dim() == 0}
        for part in (*blocks_of(module), module):
            # The outermost too: what stayed gathered after an evaluation would be the old parameters at the next bind.
            fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)  # losses carry their share already
                part.set_force_sum_reduction_for_comms(True)
        module.to(device)
        self._module = module
        self._group = layout.group
        self._sharded: list[tuple[nn.Parameter, slice]] = []
        self._scalars: list[tuple[nn.Parameter, slice]] = []
        for entry in layout.entries:
            parameter = module.get_parameter(entry.name)
            kind = self._scalars if parameter in scalars else self._sharded
            kind.append((parameter, slice(entry.start, entry.stop)))
        self._grad_row: Tensor | None = None

    @torch.no_grad()
    def bind(self, row: Tensor, grad_row: Tensor | None) -> None:
        self._grad_row = grad_row
        for parameter, run in self._sharded:
            local = _local(parameter)
            local.copy_(row[run].view(local.shape))
        if self._scalars:
            values = [row[run] if self._group.index == 0 else row.new_zeros(1) for _, run in self._scalars]
            for (parameter, _), value in zip(self._scalars, self._group.sum(torch.cat(values)), strict=True):
                parameter.copy_(value)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self._module(inputs)
        return logits

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        row = self._grad_row
        assert row is not None
        for parameter, run in self._sharded:
            if parameter.grad is not None:  # a parameter that the loss does not depend on keeps zeros
                row[run] += _local(parameter.grad).flatten()
                parameter.grad = None
        if self._scalars:
            grads = [row.new_zeros(()) if p.grad is None else p.grad for p, _ in self._scalars]
            for (parameter, run), grad in zip(self._scalars, self._group.sum(torch.stack(grads)), strict=True):
                row[run] += grad
                parameter.grad = None

    def frozen(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self._module.named_parameters():
            if not parameter.requires_grad:
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                if self._group.index == 0:
                    found[name] = whole.detach().cpu()
        return found


def _local(value: Tensor) -> Tensor:
    assert isinstance(value, DTensor)
    return value.to_local()


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The members of the module's lists, inner ones first, without those that share a parameter with the rest."""

    def uses(part: nn.Module) -> Counter[nn.Parameter]:
        # By every name: a module may lie in a block and outside.
        named = part.named_modules(remove_duplicate=False)
        return Counter(parameter for _, child in named for parameter in child.parameters(recurse=False))

    everywhere = uses(module)
    members = [child for part in module.modules() if isinstance(part, nn.ModuleList) for child in part]
    return [
        member
        for member in reversed(members)
        if (inside := uses(member)) and all(everywhere[parameter] == n for parameter, n in inside.items())
    ]
