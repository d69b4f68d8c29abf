"""Partitions against their definitions: cover, sizes, Dirichlet moments, determinism, errors; and their picture."""

from __future__ import annotations

import io
import time
from collections import Counter
from itertools import chain

import numpy as np
import pytest

from fedkernels.data import PARTITIONS
from fedkernels.data.partition import Dirichlet, Iid, Natural, Paper, Partition, Shards
from fedkernels.data.plot import partition_figure, partition_summary

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 120))
GROUPS = np.random.default_rng(1).integers(0, 30, 1200) * 7 - 3  # neither consecutive nor starting at zero


def rows(split: Partition) -> list[list[int]]:
    return [split[i].tolist() for i in range(len(split))]


@pytest.mark.parametrize("name", ["dirichlet", "iid", "shards", "natural"])
@pytest.mark.parametrize("clients", [1, 7, 30])
def test_every_sample_has_exactly_one_client(name: str, clients: int) -> None:
    split = PARTITIONS[name]().split(LABELS, GROUPS, clients, seed=3)
    assert sorted(chain.from_iterable(rows(split))) == list(range(1200))
    assert len(split) == clients
    assert split.sizes.tolist() == [len(row) for row in rows(split)]
    assert split.indices.dtype == split.offsets.dtype == np.int64
    assert min(split.sizes) >= 1


