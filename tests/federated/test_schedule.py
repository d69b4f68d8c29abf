"""Learning rates, cohorts, blocks and placement: closed forms, statistics and brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from fedkernels.federated.schedule import assign_blocks, learning_rate, place, sample_cohort

ROUNDS, POPULATION, COHORT = 4000, 20, 5
Q = COHORT / POPULATION


def test_cosine() -> None:
    rates = [learning_rate("cosine", 0.4, r, 8) for r in range(8)]
    assert rates[0] == 0.4
    assert rates[4] == pytest.approx(0.2, rel=1e-15)
    # The cosines of r and R - r cancel, r = 0 is left.
    assert sum(rates) == pytest.approx(0.4 / 2 * (8 + 1), rel=1e-14)
    assert rates == sorted(rates, reverse=True)
    assert rates[2] == pytest.approx(0.2 * (1 + math.sqrt(0.5)), rel=1e-15)
    assert min(rates) > 0


def test_exponential_and_constant() -> None:
    rates = [learning_rate("exponential", 0.4, r, 8) for r in range(300)]
    assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([0.998] * 299, rel=1e-13)
    assert rates[0] == 0.4
    assert {learning_rate("constant", 0.4, r, 8) for r in range(9)} == {0.4}


@pytest.fixture(scope="module", params=["uniform", "poisson"])
def draws(request: pytest.FixtureRequest) -> tuple[str, list[np.ndarray]]:
    return request.param, [sample_cohort(request.param, 1, r, POPULATION, COHORT) for r in range(ROUNDS)]


def assert_binomial(counts: np.ndarray, trials: int, probability: float) -> None:
    """Every count within five standard deviations of its mean."""
    assert np.abs(counts - trials * probability).max() < 5 * math.sqrt(trials * probability * (1 - probability))


def test_cohorts_are_distinct_clients_in_order(draws: tuple[str, list[np.ndarray]]) -> None:
    for ids in draws[1]:
        assert (np.diff(ids) > 0).all()
        assert ((ids >= 0) & (ids < POPULATION)).all()


def test_sizes(draws: tuple[str, list[np.ndarray]]) -> None:
    sizes = np.array([len(ids) for ids in draws[1]])
    if draws[0] == "uniform":
        assert set(sizes) == {COHORT}
    else:
        expected = [math.comb(POPULATION, n) * Q**n * (1 - Q) ** (POPULATION - n) for n in range(POPULATION + 1)]
        for n, probability in enumerate(expected):
            assert abs((sizes == n).sum() - ROUNDS * probability) < 5 * math.sqrt(ROUNDS * probability) + 1
        assert (sizes == 0).any()


def test_clients_are_drawn_alike(draws: tuple[str, list[np.ndarray]]) -> None:
    taken = np.zeros((ROUNDS, POPULATION), dtype=np.int64)
    for r, ids in enumerate(draws[1]):
        taken[r, ids] = 1
    assert_binomial(taken.sum(0), ROUNDS, Q)
    pairs = (taken.T @ taken)[np.triu_indices(POPULATION, 1)]
    together = Q * (COHORT - 1) / (POPULATION - 1) if draws[0] == "uniform" else Q * Q
    assert_binomial(pairs, ROUNDS, together)
    # Rounds are independent.
    assert_binomial((taken[1:] * taken[:-1]).sum(0), ROUNDS - 1, Q * Q)


@pytest.mark.parametrize("sampling", ["uniform", "poisson"])
def test_a_cohort_depends_on_seed_and_round_alone(sampling: Any) -> None:
    def draw(seed: int, r: int) -> list[int]:
        return sample_cohort(sampling, seed, r, 1000, 100).tolist()

    assert draw(1, 2) == draw(1, 2)
    assert len({tuple(draw(seed, r)) for seed in range(3) for r in range(3)}) == 9


def test_everyone_and_no_one() -> None:
    assert sample_cohort("uniform", 0, 0, 7, 7).tolist() == list(range(7))
    assert sample_cohort("poisson", 0, 0, 7, 7).tolist() == list(range(7))


def test_a_huge_population_costs_nothing() -> None:
    """An array of the population would take 8 TB."""
    ids = sample_cohort("uniform", 0, 0, 10**12, 3)
    assert len(set(ids.tolist())) == 3


@pytest.mark.parametrize(("cohort", "n_blocks"), [(6, 3), (7, 3), (2, 3), (5, 1), (1, 4), (100, 7)])
def test_blocks_are_balanced(cohort: int, n_blocks: int) -> None:
    for r in range(20):
        blocks = assign_blocks(0, r, cohort, n_blocks)
        counts = np.bincount(blocks, minlength=n_blocks)
        assert (len(blocks), len(counts)) == (cohort, n_blocks)
        assert counts.max() - counts.min() <= 1
        assert np.array_equal(blocks, assign_blocks(0, r, cohort, n_blocks))


def test_blocks_are_shuffled() -> None:
    """Every position gets every block alike, and so does the block that one more client gets."""
    blocks = np.stack([assign_blocks(5, r, 7, 3) for r in range(ROUNDS)])
    for b in range(3):
        assert_binomial((blocks == b).sum(0), ROUNDS, 1 / 3)
    larger = np.array([np.bincount(row, minlength=3).argmax() for row in blocks])
    assert_binomial(np.bincount(larger), ROUNDS, 1 / 3)


def ends(placed: list[list[int]], costs: list[float], speeds: list[float]) -> list[float]:
    return [sum(costs[p] for p in positions) / speed for positions, speed in zip(placed, speeds, strict=True)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("speeds", [[1.0], [1.0, 1.0], [1.0, 1.0, 1.0], [3.0, 1.0], [0.5, 2.0, 1.0]])
def test_placement_is_close_to_the_best(seed: int, speeds: list[float]) -> None:
    """Longest first ends within 4/3 of the best for equal ranks, within 2 for any."""
    costs = np.random.default_rng(seed).integers(1, 30, 7).astype(float).tolist()
    placed = place(list(range(7)), costs, {}, speeds)
    assert sorted(p for positions in placed for p in positions) == list(range(7))
    for positions in placed:
        assert [costs[p] for p in positions] == sorted((costs[p] for p in positions), reverse=True)
    best = min(
        max(ends([[p for p in range(7) if ranks[p] == w] for w in range(len(speeds))], costs, speeds))
        for ranks in itertools.product(range(len(speeds)), repeat=7)
    )
    assert max(ends(placed, costs, speeds)) <= best * (4 / 3 if len(set(speeds)) == 1 else 2) + 1e-12


@pytest.mark.parametrize(
    ("costs", "speeds", "expected"),
    [
        ([4, 3, 2, 1], [1, 1], [[0, 3], [1, 2]]),
        ([1, 1, 1, 1], [1, 1], [[0, 2], [1, 3]]),
        ([1, 5, 1], [1, 1], [[1], [0, 2]]),
        ([1, 1, 1], [2, 1], [[0, 1], [2]]),
        ([], [1, 1], [[], []]),
        ([7], [1, 10], [[], [0]]),
    ],
)
def test_placement_by_hand(costs: list[float], speeds: list[float], expected: list[list[int]]) -> None:
    assert place(list(range(len(costs))), costs, {}, speeds) == expected


def test_clients_stay_with_their_state_within_the_slack() -> None:
    costs, ids = [1.0] * 20, list(range(100, 120))
    owners = {100 + p: (p < 9) * 1 for p in range(20)}  # 11 on rank 0, 9 on rank 1: within 10 % of even
    placed = place(ids, costs, owners, [1.0, 1.0])
    assert {ids[p]: w for w, positions in enumerate(placed) for p in positions} == owners


def test_clients_leave_an_overfull_rank() -> None:
    costs, ids = [1.0] * 20, list(range(20))
    placed = place(ids, costs, dict.fromkeys(ids, 1), [1.0, 1.0])
    # Rank 1 keeps what ends within 1.1 of the even share of 10.
    assert [len(positions) for positions in placed] == [9, 11]
    assert [len(positions) for positions in place(ids, costs, dict.fromkeys(ids, 1), [1.0, 1.0], slack=0)] == [10, 10]
    assert [len(positions) for positions in place(ids, costs, dict.fromkeys(ids, 1), [1.0, 1.0], slack=1)] == [0, 20]
