"""`reduction: exact` on 1, 2 and 4 ranks: in float64 too, server states and losses are equal to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES
from rank_checks import exact_on_ranks, too_large_on_ranks
from shard_checks import exact_in_groups, too_large_in_groups
from support import on_ranks

from fedkernels.config import Config, ConfigError, load
from fedkernels.federated.aggregate import Aggregator
from fedkernels.federated.collectives import Collectives
from fedkernels.federated.intake import N_SLOTS

NAMES = ["fedavg", "scaffold", "fedadamw", "fedbcgd", "dp_fedavg"]


@pytest.fixture(scope="module")
def found() -> dict[int, dict[Any, Any]]:
    return {ranks: on_ranks(ranks, exact_on_ranks, NAMES)[0] for ranks in (1, 2, 4)}


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_ranks_gives_the_same_bits(name: str, found: dict[int, dict[Any, Any]]) -> None:
    state, told, _ = found[1][name, "exact"]
    for ranks in (2, 4):
        other, told_there, _ = found[ranks][name, "exact"]
        assert np.array_equal(state, other)
        assert told == told_there


def test_floating_point_sums_do_not(found: dict[int, dict[Any, Any]]) -> None:
    """Or the test above would say nothing."""
    assert any(
        not np.array_equal(found[1][name, "fast"][0], found[ranks][name, "fast"][0])
        for name in NAMES
        for ranks in (2, 4)
    )


@pytest.mark.parametrize("name", NAMES)
def test_exact_and_fast_agree_but_for_rounding(name: str, found: dict[int, dict[Any, Any]]) -> None:
    np.testing.assert_allclose(found[1][name, "exact"][0], found[1][name, "fast"][0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_twice_the_link_bytes(name: str, ranks: int, found: dict[int, dict[Any, Any]]) -> None:
    """Two integers for a float64, and the count of ranks that met too large a number; no state moves in round 1."""
    exact, fast = (found[ranks][name, reduction][2] for reduction in ("exact", "fast"))
    assert exact == 2 * fast + 2 * (ranks - 1) * 8


def test_the_size_of_the_bucket() -> None:
    engine = CASES["fedavg"].engine(reduction="exact")
    assert engine._aggregator.bucket.dtype == torch.int64
    assert engine._aggregator.bucket.numel() == 2 * (N_SLOTS + 2 + 1 + engine.layout.d) + 1


def test_who_meets_too_large_a_number_ends_all() -> None:
    one, other = on_ranks(2, too_large_on_ranks)
    assert one == other
    assert "a rank met a larger one; use reduction: fast" in one


GROUPED = ["fedavg", "scaffold", "fedadamw", "fedmuon"]


@pytest.fixture(scope="module")
def in_groups() -> dict[int, list[dict[str, Any]]]:
    """What the ranks of one, two and three groups of two find."""
    return {groups: on_ranks(2 * groups, exact_in_groups, GROUPED) for groups in (1, 2, 3)}


def same_bits(one: Any, other: Any) -> bool:
    state, _, losses = one
    return losses == other[2] and all(value.tobytes() == other[0][key].tobytes() for key, value in state.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GROUPED)
def test_any_number_of_groups_gives_the_same_bits(
    name: str, dtype: torch.dtype, in_groups: dict[int, list[dict[str, Any]]]
) -> None:
    run = f"{name} {dtype} exact"
    model = in_groups[1][0][run][1]
    assert model
    for groups in (2, 3):
        for rank in in_groups[groups]:
            assert same_bits(in_groups[1][rank["shard"]][run], rank[run])
        final = in_groups[groups][0][run][1]
        assert {key: value.tobytes() for key, value in final.items()} == {k: v.tobytes() for k, v in model.items()}


def test_floating_point_sums_of_groups_do_not(in_groups: dict[int, list[dict[str, Any]]]) -> None:
    runs = [f"{name} torch.float64 fast" for name in GROUPED]
    assert not all(same_bits(in_groups[1][0][run], in_groups[2][0][run]) for run in runs)


def test_one_shard_that_meets_too_large_a_number_ends_all() -> None:
    (told,) = set(on_ranks(4, too_large_in_groups))
    assert "a rank met a larger one; use reduction: fast" in told


def test_a_round_can_follow_another() -> None:
    """What the first one summed is gone."""
    engine = CASES["fedavg"].engine(reduction="exact")
    aggregator: Aggregator = engine._aggregator
    for _ in range(2):
        aggregator.reset(1)
        up = {"delta": torch.full((1, engine.layout.d), 0.1, dtype=torch.float64)}
        aggregator.add(up, [2.5], [None], [0])
        aggregator.slots[3] = 7.5
        agg = aggregator.reduce(Collectives(), [[0]])
        assert aggregator.slots[3].item() == 7.5
        torch.testing.assert_close(agg.delta, torch.full_like(agg.delta, 0.1), rtol=2e-16, atol=0)


def test_exact_sums_of_float32_are_refused() -> None:
    common = {"algorithm": "fedavg", "model": "mlp", "data": "digits", "partition": "iid", "run_dir": "unused"}
    sizes = {"clients": 4, "cohort": 2, "rounds": 1, "batch_size": 8, "lr": 0.1, "local_steps": 1}
    assert isinstance(load(None, common | sizes | {"reduction": "exact"}), Config)
    with pytest.raises(ConfigError, match="reduce_dtype: float32, expected float64 with reduction: exact"):
        load(None, common | sizes | {"reduction": "exact", "reduce_dtype": "float32"})
