"""State that stays with each client between rounds, in memory or mapped files: O(clients seen), not O(population)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

PAGE_BYTES = 2**24


class ClientStore:
    """Rows `[d]` by name and client id; a client that was never stored reads as zeros.

    Rows lie in pages of about `PAGE_BYTES`. Once `memory_limit_bytes` of pages are held in memory, further pages
    are mapped from files in `directory`, and the operating system decides what of them stays in memory.

    Args:
        names: what is kept per client, each a vector `[d]`.
        directory: where mapped pages go; created when the first one is needed.

    Example:
        >>> store = ClientStore(("c_i",), 3, torch.float32, Path("unused"))
        >>> store.put([7], {"c_i": torch.ones(1, 3)})
        >>> store.get([7, 8])["c_i"].sum(1).tolist()
        [3.0, 0.0]
    """

    def __init__(
        self, names: Sequence[str], d: int, dtype: torch.dtype, directory: Path, memory_limit_bytes: float = 2**30
    ) -> None:
        self.names = tuple(names)
        self.width = len(self.names) * d
        self._d = d
        self.dtype = dtype
        self._directory = directory
        row_bytes = max(1, self.width * dtype.itemsize)
        self._rows_per_page = max(1, PAGE_BYTES // row_bytes)
        self._pages_in_memory = int(memory_limit_bytes // (self._rows_per_page * row_bytes))
        self._pages: list[Tensor] = []
        self._slots: dict[int, int] = {}
        self._free: list[int] = []

    @property
    def ids(self) -> list[int]:
        """Clients with a row, in slot order of first storage."""
        return list(self._slots)

    def row(self, client: int) -> Tensor:
        """The stored row `[len(names) * d]` itself, not a copy."""
        page, at = divmod(self._slots[client], self._rows_per_page)
        return self._pages[page][at]

    def get(self, clients: Sequence[int], device: torch.device | None = None) -> dict[str, Tensor]:
        """Copies `[C, d]` by name, zeros for clients never stored."""
        rows = torch.zeros(len(clients), self.width, dtype=self.dtype)
        for c, client in enumerate(clients):
            if client in self._slots:
                rows[c] = self.row(client)
        parts = rows.to(device or rows.device).unflatten(1, (len(self.names), self._d)).unbind(1)
        return dict(zip(self.names, parts, strict=True))

    def put(self, clients: Sequence[int], vectors: dict[str, Tensor]) -> None:
        """Store `[C, d]` vectors by name."""
        for c, client in enumerate(clients):
            target = self._new_row(client).view(len(self.names), self._d)
            for n, name in enumerate(self.names):
                target[n].copy_(vectors[name][c])

    def put_row(self, client: int, row: Tensor) -> None:
        """Store a whole row, as `row` returns it."""
        self._new_row(client).copy_(row)

    def drop(self, client: int) -> None:
        """Forget a client; its slot is reused."""
        self._free.append(self._slots.pop(client))

    def pages(self) -> Iterator[dict[str, Tensor]]:
        """The contents page by page, for checkpoints: `ids [n]` and `rows [n, len(names) * d]`."""
        by_slot = sorted((slot, client) for client, slot in self._slots.items())
        for page, members in itertools.groupby(by_slot, key=lambda item: item[0] // self._rows_per_page):
            slots, clients = zip(*members, strict=True)
            at = torch.tensor(slots) % self._rows_per_page
            yield {"ids": torch.tensor(clients), "rows": self._pages[page][at]}

    def _new_row(self, client: int) -> Tensor:
        if client not in self._slots:
            # With no free slot, slots 0 to len - 1 are all taken.
            slot = self._free.pop() if self._free else len(self._slots)
            if slot == len(self._pages) * self._rows_per_page:
                self._pages.append(self._new_page())
            self._slots[client] = slot
        return self.row(client)

    def _new_page(self) -> Tensor:
        shape = (self._rows_per_page, self.width)
        if len(self._pages) < self._pages_in_memory:
            return torch.empty(shape, dtype=self.dtype)
        self._directory.mkdir(parents=True, exist_ok=True)
        file = self._directory / f"page-{len(self._pages):06d}"
        n_bytes = shape[0] * shape[1] * self.dtype.itemsize
        with file.open("wb") as handle:
            # A full disk is an error here; written through a mapping it would be a bus error.
            os.posix_fallocate(handle.fileno(), 0, n_bytes)
        mapped = torch.from_file(str(file), shared=True, size=shape[0] * shape[1], dtype=self.dtype).view(shape)
        # The mapping keeps the pages alive; without a name they vanish with the process instead of littering the run.
        file.unlink()
        return mapped