@pytest.mark.parametrize("name", ["dirichlet", "paper", "iid", "shards"])
def test_the_seed_decides(name: str) -> None:
    first, again, other = (rows(PARTITIONS[name]().split(LABELS, GROUPS, 12, seed)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_dirichlet_shares_have_the_moments_of_the_distribution() -> None:
    """Shares of one class over N clients: mean 1/N, variance (1/N)(1 - 1/N) / (N alpha + 1)."""
    clients, per_class = 5, 4000
    labels = np.repeat(np.arange(400), per_class)
    for alpha in (0.1, 1.0, 10.0):
        split = Dirichlet(alpha).split(labels, None, clients, seed=0)
        shares = np.stack([np.bincount(labels[row], minlength=400) for row in rows(split)]) / per_class
        variance = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
        np.testing.assert_allclose(shares.mean(1), 1 / clients, atol=4 * np.sqrt(variance / 400))
        np.testing.assert_allclose(shares.var(), variance, rtol=0.12)


def test_dirichlet_survives_a_tiny_alpha() -> None:
    split = Dirichlet(alpha=1e-5).split(LABELS, None, 4, seed=0)
    assert sorted(split.indices.tolist()) == list(range(1200))
    owners = [{i for i, row in enumerate(rows(split)) if c in LABELS[row]} for c in range(10)]
    assert sum(len(clients) == 1 for clients in owners) >= 8  # all but what the top-up moved


def test_top_up_takes_from_the_largest_clients_only() -> None:
    bare, topped = (Dirichlet(0.05, least).split(LABELS, None, 40, seed=2) for least in (1, 12))
    natural = np.bincount(LABELS)  # the untouched split of this seed: replay its draws by hand
    rng = np.random.Generator(np.random.Philox([2, 0x9A7717]))
    sizes = np.zeros(40, int)
    for n in natural:
        cuts = np.rint(np.cumsum(rng.dirichlet(np.full(40, 0.05)))[:-1] * n).astype(int)
        sizes += np.diff(cuts, prepend=0, append=n)
        rng.permutation(n)
    assert sizes.min() == 0
    for split, least in ((bare, 1), (topped, 12)):
        expected = sizes.tolist()  # brute force: one sample at a time from the largest to whoever lacks one
        while min(expected) < least:
            expected[expected.index(max(expected))] -= 1
            expected[expected.index(min(expected))] += 1
        assert sorted(split.sizes.tolist()) == sorted(expected)
        assert all(after == least for before, after in zip(sizes, split.sizes, strict=True) if before < least)


def test_paper_deals_equal_clients_from_recycled_pools() -> None:
    split = Paper(alpha=0.1).split(LABELS, None, 7, seed=0)
    assert split.sizes.tolist() == [1200 // 7] * 7
    for c in range(10):  # a pool is dealt whole before it is dealt again: use counts of a class differ by at most one
        uses = Counter(dict.fromkeys(np.flatnonzero(c == LABELS), 0))
        uses.update(i for i in split.indices if LABELS[i] == c)
        assert max(uses.values()) - min(uses.values()) <= 1
    assert len(set(split.indices.tolist())) < 1200
    assert max(Counter(split.indices.tolist()).values()) > 1


def test_paper_draws_class_shares_per_client() -> None:
    """Class shares of a client over C classes: variance (1/C)(1 - 1/C) / (C alpha + 1), plus multinomial noise."""
    labels, alpha, clients = np.repeat(np.arange(5), 80_000), 0.5, 800
    split = Paper(alpha).split(labels, None, clients, seed=1)
    shares = np.stack([np.bincount(labels[row], minlength=5) for row in rows(split)]) / 500
    prior = 0.2 * 0.8 / (5 * alpha + 1)
    np.testing.assert_allclose(shares.var(), prior + (0.16 - prior) / 500, rtol=0.08)


def test_iid_is_even_and_mixed() -> None:
    split = Iid().split(LABELS, None, 7, seed=0)
    assert sorted(split.sizes.tolist()) == [171] * 4 + [172] * 3
    counts = np.stack([np.bincount(LABELS[row], minlength=10) for row in rows(split)])
    assert counts.min() > 4
    assert counts.max() < 34


def test_shards_are_runs_of_the_sorted_labels() -> None:
    split = Shards(2).split(LABELS, None, 10, seed=4)  # 20 shards of 60: two to a class
    for row in rows(split):
        assert set(Counter(LABELS[row].tolist()).values()) <= {60, 120}
    uneven = Shards(3).split(LABELS, None, 7, seed=4)
    assert max(len(set(LABELS[row])) for row in rows(uneven)) <= 6  # a shard shorter than a class touches two at most


def test_natural_keeps_groups_whole_and_merges_round_robin() -> None:
    names = sorted(set(GROUPS.tolist()))
    for clients in (30, 8):
        split = Natural().split(LABELS, GROUPS, clients, seed=0)
        for i in range(clients):
            assert split[i].tolist() == np.flatnonzero(np.isin(GROUPS, names[i::clients])).tolist()


@pytest.mark.parametrize("name", ["iid", "natural"])
def test_a_million_clients_take_seconds(name: str) -> None:
    groups = np.random.default_rng(0).permutation(1_000_000)
    start = time.process_time()
    split = PARTITIONS[name]().split(np.zeros(1_000_000, np.int64), groups, 1_000_000, seed=0)
    assert time.process_time() - start < 2
    assert (split.sizes == 1).all()


@pytest.mark.parametrize(
    ("partition", "clients", "message"),
    [
        (Dirichlet(0.5, min_samples=200), 7, "7 clients with min_samples = 200 need 1400 samples.* has 1200"),
        (Dirichlet(0.01, min_samples=0), 500, r"client \d+ is left with no sample: 1200 samples for 500 clients"),
        (Paper(), 1201, "client 0 is left with no sample: 0 samples for 1201 clients"),
        (Iid(), 1201, "client 1200 is left with no sample: 1200 samples for 1201 clients"),
        (Shards(2), 601, "601 clients with 2 shards each need 1202 samples.* has 1200"),
        (Natural(), 31, "31 clients asked for: expected 1 to 30"),
    ],
)
def test_impossible_splits_say_why(partition: Dirichlet, clients: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition.split(LABELS, GROUPS, clients, seed=0)


def test_natural_needs_groups_and_a_partition_has_so_many_clients() -> None:
    with pytest.raises(ValueError, match="this one has none"):
        Natural().split(LABELS, None, 3, seed=0)
    with pytest.raises(IndexError, match="client 3 of 3"):
        Iid().split(LABELS, None, 3, seed=0)[3]


def test_summary_of_a_partition_by_hand() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    split = Partition(np.array([0, 2, 1, 0, 4, 5]), np.array([0, 2, 4, 6]))  # classes 0 1 | 0 0 | 2 2, sample 0 twice
    assert partition_summary(split, labels, 3) == pytest.approx(
        {
            "clients": 3,
            "samples": 6,
            "used_fraction": 5 / 6,
            "size_min": 2,
            "size_median": 2,
            "size_max": 2,
            "effective_classes": (2 + 1 + 1) / 3,
        }
    )


@pytest.mark.parametrize(("clients", "shown", "classes"), [(8, 8, 10), (250, 100, 10), (8, 8, 40)])
def test_figure_stacks_what_clients_own(clients: int, shown: int, classes: int) -> None:
    split = Dirichlet(0.5).split(LABELS, None, clients, seed=0)
    figure = partition_figure(split, LABELS, classes, title="digits")
    bars, histogram = figure.axes[:2]
    sizes = (
        split.sizes
        if shown == clients
        else np.sort(split.sizes)[np.linspace(0, clients - 1, shown).round().astype(int)]
    )
    patches = [patch for patch in bars.patches if hasattr(patch, "get_data")]
    stacks = np.stack([patch.get_data().values - patch.get_data().baseline for patch in patches])
    assert stacks.shape == (classes, shown)
    assert stacks.sum(0).tolist() == sizes.tolist()
    if shown == clients:
        assert stacks[3].tolist() == [(LABELS[row] == 3).sum() for row in rows(split)]
    assert sum(patch.get_width() for patch in histogram.patches) == clients
    assert bars.get_title(loc="left").startswith("digits")
    figure.savefig(stream := io.BytesIO(), format="png")
    assert stream.getvalue().startswith(b"\x89PNG")
