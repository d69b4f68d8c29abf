"""Client uploads to aggregates: one bucket that every rank adds to, reduced once a round."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..contract import Vectors
from ..kernels.exact_sum import exact_add, limit, value
from ..kernels.round_tail import accumulate, square_sums
from ..layout import Layout
from ..privacy.mechanism import GaussianMechanism
from ..wire import Wire
from .collectives import Collectives
from .groups import ClientGroup


class ExactSumError(OverflowError):
    """A term too large for an exact sum."""


class Aggregator:
    """Sums uploads and weights of a round and reduces them over ranks; `reset` starts the next round.

    The bucket holds, in order: `slots` numbers of the engine's own (losses, counts, flags), the total weight, the
    weight of every block, the payloads, then under privacy the norm of every client's update. Whole wires lie in it
    entirely; of an `only_block` wire just the shared block does. Its other blocks are reduced apart, each among the
    ranks that hold it and together with the same block of every other such wire: one message carries `[wires, block]`.

    Clients are added one row after another in `dtype`: with float64 sums of float32 updates the order, and so the
    number of ranks, the placement and the batch size, leave no trace in the float32 result but where a sum lies as good
    as halfway between two of its numbers. Exact sums of integers leave none at all; they take twice the bytes of
    float64.

    Args:
        wires: what a client sends.
        dtype: of the sums, and of what travels between ranks; int64 for exact sums.
        slots: numbers the engine sends along.
        mechanism: releases the wires, which then are all private; None where none is.
        group: the ranks that have the other shards of the same clients' uploads.

    Attributes:
        slots: `[slots]`, summed over ranks by `reduce`; sums over clients go there by `tally`.
        weight: `[1]`, of the clients of all ranks, once reduced; 0 under privacy.
    """

    def __init__(
        self,
        wires: Mapping[str, Wire],
        layout: Layout,
        like: Tensor,
        dtype: torch.dtype,
        slots: int,
        mechanism: GaussianMechanism | None = None,
        group: ClientGroup | None = None,
    ) -> None:
        self._group = group or ClientGroup()
        self._wires = dict(wires)
        self._layout = layout
        self._like = like
        self._blocks = [layout.block(b) for b in range(layout.n_blocks)]
        self._shared = layout.block(layout.n_blocks)
        self._sliced = [name for name, wire in wires.items() if wire.only_block]
        self._mechanism = mechanism
        self._dtype = dtype
        self._exact = dtype == torch.int64
        self._words = 2 if self._exact else 1  # that stand for a number
        self._real = torch.float64 if self._exact else dtype
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
        self._block_sums = torch.zeros(self._words * n * self._shared.start, dtype=dtype, device=like.device)
        n *= self._words
        self._messages = [slice(n * block.start, n * block.stop) for block in self._blocks]

    def _lay_out(self, cohort: int) -> None:
        # The last counts the ranks that met a term too large for an exact sum.
        sizes = [self._words * n for n in (*self._heads, *self._sizes, cohort)] + [int(self._exact)]
        if sum(sizes) > len(self._memory):
            self._memory = torch.zeros(sum(sizes), dtype=self._dtype, device=self._like.device)
        self.bucket = self._memory[: sum(sizes)]
        *parts, self._refused = self.bucket.split(sizes)
        slots, self._weight, self._block_weights, *payloads, norms = (part.view(self._words, -1) for part in parts)
        self._sums = dict(zip(self._wires, payloads, strict=True))
        self.slots, self._norms = slots[0], norms[0]
        self._own: list[tuple[Tensor, Tensor]] = []
        if self._exact:
            # What one rank alone writes: it enters the sums once it is complete.
            self.slots, self._norms = (torch.zeros_like(part[0], dtype=self._real) for part in (slots, norms))
            self._own = [(slots, self.slots), (norms, self._norms)]
            self._slot_sums = slots
        self._largest = self._like.new_zeros(1, dtype=torch.float64)
        self._one = torch.ones_like(self._largest)
        self._noise: Tensor | None = None

    def reset(self, cohort: int = 0) -> None:
        """Zero every sum and slot, for a round of `cohort` clients; how many is only read under privacy."""
        if self._mechanism is not None and cohort != len(self._norms):
            self._lay_out(cohort)
        self.bucket.zero_()
        for _, numbers in self._own:
            numbers.zero_()
        self._largest.zero_()
        # Of every sum, the noise and what this rank alone writes included.
        self._limit = limit(cohort + 2)
        self._noise = None
        self._block_sums.zero_()

    def add(
        self,
        up: Mapping[str, Tensor],
        weights: Sequence[float],
        blocks: Sequence[int | None],
        positions: Sequence[int],
    ) -> list[bool]:
        """Add the uploads `[C, size]` of clients with their weights, blocks, and positions in the cohort.

        Returns:
            Whether what each sent is finite; what is not is left out, as if the client had not come.
        """
        if self._mechanism is not None:
            return self._add_clipped(up, positions, self._mechanism)
        spoilt = self._group.sum((~_finite_rows(up)).to(self._real))
        finite = (spoilt == 0).tolist()
        # A client of weight 0 is not read, whatever it sent.
        heard = torch.tensor(weights, dtype=torch.float64).where(torch.tensor(finite), 0)
        everyone = heard.to(self._like.device)
        by_block = {
            block: heard.where(torch.tensor([other == block for other in blocks]), 0).to(self._like.device)
            for block in set(blocks)
            if block is not None
        }
        ones = self._like.new_ones(len(finite), 1)
        self._add(self._weight, ones, everyone)
        for block, members in by_block.items():
            self._add(self._block_weights[:, block : block + 1], ones, members)
        for name, wire in self._wires.items():
            scale = torch.clone if wire.reduce == "mean" else torch.sign
            rows = up[name]
            if wire.only_block:
                for block, members in by_block.items():
                    self._add(self._block_sum(name, block), rows[:, self._blocks[block]], scale(members))
                rows = rows[:, self._shared]
            self._add(self._sums[name], rows, scale(everyone))
        return finite

    def tally(self, slot: int, numbers: Tensor) -> None:
        """Add numbers of several clients `[C]` to a slot."""
        if self._exact:
            self._add(self._slot_sums[:, slot : slot + 1], numbers.unsqueeze(1), self._one)
        else:
            self.slots[slot] += numbers.sum()

    def _add(self, sums: Tensor, rows: Tensor, weights: Tensor) -> None:
        """Add weighted rows `[C, n]` to the sums `[words, n]`; rows of weight 0 are not read."""
        if self._exact:
            exact_add(sums, rows, weights, self._largest)
        else:
            accumulate(sums[0], rows, weights)

    def _total(self, sums: Tensor) -> Tensor:
        """The numbers `[...]` that sums `[words, ...]` stand for."""
        return value(sums) if self._exact else sums[0]

    def _block_sum(self, name: str, block: int) -> Tensor:
        sums = self._block_sums[self._messages[block]]
        return sums.view(self._words, len(self._sliced), -1)[:, self._sliced.index(name)]

    def _add_clipped(
        self, up: Mapping[str, Tensor], positions: Sequence[int], mechanism: GaussianMechanism
    ) -> list[bool]:
        """One norm over all wires: clipped apart, k wires would add up to √k C."""
        norms = torch.stack([square_sums(up[name]) for name in self._wires]).sum(0).sqrt()
        # A sum of squares shows NaN and infinity. Beyond 1e154 squares overflow too, and such a row is left out.
        finite = norms.isfinite()
        norms = torch.where(finite, norms, 0)
        self._norms[torch.tensor(positions, device=norms.device)] = norms.to(self._real)
        factors = torch.where(finite, mechanism.clip_factor(norms), 0)
        for name in self._wires:
            self._add(self._sums[name], up[name], factors)
        return finite.tolist()

    def add_noise(self, r: int) -> None:
        """Add the noise of round `r` to this rank's partial sums: on one rank alone, and once."""
        assert self._mechanism is not None
        self._noise = self._mechanism.noise(r, sum(self._sizes)).to(self._like.device, self._real)
        for sums, noise in zip(self._sums.values(), self._noise.split(self._sizes), strict=True):
            self._add(sums, noise.unsqueeze(0), self._one)

    def reduce(self, collectives: Collectives, holders: Sequence[Sequence[int]]) -> Vectors:
        """The aggregated wires, on every rank.

        Args:
            holders: per block the ranks that trained a client of it, ascending; only read for sliced wires.

        Raises:
            ExactSumError: on every rank, where one met a term too large.
        """
        for sums, numbers in self._own:
            self._add(sums, numbers.unsqueeze(0), self._one)
        if self._exact:
            self._refused += self._group.sum((self._largest >= self._limit).long())
        collectives.all_reduce(self.bucket)
        for sums, numbers in self._own:
            numbers.copy_(value(sums))
        if self._exact and self._refused.item():
            raise ExactSumError(
                f"reduction: exact takes numbers below {self._limit:g} from so many clients, times their weights, and "
                "a rank met a larger one; use reduction: fast"
            )
        if self._sliced:
            collectives.reduce_blocks(self._block_sums, self._messages, holders)
        self.weight = self._total(self._weight)
        weight = self.weight.clamp(min=torch.finfo(self._real).tiny)
        # A block without clients has sum 0 and weight 0: its mean is 0.
        block_weights = self._total(self._block_weights)
        block_weights = torch.where(block_weights > 0, block_weights, 1)
        agg: dict[str, Tensor] = {}
        for name, wire in self._wires.items():
            mean = wire.reduce == "mean"
            total = self._total(self._sums[name])
            if self._mechanism is not None:
                total = total / self._mechanism.divisor
            elif mean:
                total = total / weight
            if wire.only_block:
                shared, total = total, self._like.new_empty(self._layout.d)
                total[self._shared] = shared
                for b, block in enumerate(self._blocks):
                    part = self._total(self._block_sum(name, b))
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
        payload = torch.cat([self._total(sums) for sums in self._sums.values()])
        signal = float((payload - self._noise).norm())
        noise = self._mechanism.scale * math.sqrt(len(payload))
        return {
            "clipped_fraction": float((norms > self._mechanism.clip).double().mean()),
            **dict(zip(names, quantiles, strict=True)),
            "noise_to_signal": noise / signal if signal else math.inf,
        }


