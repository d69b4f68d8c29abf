"""Partitions: which client owns which training samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ..rng import Purpose, stream

Ints = NDArray[np.int64]
Alpha = Annotated[float, Field(gt=0, lt=math.inf)]


@dataclass(frozen=True, eq=False)
class Partition:
    """Client `i` owns `indices[offsets[i]:offsets[i + 1]]` of the training set.

    Args:
        indices: int64 `[m]`, positions in the training set.
        offsets: int64 `[N + 1]`, from 0 to m.

    Example:
        >>> split = Partition(np.array([4, 1, 0]), np.array([0, 2, 3]))
        >>> len(split), split[0].tolist(), split.sizes.tolist()
        (2, [4, 1], [2, 1])
    """

    indices: Ints
    offsets: Ints

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> Ints:
        if not 0 <= i < len(self):
            raise IndexError(f"client {i} of {len(self)}")
        return self.indices[self.offsets[i] : self.offsets[i + 1]]

    @property
    def sizes(self) -> Ints:
        """Samples per client, `[N]`."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Dirichlet:
    """Disjoint Dirichlet label skew: every sample used once, each class spread over clients by Dir(alpha).

    For each class `c`, `q_c ~ Dir(alpha)` over clients, and client `i` gets the share `q_c[i]` of the class. Clients
    left below `min_samples` are topped up from the largest ones.

    Args:
        alpha: concentration; towards 0 every class sits at one client, towards ∞ the split is IID.
        min_samples: what every client has at least.

    Reference: Yurochkin et al., 2019 (arXiv 1905.12022).
    """

    alpha: Alpha = 0.6
    min_samples: Annotated[int, Field(ge=0)] = 1

    def split(self, labels: np.ndarray, groups: np.ndarray | None, clients: int, seed: int) -> Partition:
        """Assign the samples with these `labels [n]` to `clients`.

        Args:
            labels: `[n]`, what the skew is over: a class, or a topic.
            groups: `[n]`, natural clients; only `Natural` looks at them.
            clients: N, at least 1.
            seed: of the run, not negative.

        Raises:
            ValueError: fewer samples than `min_samples` for every client, or a client left with none.

        Example:
            >>> split = Dirichlet(alpha=0.5).split(np.arange(100) % 10, None, clients=4, seed=0)
            >>> len(split), int(split.sizes.sum())
            (4, 100)
        """
        n = len(labels)
        if clients * self.min_samples > n:
            raise ValueError(
                f"{clients} clients with min_samples = {self.min_samples} need {clients * self.min_samples} samples, "
                f"the training set has {n}"
            )
        rng = stream(seed, Purpose.PARTITION)
        owner = np.empty(n, np.int64)
        for members in _by_class(labels):
            shares = rng.dirichlet(np.full(clients, self.alpha))
            cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            counts = np.diff(cuts, prepend=0, append=len(members))
            owner[rng.permutation(members)] = np.repeat(np.arange(clients), counts)
        order = rng.permutation(n)
        return _partition(order, _top_up(owner[order], clients, self.min_samples), clients)


