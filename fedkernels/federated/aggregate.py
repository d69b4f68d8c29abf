"""Client uploads to aggregates: one bucket that every rank adds to, reduced once a round."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..contract import Vectors
from ..layout import Layout
from ..privacy.mechanism import GaussianMechanism
from ..wire import Wire
from .collectives import Collectives


class Aggregator:
    """Sums uploads and weights of a round and reduces them over ranks; `reset` starts the next round.

    The bucket holds, in order: `slots` numbers of the engine's own (losses, counts, flags), the total weight, the
    weight of every block, the payloads, then under privacy the norm of every client's update. Whole wires lie in it
    entirely; of an `only_block` wire just the shared block does. Its other blocks are reduced apart, each among the
    ranks that hold it and together with the same block of every other such wire: one message carries `[wires, block]`.

    Clients are added one row after another in `dtype`: with float64 sums of float32 updates the order, and so the
    number of ranks, the placement and the batch size, leave no trace in the float32 result.

    Args:
        wires: what a client sends.
        dtype: of the sums, and of what travels between ranks.
        slots: numbers the engine sends along.
        mechanism: releases the wires, which then are all private; None where none is.

    Attributes:
        slots: `[slots]`, summed over ranks by `reduce`.
        weight: `[1]`, of the clients added, and by `reduce` of those of all ranks; 0 under privacy.
    """

    def __init__(
        self,
        wires: Mapping[str, Wire],
        layout: Layout,
        like: Tensor,
        dtype: torch.dtype,
        slots: int,
        mechanism: GaussianMechanism | None = None,
    ) -> None:
        self._wires = dict(wires)
        self._layout = layout
        self._like = like
        self._blocks = [layout.block(b) for b in range(layout.n_blocks)]
        self._shared = layout.block(layout.n_blocks)
        self._sliced = [name for name, wire in wires.items() if wire.only_block]
        self._mechanism = mechanism
        self._dtype = dtype
        self._heads = [slots, 1, layout.n_blocks if self._sliced else 0]
        self._sizes: list[int] = []
        for name, wire in wires.items():
            if wire.only_block and wire.like != "params":
                raise ValueError(f"wire {name!r} is sent by block, so it must be like params, not {wire.like!r}")
            if wire.private and (wire.only_block or wire.reduce != "mean"):
                raise ValueError(f"wire {name!r} is private, so it must be sent whole and reduced by mean")
            self._sizes.append(self._shared.stop - self._shared.start if wire.only_block else wire.size(layout))
        self._memory = like.new_empty(0, dtype=dtype)
        self._lay_out(0)
        # Block by block, and inside a block wire by wire.
        n = len(self._sliced)
        self._block_sums = torch.zeros(n * self._shared.start, dtype=dtype, device=like.device)
        self._messages = [slice(n * block.start, n * block.stop) for block in self._blocks]

    def _lay_out(self, cohort: int) -> None:
        sizes = [*self._heads, *self._sizes, cohort]
        if sum(sizes) > len(self._memory):
            self._memory = torch.zeros(sum(sizes), dtype=self._dtype, device=self._like.device)
        self.bucket = self._memory[: sum(sizes)]
        self.slots, self.weight, self._block_weights, *payloads, self._norms = self.bucket.split(sizes)
        self._sums = dict(zip(self._wires, payloads, strict=True))
        self._payload = self.bucket[sum(self._heads) : sum(sizes) - cohort]
        self._noise: Tensor | None = None

    def reset(self, cohort: int = 0) -> None:
        """Zero every sum and slot, for a round of `cohort` clients; how many is only read under privacy."""
        if self._mechanism is not None and cohort != len(self._norms):
            self._lay_out(cohort)
        self.bucket.zero_()
        self._noise = None
        self._block_sums.zero_()

    def add(self, up: Mapping[str, Tensor], c: int, weight: float, block: int | None, position: int = 0) -> None:
        """Add client `c` of an upload `[C, size]`, with its weight, its block, and its position in the cohort."""
        if self._mechanism is not None:
            self._add_clipped({name: up[name][c] for name in self._wires}, position, self._mechanism)
            return
        self.weight += weight
        if block is not None:
            self._block_weights[block] += weight
        for name, wire in self._wires.items():
            row = up[name][c]
            scale = weight if wire.reduce == "mean" else 1.0
            if wire.only_block and block is not None:
                self._block_sum(name, block).add_(row[self._blocks[block]], alpha=scale)
                row = row[self._shared]
            self._sums[name].add_(row, alpha=scale)

    def _block_sum(self, name: str, block: int) -> Tensor:
        sums = self._block_sums[self._messages[block]]
        return sums.view(len(self._sliced), -1)[self._sliced.index(name)]

    def _add_clipped(self, row: Mapping[str, Tensor], position: int, mechanism: GaussianMechanism) -> None:
        """One norm over all wires: clipped apart, k wires would add up to √k C."""
        norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in row.values()]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        self._norms[position] = norm
        factor = mechanism.clip_factor(norm)
        for name, part in row.items():
            self._sums[name] += part.to(self._dtype) * factor

    def add_noise(self, r: int) -> None:
        """Add the noise of round `r` to this rank's partial sums: on one rank alone, and once."""
        assert self._mechanism is not None
        self._noise = self._mechanism.noise(r, len(self._payload)).to(self._payload)
        self._payload += self._noise

    def reduce(self, collectives: Collectives, holders: Sequence[Sequence[int]]) -> Vectors:
        """The aggregated wires, on every rank.

        Args:
            holders: per block the ranks that trained a client of it, ascending; only read for sliced wires.
        """
        collectives.all_reduce(self.bucket)
        if self._sliced:
            collectives.reduce_blocks(self._block_sums, self._messages, holders)
        weight = self.weight.clamp(min=torch.finfo(self.bucket.dtype).tiny)
        # A block without clients has sum 0 and weight 0: its mean is 0.
        block_weights = torch.where(self._block_weights > 0, self._block_weights, 1)
        agg: dict[str, Tensor] = {}
        for name, wire in self._wires.items():
            mean = wire.reduce == "mean"
            total = self._sums[name]
            if self._mechanism is not None:
                total = total / self._mechanism.divisor
            elif mean:
                total = total / weight
            if wire.only_block:
                shared, total = total, self._like.new_empty(self._layout.d)
                total[self._shared] = shared
                for b, block in enumerate(self._blocks):
                    part = self._block_sum(name, b)
                    total[block] = part / block_weights[b] if mean else part
            # Numbers for metrics may be differences of large sums, so they keep the precision of the sums.
            agg[name] = total if wire.diagnostic else total.to(self._like.dtype)
        return Vectors(agg, what="the aggregate", read_only=True)

    def diagnostics(self, clients: int) -> dict[str, float | None]:
        """What the mechanism did to a reduced round of `clients` clients, from un-noised numbers; on the noising rank.

        Returns:
            `clipped_fraction` of the clients, quantiles of `‖r‖` before the clip, and `noise_to_signal`, the expected
            norm of the noise over that of the clipped sum `σC√d/‖Σ‖`; None where there is no client.
        """
        assert self._mechanism is not None
        assert self._noise is not None
        names = ("update_norm_p10", "update_norm_p50", "update_norm_p90")
        if not clients:
            return dict.fromkeys(("clipped_fraction", *names, "noise_to_signal"))
        # Who was left out has norm 0, and so does an update of zeros: either way the largest are those that count.
        norms = self._norms.double().sort(descending=True).values[:clients]
        quantiles = norms.quantile(norms.new_tensor([0.1, 0.5, 0.9])).tolist()
        signal = float((self._payload - self._noise).norm())
        noise = self._mechanism.scale * math.sqrt(len(self._payload))
        return {
            "clipped_fraction": float((norms > self._mechanism.clip).double().mean()),
            **dict(zip(names, quantiles, strict=True)),
            "noise_to_signal": noise / signal if signal else math.inf,
        }


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