def _finite_rows(up: Mapping[str, Tensor]) -> Tensor:
    """Whether what each client sends is finite, `[C]`."""
    # A finite sum has finite terms. Another one may just have overflowed, which in float64 no sane update does.
    totals = torch.stack([value.sum(1) for value in up.values()])
    if not torch.isfinite(totals).all():
        totals = torch.stack([value.sum(1, dtype=torch.float64) for value in up.values()])
    return torch.isfinite(totals).all(0)


def protocol_bytes(
    algorithm_down: Sequence[str],
    server: Mapping[str, Tensor],
    wires: Mapping[str, Wire],
    layout: Layout,
    blocks: Sequence[int | None],
    itemsize: int,
    *,
    sampled: int | None = None,
) -> tuple[int, int]:
    """Bytes a real federation sends in a round, `(up, down)`.

    Args:
        blocks: of every client that reports, None where wires are whole.
        sampled: clients that the model was sent to; None for those that report.
    """
    up = 0
    for wire in wires.values():
        if wire.diagnostic:
            continue
        for block, clients in Counter(blocks).items():
            payload = wire.payload(layout, block)
            up += clients * (wire.codec.n_bytes(payload, itemsize) if wire.codec else payload.size * itemsize)
    down = sum(server[name].numel() for name in algorithm_down)
    return up, (len(blocks) if sampled is None else sampled) * down * itemsize
