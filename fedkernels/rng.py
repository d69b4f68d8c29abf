"""Randomness by derivation: every draw comes from (seed, purpose, round, client), so no generator state is saved."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream of random numbers is for; two purposes never share a stream."""

    MODEL = 1
    PARTITION = 0x9A7717  # it only has to differ from the others
    COHORT = 3
    BATCHES = 4
    BLOCKS = 5
    LABELS = 6
    DIAGNOSTICS = 0xD1A6
    NOISE = 0x1015E
    CODEC = 0xC0DEC


def stream(seed: int, purpose: Purpose, *index: int) -> np.random.Generator:
    """The generator for one purpose and index.

    Args:
        seed: of the run, not negative.
        purpose: what is drawn.
        index: which draw, such as round and client.

    Example:
        >>> bool(stream(0, Purpose.COHORT, 3).random() == stream(0, Purpose.COHORT, 3).random())
        True
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, purpose, *index))))
