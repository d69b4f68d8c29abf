"""Which samples a client sees at every local step of a round."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..contract import Batch
from ..data.partition import Partition
from ..rng import Purpose, stream
from .objective import Objective, draw_crops


@dataclass(frozen=True)
class LocalWork:
    """How much a client does in a round: `K_i = min(local_steps, local_epochs · ⌈n_i / batch_size⌉)`.

    Raises:
        ValueError: neither steps nor epochs are given.
    """

    batch_size: int
    local_steps: int | None = None
    local_epochs: int | None = None

    def __post_init__(self) -> None:
        if self.local_steps is None and self.local_epochs is None:
            raise ValueError("how long clients train is not given: set local_steps, local_epochs or both")

    def steps(self, samples: np.ndarray) -> np.ndarray:
        """K_i for clients with that many samples."""
        steps = np.full(len(samples), np.iinfo(np.int64).max)
        if self.local_epochs is not None:
            steps = self.local_epochs * -(-samples // self.batch_size)
        return steps if self.local_steps is None else np.minimum(steps, self.local_steps)


class Batches:
    """Draws every client's mini-batches: shuffled epochs, the last batch of an epoch partial, nothing carried over."""

    def __init__(self, partition: Partition, objective: Objective, work: LocalWork, seed: int) -> None:
        self.partition = partition
        self.objective = objective
        self.work = work
        self.seed = seed

    def steps(self, clients: Sequence[int]) -> np.ndarray:
        """K_i of each client."""
        ids = np.asarray(clients, dtype=np.int64)
        return self.work.steps(self.partition.offsets[ids + 1] - self.partition.offsets[ids])

    def draw(self, clients: Sequence[int], r: int) -> Iterator[Batch]:
        """The mini-batches of `clients` in round `r`, step by step; those with fewer steps become inactive."""
        steps = self.steps(clients)
        shape = (len(clients), int(steps.max()), self.work.batch_size)
        indices, weights = self._padding(clients, shape), np.zeros(shape, dtype=np.float32)
        crops = np.zeros((*shape, 3), dtype=np.int64) if self.objective.augment else None
        for c, client in enumerate(clients):
            own, k = self.partition[client], int(steps[c])
            rng = stream(self.seed, Purpose.BATCHES, r, client)
            per_epoch = math.ceil(len(own) / shape[2])
            for first in range(0, k, per_epoch):
                count = min(per_epoch, k - first)
                order = own[rng.permutation(len(own))][: count * shape[2]]
                indices[c, first : first + count].reshape(-1)[: len(order)] = order
                weights[c, first : first + count].reshape(-1)[: len(order)] = 1
            if crops is not None:
                crops[c, :k] = draw_crops(rng, (k, shape[2]))
        return self._load(steps, indices, weights, crops)

    def sweep(self, clients: Sequence[int]) -> Iterator[Batch]:
        """Every sample of `clients` once, in the order of the partition and not augmented, in mini-batches."""
        sizes = self.partition.sizes[list(clients)]
        steps = -(-sizes // self.work.batch_size)
        shape = (len(clients), int(steps.max()), self.work.batch_size)
        indices, weights = self._padding(clients, shape), np.zeros(shape, dtype=np.float32)
        for c, (client, size) in enumerate(zip(clients, sizes.tolist(), strict=True)):
            indices[c].reshape(-1)[:size] = self.partition[client]
            weights[c].reshape(-1)[:size] = 1
        return self._load(steps, indices, weights, None)

    def _padding(self, clients: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
        """Every client's first sample: of weight 0, but 0 times infinity would let another's spoil its update."""
        first = self.partition.indices[self.partition.offsets[np.asarray(clients, dtype=np.int64)]]
        return np.broadcast_to(first[:, None, None], shape).astype(np.int64)

    def _load(
        self, steps: np.ndarray, indices: np.ndarray, weights: np.ndarray, crops: np.ndarray | None
    ) -> Iterator[Batch]:
        """Mini-batches of samples `indices [C, K, b]`, of which client `c` has the first `steps[c]`."""
        device = self.objective.device
        on_device = torch.from_numpy(indices).to(device)
        crops_on_device = None if crops is None else torch.from_numpy(crops).to(device)
        # A step whose active clients all have full batches needs no weights.
        alive = steps[:, None] > np.arange(indices.shape[1])
        full = (weights.min(2) > 0) | ~alive
        weights_on_device = None if full.all() else torch.from_numpy(weights).to(device, self.objective.dtype)
        for k in range(indices.shape[1]):
            inputs, targets = self.objective.train_batch(
                on_device[:, k], None if crops_on_device is None else crops_on_device[:, k]
            )
            yield Batch(
                inputs,
                targets,
                None if weights_on_device is None or full[:, k].all() else weights_on_device[:, k],
                None if alive[:, k].all() else torch.from_numpy(alive[:, k].copy()),
            )