@dataclass(frozen=True)
class Paper:
    """The papers' splitter: equal-sized clients filled from recycled class pools, so samples repeat or go unused.

    Client `j` draws `q_j ~ Dir(alpha)` over classes, then `n // clients` samples whose classes follow `q_j`; a class
    pool that runs out is reshuffled and dealt again.

    Args:
        alpha: concentration; towards 0 a client has one class, towards ∞ all alike.

    Reference: Hsu et al., 2019 (arXiv 1909.06335), but with recycling.
    """

    alpha: Alpha = 0.6

    def split(self, labels: np.ndarray, groups: np.ndarray | None, clients: int, seed: int) -> Partition:
        """Assign the samples with these `labels [n]` to `clients`.

        Raises:
            ValueError: fewer samples than clients.

        Example:
            >>> Paper().split(np.arange(100) % 10, None, clients=4, seed=0).sizes.tolist()
            [25, 25, 25, 25]
        """
        rng, pools = stream(seed, Purpose.PARTITION), _by_class(labels)
        counts = rng.multinomial(len(labels) // clients, rng.dirichlet(np.full(len(pools), self.alpha), clients))
        dealt, owner = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for pool, count in zip(pools, counts.T, strict=True):
            decks = -(-int(count.sum()) // len(pool))
            dealt.append(rng.permuted(np.tile(pool, (decks, 1)), axis=1).ravel()[: count.sum()])
            owner.append(np.repeat(np.arange(clients), count))
        return _partition(np.concatenate(dealt), np.concatenate(owner), clients)


@dataclass(frozen=True)
class Iid:
    """A uniformly random split in which client sizes differ by at most one."""

    def split(self, labels: np.ndarray, groups: np.ndarray | None, clients: int, seed: int) -> Partition:
        """Assign the samples with these `labels [n]` to `clients`.

        Raises:
            ValueError: fewer samples than clients.

        Example:
            >>> sorted(Iid().split(np.zeros(7), None, clients=3, seed=0).sizes.tolist())
            [2, 2, 3]
        """
        order = stream(seed, Purpose.PARTITION).permutation(len(labels))
        return _partition(order, np.repeat(np.arange(clients), _even(len(labels), clients)), clients)


@dataclass(frozen=True)
class Shards:
    """Pathological skew: samples sorted by label, cut in equal shards, a few shards dealt to each client.

    Args:
        shards_per_client: shards each client is dealt, so about as many classes.

    Reference: McMahan et al., 2017 (arXiv 1602.05629), section 3.
    """

    shards_per_client: Annotated[int, Field(ge=1)] = 2

    def split(self, labels: np.ndarray, groups: np.ndarray | None, clients: int, seed: int) -> Partition:
        """Assign the samples with these `labels [n]` to `clients`.

        Raises:
            ValueError: fewer samples than shards.

        Example:
            >>> Shards().split(np.arange(12) % 3, None, clients=3, seed=0).sizes.tolist()
            [4, 4, 4]
        """
        rng, shards = stream(seed, Purpose.PARTITION), clients * self.shards_per_client
        if shards > len(labels):
            raise ValueError(
                f"{clients} clients with {self.shards_per_client} shards each need {shards} samples, the training set "
                f"has {len(labels)}"
            )
        order = rng.permutation(len(labels))
        order = order[np.argsort(labels[order], kind="stable")]
        dealt = rng.permutation(shards) // self.shards_per_client
        return _partition(order, np.repeat(dealt, _even(len(labels), shards)), clients)


@dataclass(frozen=True)
class Natural:
    """The dataset's own clients (writers, topics, sites); with fewer clients than groups, groups merge round-robin."""

    def split(self, labels: np.ndarray, groups: np.ndarray | None, clients: int, seed: int) -> Partition:
        """Assign the samples with these `groups [n]` to `clients`: the g-th group goes to client `g % clients`.

        Raises:
            ValueError: a dataset without natural clients, or with fewer than `clients`.

        Example:
            >>> split = Natural().split(np.zeros(5), np.array([7, 3, 7, 5, 3]), clients=2, seed=0)
            >>> split[0].tolist(), split[1].tolist()
            ([0, 1, 2, 4], [3])
        """
        if groups is None:
            raise ValueError("a natural partition needs a dataset with natural clients, and this one has none")
        names, group = np.unique(groups, return_inverse=True)
        if not 1 <= clients <= len(names):
            raise ValueError(f"{clients} clients asked for: expected 1 to {len(names)}, the dataset's natural groups")
        return _partition(np.arange(len(groups)), group.reshape(-1) % clients, clients)


def _by_class(labels: np.ndarray) -> list[Ints]:
    """Positions of every class that occurs, in label order."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order])) + 1
    return np.split(order, starts) if len(order) else []


def _even(n: int, parts: int) -> Ints:
    """Sizes of `parts` parts of `n` that differ by at most one."""
    sizes = np.full(parts, n // parts)
    sizes[: n % parts] += 1
    return sizes


def _top_up(owner: Ints, clients: int, min_samples: int) -> Ints:
    """Hand the last samples of the largest clients to those below `min_samples`, as few as possible."""
    sizes = np.bincount(owner, minlength=clients)
    needs = np.maximum(min_samples - sizes, 0)
    if not (total := int(needs.sum())):
        return owner
    # Cap the largest clients at the lowest level whose excess still covers the need.
    low, high = min_samples, int(sizes.max())
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if np.maximum(sizes - level, 0).sum() >= total else (low, level - 1)
    gives = np.maximum(sizes - low, 0)
    surplus = int(gives.sum()) - total
    # Those at the cap give one less, from the last client on, so that exactly `total` samples move.
    gives[np.flatnonzero(gives)[::-1][:surplus]] -= 1
    by_owner = np.argsort(owner, kind="stable")
    ends = np.cumsum(sizes)
    rank_from_end = np.repeat(ends, sizes) - 1 - np.arange(len(owner))
    owner[by_owner[rank_from_end < np.repeat(gives, sizes)]] = np.repeat(np.arange(clients), needs)
    return owner


def _partition(samples: NDArray[Any], owner: NDArray[Any], clients: int) -> Partition:
    """Sort `samples [m]` by `owner [m]`, keeping their order inside a client."""
    sizes = np.bincount(owner, minlength=clients)
    if not sizes.all():
        raise ValueError(
            f"client {int(np.argmin(sizes))} is left with no sample: {len(owner)} samples for {clients} clients, "
            f"{int((sizes == 0).sum())} of them empty"
        )
    indices = samples[np.argsort(owner, kind="stable")].astype(np.int64, copy=False)
    return Partition(indices, np.concatenate(([0], np.cumsum(sizes))).astype(np.int64, copy=False))
