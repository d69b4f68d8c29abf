"""How gradients are computed: measured by the first rank where the settings leave it open, and agreed on by all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from ..contract import Batch
from .batches import Batches
from .collectives import Collectives
from .evaluators import Choice, Evaluator, choose
from .settings import EngineSettings


def settle(
    settings: EngineSettings,
    x: Tensor,
    batches: Batches,
    make: Callable[[Choice], Evaluator],
    collectives: Collectives,
    secret: int | None,
) -> tuple[Choice, int | None]:
    """Choose an evaluator on the largest of the first clients; the same on every rank.

    Args:
        x: `[d]`, the server model.
        make: an evaluator from a choice.
        secret: a number of the first rank that the others are told along the way.

    Raises:
        ValueError: on every rank, where the settings say `batched` and the model cannot be batched over clients.
    """
    most = -(-settings.cohort // collectives.world_size)
    sizes = batches.partition.sizes
    largest = np.argsort(-sizes[: 4 * most], kind="stable")[:most]

    def sample(clients: int) -> Batch:
        return next(iter(batches.draw(largest[:clients].tolist(), 0)))

    mine: Choice | ValueError | None = None
    if collectives.leader:
        try:
            mine = choose(settings.evaluator, settings.clients_per_batch, most, x, sample, make)
        except ValueError as error:
            mine = error
    decided, secret = collectives.gather((mine, secret))[0]
    if isinstance(decided, ValueError):
        raise decided
    assert decided is not None
    return decided, secret
