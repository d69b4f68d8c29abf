"""The local work of a batch of clients: their mini-batches, clipped gradients and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..contract import Batch, Round
from ..layout import Layout
from ..rng import Purpose, stream
from .batches import Batches
from .evaluators import Evaluator


class LocalTask:
    """`Task` for the clients of one batch, see `fedkernels.contract`.

    Args:
        g: `[C, d]`, memory for gradients.
        check: called before every local step, to raise where there is to be no further one.

    Attributes:
        steps_begun: local steps that were begun, summed over clients.
    """

    def __init__(
        self,
        layout: Layout,
        batches: Batches,
        clients: Sequence[int],
        blocks: Sequence[int | None],
        r: Round,
        evaluator: Evaluator,
        g: Tensor,
        clip_norm: float,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.layout = layout
        self.round = r
        self.lr = r.lr
        self._clients = clients
        self._blocks = blocks
        self._sources = batches
        self._batches = batches.draw(clients, r.index)
        self._evaluator = evaluator
        self._g = g
        self._clip_norm = clip_norm
        self._check = check
        self._k = 0
        self._counted: Batch | None = None
        self._steps = batches.steps(clients)
        self.steps = torch.as_tensor(self._steps, dtype=g.dtype, device=g.device)[:, None]
        self.loss_sum = torch.zeros(len(clients), dtype=g.dtype, device=g.device)
        self.loss_count = torch.zeros_like(self.loss_sum)

    def batches(self) -> Iterator[Batch]:
        for batch in self._batches:
            if self._check is not None:
                self._check()
            self._k += 1
            yield batch

    @property
    def steps_begun(self) -> int:
        return int(self._steps.clip(max=self._k).sum())

    def grad(self, y: Tensor, batch: Batch) -> Tensor:
        losses = self._evaluator(y, batch, self._g)
        if batch is not self._counted:  # a second gradient on a batch is at a perturbed point
            self._counted = batch
            active = None if batch.active is None else batch.active.to(losses.device)
            self.loss_sum += losses if active is None else torch.where(active, losses, 0)
            self.loss_count += 1 if active is None else active
        return self._clip(self._g)

    def full_grad(self, y: Tensor) -> Tensor:
        total = torch.zeros_like(self._g)
        sizes = self._sources.partition.sizes[list(self._clients)]
        samples = torch.as_tensor(sizes, dtype=total.dtype, device=total.device)
        for batch in self._sources.sweep(self._clients):
            self._evaluator(y, batch, self._g)
            counted = batch.targets.shape[1] if batch.weights is None else batch.weights.sum(1)
            part = self._g.mul_((counted / samples)[:, None])
            if batch.active is not None:  # their rows are undefined
                part = torch.where(batch.active.to(y.device)[:, None], part, 0)
            total.add_(part)
        return self._clip(total)

    @property
    def sent(self) -> Tensor:
        sent = torch.ones_like(self._g, dtype=torch.bool)
        for row, block in zip(sent, self._blocks, strict=True):
            if block is not None:
                row[: self.layout.block(self.layout.n_blocks).start] = False
                row[self.layout.block(block)] = True
        return sent

    def _clip(self, g: Tensor) -> Tensor:
        """Clip the rows of `g [C, d]`, in place."""
        if self._clip_norm != float("inf"):
            norms = self.layout.norms(g)
            # On a CPU a look at the norms is cheaper than scaling by one; on a GPU it would stop the queue.
            if g.is_cuda or bool((norms > self._clip_norm).any()):
                g.mul_((self._clip_norm / norms).clamp_(max=1))
        return g

    def trained(self, y: Tensor) -> None:
        """Nothing: what a round needs of `y` is in what the client sends. Diagnostics look at it here."""

    def sampled_grad(self, y: Tensor, batch: Batch, k: int) -> tuple[Tensor, Tensor]:
        shape = batch.targets.shape[1:]
        draws = [
            stream(self._sources.seed, Purpose.LABELS, self.round.index, i, k).random(shape) for i in self._clients
        ]
        quantiles = torch.from_numpy(np.stack(draws)).to(y.device, y.dtype)
        g = torch.empty_like(self._g)  # the gradient proper is still in use
        self._evaluator(y, replace(batch, targets=quantiles), g)
        if batch.weights is None:
            return g, torch.full_like(self.steps, shape.numel())
        return g, batch.weights.sum(1, keepdim=True) * shape[1:].numel()
