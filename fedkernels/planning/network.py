"""How long ranks take to tell each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ..federated.hierarchy import AllReduce

Backend = Literal["gloo", "nccl"]
Positive = Annotated[float, Field(gt=0, lt=math.inf)]


@dataclass(frozen=True, kw_only=True)
class Network:
    """How ranks are connected.

    Args:
        ranks_per_node: ranks that share a node and its fast links.
        node_gb_s: of one rank to others in its node, in 10⁹ bytes a second and direction.
        link_gb_s: of one node to others, likewise.
        latency_us: of one message, in microseconds.
    """

    ranks_per_node: Annotated[int, Field(ge=1)] = 8
    node_gb_s: Positive = 300.0
    link_gb_s: Positive = 25.0
    latency_us: Annotated[float, Field(ge=0, lt=math.inf)] = 10.0

    def all_reduce_s(
        self, n_bytes: float, ranks: int, all_reduce: AllReduce = "flat", backend: Backend = "gloo"
    ) -> float:
        """Seconds of an all-reduce of n bytes over W ranks, L on each of N nodes.

        gloo's is one ring through the nodes one after another, `2(W−1)(α + n/(W β))`: of the ring one edge leaves each
        node and has its link to itself, but every step waits for the slowest. NCCL's reduces within nodes, across, and
        spreads within nodes, shares of the bucket side by side, so that all links of a node carry n bytes together.
        Each level takes the faster of a ring and a tree, `2⌈log₂ W⌉(α + n/β)`. `hierarchical` exchanges shares
        directly in every node, `2(α + (L−1)n/(L β))`, with the backend's own all-reduce across nodes in between; where
        there is one level it is flat.

        Example:
            >>> network = Network(ranks_per_node=2, node_gb_s=10.0, link_gb_s=1.0, latency_us=0.0)
            >>> network.all_reduce_s(1e9, 4), round(network.all_reduce_s(1e9, 4, "hierarchical"), 9)
            (1.5, 1.1)
        """
        inside = min(ranks, self.ranks_per_node)
        nodes = -(-ranks // self.ranks_per_node)
        if all_reduce == "hierarchical" and inside > 1 and nodes > 1:
            exchange_s = self.latency_us / 1e6 + (inside - 1) / inside * n_bytes / (1e9 * self.node_gb_s)
            return 2 * exchange_s + self._level_s(n_bytes, nodes, self.link_gb_s, tree=backend == "nccl")
        if backend == "gloo":
            gb_s = self.node_gb_s if nodes == 1 else min(self.node_gb_s, self.link_gb_s)
            return self._level_s(n_bytes, ranks, gb_s, tree=False)
        within_s = self._level_s(n_bytes, inside, self.node_gb_s, tree=True)
        return within_s + self._level_s(n_bytes, nodes, self.link_gb_s, tree=True)

    def _level_s(self, n_bytes: float, ranks: int, gb_s: float, *, tree: bool) -> float:
        if ranks == 1:
            return 0.0
        latency_s, transfer_s = self.latency_us / 1e6, n_bytes / (1e9 * gb_s)
        ring = 2 * (ranks - 1) * (latency_s + transfer_s / ranks)
        return min(ring, 2 * math.ceil(math.log2(ranks)) * (latency_s + transfer_s)) if tree else ring

    def send_s(self, n_bytes: float, ranks: int) -> float:
        """Seconds of one message between two of so many ranks, across nodes where there are several."""
        gb_s = self.node_gb_s if ranks <= self.ranks_per_node else self.link_gb_s
        return self.latency_us / 1e6 + n_bytes / (1e9 * gb_s)
