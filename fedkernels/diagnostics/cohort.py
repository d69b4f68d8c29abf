"""One round of local training, watched: where clients end, what they send, how large their gradients are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract import Batch, Round, Vectors
from ..federated.engine import Engine, NonFiniteUpdateError
from ..federated.evaluators import Evaluator
from ..federated.task import LocalTask


@dataclass(frozen=True)
class TrainedCohort:
    """Clients after a round that the server did not see.

    Args:
        clients: ids, ascending, `[S]`.
        y: their models, `[S, d]`.
        up: what they send, `[S, size]` by wire.
        gradient_norms: of every mini-batch gradient they computed, before clipping.
    """

    clients: list[int]
    y: Tensor
    up: dict[str, Tensor]
    gradient_norms: Tensor


def train_cohort(engine: Engine, lr: float) -> TrainedCohort:
    """Train the cohort that is next in turn from the server's state; engine, server and kept state stay as they are.

    Args:
        lr: η_r of this round; a schedule may have none left.

    Raises:
        ValueError: the cohort is empty, as a Poisson sample may be.
        NonFiniteUpdateError: a client sent NaN or infinity.
    """
    ids, blocks = engine.draw_cohort()
    if not ids:
        raise ValueError(f"no client was sampled for round {engine.round + 1}: there is no update to look at")
    evaluator = _Watching(engine.evaluator)
    assert engine.choice is not None
    together = engine.choice.clients_per_batch
    nominal = engine.nominal_round(len(ids), lr)
    parts = [slice(first, first + together) for first in range(0, len(ids), together)]
    batches = [_train(engine, ids[part], blocks[part], nominal, evaluator) for part in parts]
    ys, ups = zip(*batches, strict=True)
    up = {name: torch.cat([part[name] for part in ups]) for name in engine.wires}
    y = torch.cat(ys)
    finite = torch.isfinite(torch.stack([value.sum(1, dtype=torch.float64) for value in (y, *up.values())])).all(0)
    if bad := [client for client, good in zip(ids, finite.tolist(), strict=True) if not good]:
        raise NonFiniteUpdateError(f"client {bad[0]} ends local training at NaN or infinity with lr {lr:g}")
    return TrainedCohort(ids, y, up, torch.cat(evaluator.norms))


def _train(
    engine: Engine, ids: Sequence[int], blocks: Sequence[int | None], nominal: Round, evaluator: Evaluator
) -> tuple[Tensor, dict[str, Tensor]]:
    x, algorithm = engine.server.x, engine.algorithm
    stored = engine.store.get(ids, x.device)
    keep = Vectors({name: stored[name] for name in algorithm.keep}, what="the client's kept state")
    g = x.new_empty(len(ids), engine.layout.d)
    task = _WatchedTask(engine.layout, engine.batches, ids, blocks, nominal, evaluator, g, engine.settings.clip_norm)
    with engine.kernels.use():
        up = algorithm.client(engine.down(), keep, task)
    return task.y, up


class _WatchedTask(LocalTask):
    """A task that remembers where training ended."""

    y: Tensor

    def trained(self, y: Tensor) -> None:
        self.y = y.detach().clone()


class _Watching:
    """An evaluator that remembers the norms of its gradients."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self.norms: list[Tensor] = []

    def __call__(self, y: Tensor, batch: Batch, g: Tensor) -> Tensor:
        losses = self._evaluator(y, batch, g)
        norms = torch.linalg.vector_norm(g, dim=1)
        self.norms.append(norms if batch.active is None else norms[batch.active.to(norms.device)])
        return losses
