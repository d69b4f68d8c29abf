"""Which rank trains which client, by what it takes and how fast ranks are; kept state goes where its client does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .collectives import Collectives
from .schedule import place
from .store import ClientStore


class Placement:
    """Places the cohort of a round on ranks, and moves the state of clients to them.

    Args:
        store: of the clients that live on this rank.
        measured: go by the speeds that ranks had in earlier rounds; otherwise all count as equally fast.

    Attributes:
        owners: the rank that keeps a client's state, for clients that have any.
    """

    def __init__(self, store: ClientStore, collectives: Collectives, *, measured: bool) -> None:
        self.owners: dict[int, int] = {}
        self._store, self._collectives = store, collectives
        self._speeds = [1.0] * collectives.world_size
        self._measured, self._rounds = measured, 0

    def place(self, ids: Sequence[int], costs: Sequence[float]) -> list[list[int]]:
        """Positions in the cohort that each rank trains, most expensive first."""
        return place(ids, costs, self.owners, self._speeds)

    def move(self, ids: Sequence[int], placed: Sequence[Sequence[int]], device: torch.device) -> None:
        """Bring kept state to the ranks that train its clients, through `device`."""
        store, rank = self._store, self._collectives.rank
        if not store.names:
            return
        moves, moving = [], []
        for target, positions in enumerate(placed):
            for position in positions:
                source = self.owners.get(ids[position])
                if source is not None and source != target:
                    moves.append((source, target))
                    moving.append(ids[position])
                self.owners[ids[position]] = target
        outgoing = [store.row(i).to(device) for i, move in zip(moving, moves, strict=True) if move[0] == rank]
        incoming = [torch.empty(store.width, dtype=store.dtype, device=device) for move in moves if move[1] == rank]
        self._collectives.exchange(moves, store.width * store.dtype.itemsize, outgoing, incoming)
        arrived = iter(incoming)
        for client, (source, target) in zip(moving, moves, strict=True):
            if source == rank:
                store.drop(client)
            elif target == rank:
                store.put_row(client, next(arrived))

    def note(self, busy_s: Sequence[float], work: Sequence[float]) -> None:
        """Learn from a round how long each rank was busy, and with how much work."""
        if self._measured and all(s > 0 and w > 0 for s, w in zip(busy_s, work, strict=True)):
            speeds = [w / s for s, w in zip(busy_s, work, strict=True)]
            # What was assumed before the first round says nothing.
            known = self._rounds > 0
            self._speeds = [(v + m) / 2 if known else m for v, m in zip(self._speeds, speeds, strict=True)]
            self._rounds += 1
