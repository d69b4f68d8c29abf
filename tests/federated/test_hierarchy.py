"""Sums in nodes, then across nodes, on gloo ranks: against integers and exact sums of floats."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from rank_checks import LENGTHS, exact_in_levels, exact_on_ranks, refused_levels, sums_in_levels, terms_of
from support import on_ranks

from fedkernels.federated.hierarchy import levels

FLAT, TWO_LEVELS = ["all_reduce"], ["all_to_all_single", "all_reduce", "all_to_all_single"]
PAIRS = [0, 0, 1, 1]


# The node of every rank, the size of client groups, and how many nodes of how many ranks a shard is then summed over.
Layout = tuple[Sequence[int], int, tuple[int, int] | None]
LAYOUTS: list[list[Layout]] = [
    [
        (PAIRS, 1, (2, 2)),
        ([0, 1, 0, 1], 1, (2, 2)),
        ([0, 0, 0, 0], 1, None),
        ([0, 1, 2, 3], 1, None),
        (PAIRS, 2, None),  # one rank with each shard on a node
    ],
    [([0, 0, 0, 1, 1, 1], 1, (2, 3)), ([0, 0, 1, 1, 2, 2], 1, (3, 2))],
    [([0, 0, 0, 0, 1, 1, 1, 1], 2, (2, 2))],
]


@pytest.mark.parametrize("layouts", LAYOUTS, ids=["4 ranks", "6 ranks", "8 ranks"])
def test_sums(layouts: list[Layout]) -> None:
    world = len(layouts[0][0])
    ranks = on_ranks(world, sums_in_levels, [(nodes, shard_size) for nodes, shard_size, _ in layouts])
    for i, (_, shard_size, expected) in enumerate(layouts):
        for rank in range(world):
            found = ranks[rank][i]
            assert found["levels"] == expected
            peers = range(rank % shard_size, world, shard_size)
            for dtype in (torch.int64, torch.float64, torch.float32):
                for n in LENGTHS:
                    total, link_bytes, called = found[f"{dtype} {n}"]
                    check_sum(total, peers, n, dtype)
                    assert np.array_equal(total, ranks[peers[0]][i][f"{dtype} {n}"][0])
                    assert link_bytes == 2 * (world // shard_size - 1) * n * dtype.itemsize
                    assert called == (FLAT if expected is None else TWO_LEVELS)


def check_sum(total: np.ndarray, peers: Sequence[int], n: int, dtype: torch.dtype) -> None:
    terms = [terms_of(peer, n, dtype).tolist() for peer in peers]
    assert total.shape == (n,)
    for value, *each in zip(total.tolist(), *terms, strict=True):
        if dtype == torch.int64:
            assert value == (sum(each) + 2**63) % 2**64 - 2**63
        else:
            # One rounding fewer than terms, of partial sums no larger than those of magnitudes.
            bound = (len(each) - 1) * torch.finfo(dtype).eps / 2 * math.fsum(map(abs, each))
            assert abs(value - math.fsum(each)) <= 1.01 * bound


NAMES = ["fedavg", "scaffold", "fedbcgd", "dp_fedavg"]


@pytest.fixture(scope="module")
def rounds() -> dict[str, dict[Any, Any]]:
    """Two rounds of algorithms, flat and in levels."""
    return {
        "one": on_ranks(1, exact_on_ranks, NAMES)[0],
        "flat": on_ranks(4, exact_on_ranks, NAMES)[0],
        "levels": on_ranks(4, exact_in_levels, PAIRS, NAMES)[3],
    }


@pytest.mark.parametrize("name", NAMES)
def test_exact_rounds_have_the_same_bits(name: str, rounds: dict[str, dict[Any, Any]]) -> None:
    state, told, link_bytes = rounds["levels"][name, "exact"]
    for other in ("one", "flat"):
        assert np.array_equal(state, rounds[other][name, "exact"][0])
        assert told == rounds[other][name, "exact"][1]
    assert link_bytes == rounds["flat"][name, "exact"][2]


@pytest.mark.parametrize("name", NAMES)
def test_fast_rounds_agree_but_for_rounding(name: str, rounds: dict[str, dict[Any, Any]]) -> None:
    state, _, link_bytes = rounds["levels"][name, "fast"]
    np.testing.assert_allclose(state, rounds["one"][name, "fast"][0], rtol=1e-10, atol=1e-12)
    assert link_bytes == rounds["flat"][name, "fast"][2]


REFUSED = [
    ([0, 0, 0, 1], 1, r"as many ranks on every node, found ranks 3 on .+ \(node 0\), 1 on .+ \(node 1\); start"),
    ([0, 0, 1, 2], 1, r"found ranks 2 on .+ \(node 0\), 1 on .+ \(node 1\), 1 on .+ \(node 2\); start"),
    ([0, 1, 0, 2], 2, r"as many ranks of each of the 2 shards on every node"),
]


def test_uneven_nodes_are_refused_by_all() -> None:
    one, *others = on_ranks(4, refused_levels, [(nodes, shard_size) for nodes, shard_size, _ in REFUSED])
    assert others == [one] * 3
    for (_, _, expected), said in zip(REFUSED, one, strict=True):
        assert re.match(f"all_reduce: hierarchical .*{expected}", said), said


@pytest.mark.parametrize(("n_nodes", "per_node", "shard_size"), [(3, 4, 1), (3, 4, 2), (2, 6, 3), (4, 2, 4), (1, 4, 2)])
def test_levels_are_a_grid(n_nodes: int, per_node: int, shard_size: int) -> None:
    """A shard's ranks appear once inside nodes and once across, and a pair of them never in both."""
    nodes = [f"node{rank // per_node}" for rank in range(n_nodes * per_node)]
    inside, across = levels(nodes, shard_size)
    for level in (inside, across):
        assert sorted(rank for ranks in level for rank in ranks) == list(range(len(nodes)))
        assert all(len({rank % shard_size for rank in ranks}) == 1 for ranks in level)
    assert all(len({nodes[rank] for rank in ranks}) == 1 for ranks in inside)
    assert all(len({nodes[rank] for rank in ranks}) == len(ranks) for ranks in across)
    assert len({len(ranks) for ranks in inside}) == len({len(ranks) for ranks in across}) == 1
    assert len(inside[0]) * len(across[0]) * shard_size == len(nodes)
