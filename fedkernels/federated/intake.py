"""What clients send, taken in: encoded, added to the round's sums, and their state kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .aggregate import Aggregator
from .codecs import Encoder
from .store import ClientStore

# The engine's own numbers in the bucket; busy seconds of every rank and work of every rank follow.
LOSS_SUM, LOSS_COUNT, CLIENTS, STEPS, DROPPED, LATE, STOP, N_SLOTS = range(8)


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What a batch of C clients sends.

    Args:
        up: `[C, size]` by wire.
        kept: what stays with the clients, `[C, d]` by name, as the round has left it.
        positions: of the clients in the cohort.
        ids: of the clients.
        blocks: of each, None where wires are whole.
        steps: K_i of each.
        loss_sum, loss_count: of their local steps, `[C]`.
    """

    up: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]
    positions: Sequence[int]
    ids: Sequence[int]
    blocks: Sequence[int | None]
    steps: Sequence[int]
    loss_sum: Tensor
    loss_count: Tensor


class Intake:
    """Takes uploads in, in the order of its calls.

    Args:
        encoder: of the wires.
        aggregator: of the round.
        store: of client state; the encoder's residuals are in it.
        sizes: samples of every client of the population, where means are weighted by them; None weights alike.
    """

    def __init__(self, encoder: Encoder, aggregator: Aggregator, store: ClientStore, sizes: np.ndarray | None) -> None:
        self._encoder, self._aggregator, self._store, self._sizes = encoder, aggregator, store, sizes

    def take(self, upload: Upload, r: int) -> list[str]:
        """Encode an upload of round `r`, add it up, and keep what stays with its clients.

        Returns:
            A line for each client that sent NaN or infinity.
        """
        ids, aggregator, up = upload.ids, self._aggregator, upload.up
        kept = dict(upload.kept)
        if self._encoder:
            up = self._encoder(up, ids, upload.blocks, r, kept)
        weights = [1.0] * len(ids) if self._sizes is None else self._sizes[list(ids)].astype(float).tolist()
        finite = aggregator.add(up, weights, upload.blocks, upload.positions)
        if self._store.names:
            for c, client in enumerate(ids):
                if finite[c]:
                    self._store.put([client], {name: kept[name][c : c + 1] for name in self._store.names})
                else:
                    self.missed([client])
        heard = torch.tensor(finite, device=upload.loss_sum.device)
        aggregator.tally(LOSS_SUM, torch.where(heard, upload.loss_sum, 0))
        aggregator.tally(LOSS_COUNT, torch.where(heard, upload.loss_count, 0))
        weighted = [w * k if sent else 0 for w, k, sent in zip(weights, upload.steps, finite, strict=True)]
        aggregator.tally(STEPS, aggregator.slots.new_tensor(weighted))
        aggregator.slots[CLIENTS] += sum(finite)
        return [
            f"client {client} sent NaN or infinity in round {r + 1}"
            for client, sent in zip(ids, finite, strict=True)
            if not sent
        ]

    def missed(self, ids: Sequence[int]) -> None:
        """Leave the state of clients that were not heard as it is."""
        if self._store.names:
            for client in ids:
                # Every client that has an owner has a row there, even one that was never heard.
                self._store.put([client], self._store.get([client]))
