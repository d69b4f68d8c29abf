"""Client uploads to aggregates: one bucket that every rank adds to, reduced once a round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..contract import Vectors, Wire
from ..layout import Layout
from .collectives import Collectives


class Aggregator:
    """Sums uploads and weights of a round and reduces them over ranks; `reset` starts the next round.

    The bucket holds, in order: `slots` numbers of the engine's own (losses, counts, flags), the total weight, the
    weight of every block, then the payloads. Whole wires lie in it entirely; of an `only_block` wire just the shared
    block does, its other blocks are reduced apart, each among the ranks that hold it.

    Clients are added one row after another in `dtype`: with float64 sums of float32 updates the order, and so the
    number of ranks, the placement and the batch size, leave no trace in the float32 result.

    Args:
        wires: what a client sends.
        dtype: of the sums, and of what travels between ranks.
        slots: numbers the engine sends along.
    """

    def __init__(self, wires: Mapping[str, Wire], layout: Layout, like: Tensor, dtype: torch.dtype, slots: int) -> None:
        self._wires = dict(wires)
        self._layout = layout
        self._like = like
        self._blocks = [layout.block(b) for b in range(layout.n_blocks)]
        self._shared = layout.block(layout.n_blocks)
        self._sliced = any(wire.only_block for wire in wires.values())
        block_weights = layout.n_blocks if self._sliced else 0
        sizes = [slots, 1, block_weights]
        for name, wire in wires.items():
            if wire.only_block and (wire.like != "params" or wire.reduce != "mean"):
                raise ValueError(f"wire {name!r} is sent by block, so it must be like params and reduced by mean")
            sizes.append(self._shared.stop - self._shared.start if wire.only_block else wire.size(layout))
        self.bucket = torch.zeros(sum(sizes), dtype=dtype, device=like.device)
        self.slots, self._weight, self._block_weights, *payloads = self.bucket.split(sizes)
        self._sums = dict(zip(wires, payloads, strict=True))
        self._block_sums = {
            name: torch.zeros(layout.d, dtype=dtype, device=like.device)
            for name, wire in wires.items()
            if wire.only_block
        }

    def reset(self) -> None:
        """Zero every sum and slot."""
        self.bucket.zero_()
        for sums in self._block_sums.values():
            sums.zero_()

    def add(self, up: Mapping[str, Tensor], c: int, weight: float, block: int | None) -> None:
        """Add client `c` of an upload `[C, size]`, with its weight and the block it was assigned."""
        self._weight += weight
        if block is not None:
            self._block_weights[block] += weight
        for name, wire in self._wires.items():
            row = up[name][c]
            scale = weight if wire.reduce == "mean" else 1.0
            if wire.only_block and block is not None:
                part = self._blocks[block]
                self._block_sums[name][part].add_(row[part], alpha=scale)
                row = row[self._shared]
            self._sums[name].add_(row, alpha=scale)

    def reduce(self, collectives: Collectives, holders: Sequence[Sequence[int]]) -> Vectors:
        """The aggregated wires, on every rank.

        Args:
            holders: per block the ranks that trained a client of it, ascending; only read for sliced wires.
        """
        collectives.all_reduce(self.bucket)
        weight = self._weight.clamp(min=torch.finfo(self.bucket.dtype).tiny)
        agg: dict[str, Tensor] = {}
        for name, wire in self._wires.items():
            total = self._sums[name]
            if wire.only_block:
                full = self._block_sums[name]
                collectives.reduce_blocks(full, self._blocks, holders)
                for block, block_weight in zip(self._blocks, self._block_weights, strict=True):
                    # A block without clients has sum 0 and weight 0: its mean is 0.
                    full[block] /= torch.where(block_weight > 0, block_weight, 1)
                full[self._shared] = total / weight
                total = full
            elif wire.reduce == "mean":
                total = total / weight
            agg[name] = total.to(self._like.dtype)
        return Vectors(agg, what="the aggregate", read_only=True)


def protocol_bytes(
    algorithm_down: Sequence[str],
    server: Mapping[str, Tensor],
    wires: Mapping[str, Wire],
    layout: Layout,
    blocks: Sequence[int | None],
    itemsize: int,
) -> tuple[int, int]:
    """Bytes a real federation sends in a round, `(up, down)`, for a cohort with these blocks (None: whole wires)."""
    up = 0
    for wire in wires.values():
        if wire.diagnostic:
            continue
        for block, clients in Counter(blocks).items():
            payload = wire.payload(layout, block)
            up += clients * (wire.codec.n_bytes(payload, itemsize) if wire.codec else payload.size * itemsize)
    down = len(blocks) * sum(server[name].numel() for name in algorithm_down)
    return up, down * itemsize
