"""Who trains when and where: learning rate, cohort, blocks, placement on ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from ..rng import Purpose, stream

LrSchedule = Literal["constant", "cosine", "exponential"]


def learning_rate(schedule: LrSchedule, lr: float, r: int, rounds: int) -> float:
    """The learning rate of a round: `constant` η, `cosine` `η/2 (1 + cos(πr/R))`, `exponential` `η·0.998^r`.

    Args:
        schedule: which of the three.
        lr: η.
        r: the round, from 0.
        rounds: R.

    Example:
        >>> [round(learning_rate("cosine", 0.2, r, 4), 3) for r in range(4)]
        [0.2, 0.171, 0.1, 0.029]
    """
    if schedule == "cosine":
        return lr / 2 * (1 + math.cos(math.pi * r / rounds))
    return lr * 0.998**r if schedule == "exponential" else lr


def sample_cohort(
    sampling: Literal["uniform", "poisson"], seed: int, r: int, population: int, cohort: int
) -> np.ndarray:
    """Client ids of round `r`, ascending, in time O(cohort).

    `uniform` draws `cohort` clients without replacement; `poisson` takes every client with probability
    `cohort / population` on its own, so the size varies and may be 0.

    Args:
        sampling: which of the two.
        seed: of the run.
        r: the round, from 0.
        population: all clients, N.
        cohort: clients to draw, at most N; under `poisson` their expected number.

    Example:
        >>> len(sample_cohort("uniform", 0, 0, 100, 10)), sample_cohort("uniform", 0, 0, 3, 3).tolist()
        (10, [0, 1, 2])
    """
    rng = stream(seed, Purpose.COHORT, r)
    size = cohort if sampling == "uniform" else int(rng.binomial(population, cohort / population))
    # Given its size, a Poisson sample is a uniform draw without replacement.
    return np.sort(rng.choice(population, size=size, replace=False, shuffle=False))


def assign_blocks(seed: int, r: int, cohort: int, n_blocks: int) -> np.ndarray:
    """A block for every position of the cohort `[S]`: counts differ by at most one, order and remainder shuffled.

    Args:
        seed: of the run.
        r: the round, from 0.
        cohort: clients in it, S.
        n_blocks: blocks to choose from, without the shared one.

    Example:
        >>> sorted(assign_blocks(0, 0, 6, 3).tolist())
        [0, 0, 1, 1, 2, 2]
    """
    rng = stream(seed, Purpose.BLOCKS, r)
    labels = rng.permutation(n_blocks)
    return labels[rng.permutation(cohort) % n_blocks]


def place(
    ids: Sequence[int],
    costs: Sequence[float],
    owners: Mapping[int, int],
    speeds: Sequence[float],
    *,
    slack: float = 0.1,
) -> list[list[int]]:
    """Positions of the cohort that each rank trains: greedy, longest first, earliest finish, with affinity.

    A client whose state lives on a rank stays there while that rank would end within `1 + slack` of the even share;
    otherwise it goes where it ends first, and its state moves.

    Args:
        ids: client ids of the cohort.
        costs: work of each client, in any unit.
        owners: rank that keeps a client's state, for clients that have one.
        speeds: work per second of each rank, in any unit.
        slack: by how much more than its even share a rank may have to do for clients to stay.

    Returns:
        Per rank the positions in `ids`, most expensive first.

    Example:
        >>> place([7, 8, 9], costs=[1, 5, 1], owners={}, speeds=[1, 1])
        [[1], [0, 2]]
    """
    ends = [0.0] * len(speeds)
    placed: list[list[int]] = [[] for _ in speeds]
    limit = (1 + slack) * sum(costs) / sum(speeds)
    for position in sorted(range(len(ids)), key=lambda p: (-costs[p], p)):
        cost = costs[position]
        rank = min(range(len(speeds)), key=lambda w: (ends[w] + cost / speeds[w], w))
        home = owners.get(ids[position])
        if home is not None and ends[home] + cost / speeds[home] <= max(limit, ends[rank] + cost / speeds[rank]):
            rank = home
        ends[rank] += cost / speeds[rank]
        placed[rank].append(position)
    return placed
