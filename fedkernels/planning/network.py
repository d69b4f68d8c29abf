"""How long ranks take to tell each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

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

    def all_reduce_s(self, n_bytes: float, ranks: int) -> float:
        """Seconds of an all-reduce: reduced within nodes, then across, then spread within nodes.

        Each level takes the faster of a ring, `2(W−1)(α + n/(W β))`, and a tree, `2⌈log₂ W⌉(α + n/β)`; ranks of a node
        reduce shares of the bucket side by side, so that across nodes all links of a node carry n bytes together.

        Example:
            >>> network = Network(ranks_per_node=1, link_gb_s=1.0, latency_us=0.0)
            >>> network.all_reduce_s(1e9, 2), network.all_reduce_s(1e9, 1)
            (1.0, 0.0)
        """
        inside = min(ranks, self.ranks_per_node)
        nodes = -(-ranks // self.ranks_per_node)
        return self._level_s(n_bytes, inside, self.node_gb_s) + self._level_s(n_bytes, nodes, self.link_gb_s)

    def _level_s(self, n_bytes: float, ranks: int, gb_s: float) -> float:
        if ranks == 1:
            return 0.0
        latency_s, transfer_s = self.latency_us / 1e6, n_bytes / (1e9 * gb_s)
        ring = 2 * (ranks - 1) * (latency_s + transfer_s / ranks)
        return min(ring, 2 * math.ceil(math.log2(ranks)) * (latency_s + transfer_s))

    def send_s(self, n_bytes: float, ranks: int) -> float:
        """Seconds of one message between two of so many ranks, across nodes where there are several."""
        gb_s = self.node_gb_s if ranks <= self.ranks_per_node else self.link_gb_s
        return self.latency_us / 1e6 + n_bytes / (1e9 * gb_s)
