"""Work goes to ranks by the speeds they were seen to have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedkernels.federated.collectives import Collectives
from fedkernels.federated.placement import Placement
from fedkernels.federated.store import ClientStore

TWELVE = list(range(12))


def two_ranks(measured: bool) -> Placement:
    collectives = Collectives()
    collectives.world_size = 2
    return Placement(ClientStore((), 1, torch.float32, Path("unused")), collectives, measured=measured)


def shares(placement: Placement) -> list[int]:
    return [len(positions) for positions in placement.place(TWELVE, [1.0] * 12)]


@pytest.mark.parametrize(("measured", "expected"), [(True, [9, 3]), (False, [6, 6])])
def test_a_rank_three_times_as_slow_gets_a_third(measured: bool, expected: list[int]) -> None:
    placement = two_ranks(measured)
    assert shares(placement) == [6, 6]
    placement.note([2.0, 6.0], [6.0, 6.0])
    assert shares(placement) == expected


def test_a_speed_is_half_what_it_was_and_half_what_was_seen_last() -> None:
    placement = two_ranks(True)
    placement.note([1.0, 1.0], [8.0, 4.0])
    placement.note([1.0, 1.0], [2.0, 6.0])
    assert shares(placement) == [6, 6]  # (8 + 2) / 2 and (4 + 6) / 2


def test_rounds_in_which_a_rank_did_nothing_say_nothing() -> None:
    placement = two_ranks(True)
    placement.note([0.0, 6.0], [0.0, 6.0])
    assert shares(placement) == [6, 6]
