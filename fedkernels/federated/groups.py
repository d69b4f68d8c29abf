"""The ranks that train one client together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .guard import Guard


class ClientGroup:
    """The ranks of one client group and what they exchange among themselves; on a group of one nothing moves.

    Args:
        index: this rank's place in the group, also the number of its shard.
        size: ranks in the group.
        process_group: of these ranks; None where the group is one rank, or only its geometry is asked for.
        guard: of what they exchange.
    """

    def __init__(
        self,
        index: int = 0,
        size: int = 1,
        process_group: dist.ProcessGroup | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.index = index
        self.size = size
        self.process_group = process_group
        self._guard = guard or Guard()

    def begin_step(self) -> None:
        """Note that the ranks of the group begin to compute something together, by operations that are not below."""
        if self.size > 1:
            self._guard.begin_group_step()

    def sum(self, values: Tensor) -> Tensor:
        """Add `values` up over the group, in place; the result has the same bits on all its ranks."""
        if self.size > 1:
            with self._guard.named(by="group"):
                self._guard.finish(dist.all_reduce(values, group=self.process_group, async_op=True), values.device)
        return values

    def swap(self, outgoing: Sequence[Tensor], incoming: Sequence[int]) -> list[Tensor]:
        """Send the flat tensor `outgoing[i]` to rank i of the group, and receive `incoming[i]` values from it."""
        if self.size == 1:
            return list(outgoing)
        sent = torch.cat(list(outgoing))
        received = sent.new_empty(sum(incoming))
        sizes = [len(part) for part in outgoing]
        with self._guard.named(by="group"):
            work = dist.all_to_all_single(
                received, sent, list(incoming), sizes, group=self.process_group, async_op=True
            )
            self._guard.finish(work, received.device)
        return list(received.split(list(incoming)))

    def collect(self, part: Tensor, sizes: Sequence[int]) -> list[Tensor] | None:
        """Every rank's flat tensor, of `sizes[i]` values from rank i, on the host of the first rank; None elsewhere."""
        if self.size == 1:
            return [part.cpu()]
        with self._guard.named(by="group"):
            if self.index:
                dist.send(part.contiguous(), group=self.process_group, group_dst=0)
                return None
            parts = [part.cpu()]
            for rank in range(1, self.size):
                buffer = part.new_empty(sizes[rank])
                dist.recv(buffer, group=self.process_group, group_src=rank)
                parts.append(buffer.cpu())
            return parts
