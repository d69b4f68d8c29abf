"""A sum over ranks in two levels: in every node, then across nodes.

Of N nodes with L ranks each, a ring over all W = N L ranks takes 2(W−1) steps, each as slow as the link between nodes.
Here every rank of a node first sums a share of the bucket, one L-th of it, over the node; then ranks with one share sum
it over nodes, L rings of N ranks side by side; then the ranks of a node give each other their shares. That is 2(N−1)
steps across nodes and two inside. Of n bytes, 2(W−1)n move in all either way; across nodes it is 2(N−1)n, where a ring
through the nodes one after another moves 2N(W−1)/W n.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from .guard import Guard

AllReduce = Literal["flat", "hierarchical"]


def node_name() -> str:
    """The node this rank is on: its host, and the number of torchrun's agent, of which a host may have several."""
    agent = os.environ.get("GROUP_RANK")
    return socket.gethostname() + (f" (node {agent})" if agent is not None else "")


def levels(nodes: Sequence[str], shard_size: int = 1) -> tuple[list[list[int]], list[list[int]]]:
    """Ranks that hold the same shard on one node, and those among which it is then summed across nodes.

    Args:
        nodes: the node of every rank.
        shard_size: ranks of a client group; rank r holds shard r mod shard_size.

    Returns:
        Disjoint lists of ranks, `[N · shard_size][L]` inside nodes and `[L · shard_size][N]` across.

    Raises:
        ValueError: the nodes do not all have as many ranks.

    Example:
        >>> levels(["a", "a", "b", "b"])
        ([[0, 1], [2, 3]], [[0, 2], [1, 3]])
    """
    inside: list[list[int]] = []
    across: list[list[int]] = []
    for shard in range(shard_size):
        by_node: dict[str, list[int]] = {}
        for rank in range(shard, len(nodes), shard_size):
            by_node.setdefault(nodes[rank], []).append(rank)
        inside += by_node.values()
        across += [list(ranks) for ranks in zip(*by_node.values(), strict=False)]
    if len({len(ranks) for ranks in inside}) > 1:
        found = ", ".join(f"{count} on {node}" for node, count in Counter(nodes).items())
        what = "ranks" if shard_size == 1 else f"ranks of each of the {shard_size} shards"
        raise ValueError(
            f"all_reduce: hierarchical needs as many {what} on every node, found ranks {found}; start as many on each, "
            "or use all_reduce: flat"
        )
    return inside, across


class Hierarchy:
    """The ranks with which this one sums, in its node and across nodes; made by all ranks together.

    Args:
        inside, across: of all ranks, from `levels`.
        rank: of this process.
        timeout: of what they exchange; None for the backend's own.
        guard: of what they exchange.

    Attributes:
        ranks: L, on a node.
        nodes: N.
    """

    def __init__(
        self,
        inside: Sequence[Sequence[int]],
        across: Sequence[Sequence[int]],
        rank: int,
        timeout: timedelta | None,
        guard: Guard,
    ) -> None:
        self.ranks, self.nodes = len(inside[0]), len(across[0])
        self._place = next(members.index(rank) for members in inside if rank in members)
        self._inside, self._across = (_group_of(rank, level, timeout) for level in (inside, across))
        self._guard = guard

    def sum(self, bucket: Tensor) -> None:
        """Sum the flat `bucket [n]` over all ranks, in place; it needs room for n numbers more, and for a share."""
        guard, device = self._guard, bucket.device
        shares = [len(share) for share in bucket.tensor_split(self.ranks)]
        own = [shares[self._place]] * self.ranks
        parts = bucket.new_empty(self.ranks, own[0])
        # All ranks enter three: one that waits for another in its node is further than that one, and behind the rest.
        with guard.named():
            guard.arrive(device)
            work = dist.all_to_all_single(parts.view(-1), bucket, own, shares, group=self._inside, async_op=True)
            guard.finish(work, device)
        share = parts.sum(0)
        with guard.named():
            guard.finish(dist.all_reduce(share, group=self._across, async_op=True), device)
        parts.copy_(share)
        with guard.named():
            work = dist.all_to_all_single(bucket, parts.view(-1), shares, own, group=self._inside, async_op=True)
            guard.finish(work, device)


def _group_of(rank: int, level: Sequence[Sequence[int]], timeout: timedelta | None) -> dist.ProcessGroup:
    """The group of a rank; every rank takes part in making every group."""
    groups = {members[0]: dist.new_group(list(members), timeout) for members in level}
    return next(groups[members[0]] for members in level if rank in members)
