"""Flat vectors dealt out over the ranks of a client group: every rank holds a run of each parameter.

Mathematics by coordinate does not notice. What looks at a vector as a whole asks the layout, and a `ShardedLayout`
answers with the group: norms and means add partial sums up, and matrices meet at an owner.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..contract import Algorithm
from ..layout import CurvatureBlocks, Entry, Layout, Slab
from .groups import ClientGroup


@dataclass(frozen=True)
class Cut:
    """How every parameter is dealt out: in runs of as many rows, or elements, as its share rounded up.

    The last shards may get less, or nothing.

    Args:
        unit: `row` of the first dimension, which is how FSDP2 cuts; or `element`, which is how ZeRO does.
        shards: how many runs.

    Example:
        >>> [Cut("row", 2).run((3, 4), shard) for shard in range(2)]
        [(0, 8), (8, 12)]
    """

    unit: Literal["row", "element"]
    shards: int

    def run(self, shape: Sequence[int], shard: int) -> tuple[int, int]:
        """Where the run of a shard lies in the flattened parameter."""
        size = math.prod(shape)
        units = shape[0] if shape and self.unit == "row" else size
        share = -(-units // self.shards)
        return min(shard * share, units) * size // units, min((shard + 1) * share, units) * size // units


WHOLE = Cut("row", 1)


def common(
    entries: Sequence[Entry], cut: Cut, shard: int, other_cut: Cut, other_shard: int
) -> Iterator[tuple[slice, slice]]:
    """The coordinates that a shard of one cut has in common with a shard of another.

    Args:
        entries: the parameters that the vector is made of, as they are whole.

    Returns:
        Slices of the one shard and of the other that hold the same coordinates, ascending, as long as possible.
    """
    at = other_at = 0
    last: tuple[slice, slice] | None = None
    for entry in entries:
        low, high = cut.run(entry.shape, shard)
        other_low, other_high = other_cut.run(entry.shape, other_shard)
        start, stop = max(low, other_low), min(high, other_high)
        if start < stop:
            one = slice(at + start - low, at + stop - low)
            other = slice(other_at + start - other_low, other_at + stop - other_low)
            if last is not None and (last[0].stop, last[1].stop) == (one.start, other.start):
                one, other = slice(last[0].start, one.stop), slice(last[1].start, other.stop)
            elif last is not None:
                yield last
            last = one, other
        at += high - low
        other_at += other_high - other_low
    if last is not None:
        yield last


class ShardedLayout(Layout):
    """The layout of one shard of flat vectors: the same names in the same order, each with its run `[low, high)`.

    An entry has the shape of its run, which is flat. No matrix is whole here, so there are no slabs.

    Args:
        whole: the layout of whole vectors.
        cut: how they are dealt out.
        group: whose first rank holds shard 0, and so on.

    Example:
        >>> layout = ShardedLayout(Layout.of(torch.nn.Linear(3, 3)), Cut("row", 2), ClientGroup(1, 2))
        >>> layout.d, layout["weight"].stop, layout.whole.d
        (4, 3, 12)
    """

    def __init__(self, whole: Layout, cut: Cut, group: ClientGroup) -> None:
        self.cut = cut
        self.group = group
        self.slabs = ()
        self._whole = whole
        self._runs = {entry.name: cut.run(entry.shape, group.index) for entry in whole.entries}
        entries = []
        start = 0
        for entry in whole.entries:
            low, high = self._runs[entry.name]
            entries.append(Entry(entry.name, (high - low,), start, start + high - low, entry.role))
            start += high - low
        matrices = {entry.name for entry in whole.matrix_entries}
        self._index(entries, [entry for entry in entries if entry.name in matrices], [start, 0])
        at = self.matrix_entries[0].start if self.matrix_entries else 0
        self._owners = MatrixOwners(whole, cut, group, at, self.d_matrix) if whole.slabs else None

    @property
    def whole(self) -> Layout:
        return self._whole

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """This shard of whole tensors by name, as one new vector `[d]`."""
        return torch.cat([tensors[name].detach().reshape(-1)[low:high] for name, (low, high) in self._runs.items()])

    def gather(self, vector: Tensor) -> Tensor | None:
        """The whole vector `[whole.d]` on the host of the group's first rank, from the shard `[d]` of each."""
        cut, entries = self.cut, self._whole.entries
        sizes = [sum(b - a for a, b in (cut.run(e.shape, shard) for e in entries)) for shard in range(cut.shards)]
        parts = self.group.collect(vector, sizes)
        if parts is None:
            return None
        out = torch.empty(self._whole.d, dtype=vector.dtype)
        for shard, part in enumerate(parts):
            for mine, all_of_it in common(entries, cut, shard, WHOLE, 0):
                out[all_of_it] = part[mine]
        return out

    def norms(self, vectors: Tensor) -> Tensor:
        squares = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True, dtype=torch.float64).square_()
        return self.group.sum(squares).sqrt_().to(vectors.dtype)

    @property
    def matrix_part(self) -> MatrixOwners | None:
        return self._owners

    def curvature_blocks(self, rule: Literal["hessian", "tensor"]) -> CurvatureBlocks:
        if rule not in self._curvature:
            self._curvature[rule] = ShardedCurvatureBlocks(self, rule)
        return self._curvature[rule]


class MatrixOwners:
    """Brings every matrix together at one rank of the group, and its parts back.

    A `MatrixPart`: all matrix coordinates of the shard, mapped in one go and scaled slab by slab. Ranks own matrices in
    equal shares of what orthogonalization costs, rows · cols · min(rows, cols) each. One message from each rank to each
    other carries all parts there, and one carries them back.

    Args:
        start: where the matrix coordinates begin in the shard; they lie side by side.
        size: how many they are.
    """

    def __init__(self, whole: Layout, cut: Cut, group: ClientGroup, start: int, size: int) -> None:
        self.start, self.stop = start, start + size
        slabs = [slab for slab in whole.slabs for _ in range(slab.count)]
        costs = [slab.rows * slab.cols * min(slab.rows, slab.cols) for slab in slabs]
        ends = [0] * group.size
        owners = [0] * len(slabs)
        for m in sorted(range(len(slabs)), key=lambda m: (-costs[m], m)):
            owners[m] = min(range(group.size), key=lambda rank: (ends[rank], rank))
            ends[owners[m]] += costs[m]
        runs = [[cut.run(e.shape, shard) for e in whole.matrix_entries] for shard in range(group.size)]
        self._group = group
        # Where this shard's run of every matrix lies among its matrix coordinates, by the matrix's owner.
        edges = [0, *itertools.accumulate(high - low for low, high in runs[group.index])]
        self._parts: list[list[slice]] = [[] for _ in range(group.size)]
        for owner, (start, stop) in zip(owners, itertools.pairwise(edges), strict=True):
            self._parts[owner].append(slice(start, stop))
        # Where the run that every shard has of the matrices owned here lies among them, one matrix after another.
        own = [m for m, owner in enumerate(owners) if owner == group.index]
        *starts, self._size = [0, *itertools.accumulate(slabs[m].rows * slabs[m].cols for m in own)]
        self._places = [
            [slice(at + shard_runs[m][0], at + shard_runs[m][1]) for m, at in zip(own, starts, strict=True)]
            for shard_runs in runs
        ]
        self._slabs: list[tuple[Slab, slice, int]] = []
        for slab, members in itertools.groupby(zip(own, starts, strict=True), key=lambda item: slabs[item[0]]):
            at = [start for _, start in members]
            self._slabs.append((slab, slice(at[0], at[0] + len(at) * slab.rows * slab.cols), len(at)))

    def map(self, part: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        clients = len(part)
        whole = part.new_empty(clients, self._size)
        self._exchange(part, self._parts, whole, self._places)
        for slab, run, count in self._slabs:
            batch = whole[:, run].unflatten(1, (count, slab.rows, slab.cols))
            whole[:, run] = function(batch).mul(slab.scale).flatten(1)
        out = torch.empty_like(part)
        self._exchange(whole, self._places, out, self._parts)
        return out

    def _exchange(
        self, source: Tensor, parts: Sequence[Sequence[slice]], target: Tensor, places: Sequence[Sequence[slice]]
    ) -> None:
        """Send `source[:, parts[i]]` to rank i of the group, and put what it sends at `target[:, places[i]]`."""
        clients = len(source)
        outgoing = [
            torch.cat([source[:, part] for part in to_rank] or [source[:, :0]], 1).flatten() for to_rank in parts
        ]
        sizes = [sum(place.stop - place.start for place in from_rank) for from_rank in places]
        incoming = self._group.swap(outgoing, [clients * size for size in sizes])
        for message, size, from_rank in zip(incoming, sizes, places, strict=True):
            columns = message.view(clients, size)
            at = 0
            for place in from_rank:
                target[:, place] = columns[:, at : at + place.stop - place.start]
                at += place.stop - place.start


@dataclass(frozen=True)
class _Piece:
    """`[start, stop)` of a shard viewed as `shape`, where what is at place i of `dim` belongs to block `blocks[i]`."""

    start: int
    stop: int
    shape: tuple[int, ...]
    dim: int
    blocks: Tensor


class ShardedCurvatureBlocks(CurvatureBlocks):
    """Means over curvature blocks that may lie on several ranks: partial sums, added up in the group."""

    def __init__(self, layout: ShardedLayout, rule: Literal["hessian", "tensor"]) -> None:
        self.d = layout.d
        self._group = layout.group
        self._pieces: list[_Piece] = []
        counts: list[Tensor] = []
        self.size = 0
        rows: list[tuple[int, int, tuple[int, ...], Tensor]]
        for entry in layout.entries:
            shape = layout.whole[entry.name].shape
            low, high = layout.cut.run(shape, layout.group.index)
            if rule == "tensor":
                labels, dim, count, shape = torch.zeros(1, dtype=torch.long), 0, 1, (1, math.prod(shape))
                rows = [(low, high, (1, high - low), labels)]
            elif not entry.role.groups:
                count, dim, shape = math.prod(shape), 0, (math.prod(shape),)
                labels = torch.arange(count)
                rows = [(low, high, (high - low,), labels[low:high])]
            else:
                dim = entry.role.out_dim
                labels, count = _labels(entry.role.groups)
                rows = list(_aligned(shape, dim, low, high, labels))
            per_label = math.prod(shape) // len(labels)
            counts.append(torch.bincount(labels, minlength=count) * per_label)
            for start, stop, view, blocks in rows:
                at = entry.start + start - low
                inner = dim if len(view) > 1 else 0
                self._pieces.append(_Piece(at, at + stop - start, view, inner, blocks + self.size))
            self.size += count
        self._counts = torch.cat(counts).double()

    def mean(self, v: Tensor) -> Tensor:
        sums = v.new_zeros(len(v), self.size)
        for piece in self._pieces:
            part = v[:, piece.start : piece.stop].view(len(v), *piece.shape)
            others = [1 + n for n in range(len(piece.shape)) if n != piece.dim]
            sums.index_add_(1, piece.blocks.to(v.device), part.sum(others) if others else part)
        return self._group.sum(sums).div_(self._counts.to(v.device, v.dtype))

    def expand(self, means: Tensor) -> Tensor:
        out = torch.empty(self.d, dtype=means.dtype, device=means.device)
        for piece in self._pieces:
            places = [-1 if n == piece.dim else 1 for n in range(len(piece.shape))]
            target = out[piece.start : piece.stop].view(piece.shape)
            target.copy_(means[piece.blocks.to(means.device)].view(places).expand_as(target))
        return out


def _labels(groups: Sequence[tuple[int, int, int]]) -> tuple[Tensor, int]:
    """The block of every place along a dimension cut into `(low, high, n)` runs, and how many blocks there are."""
    labels, first = [], 0
    for low, high, n in groups:
        labels.append(first + torch.arange(n).repeat_interleave((high - low) // n))
        first += n
    return torch.cat(labels), first


def _aligned(
    shape: tuple[int, ...], dim: int, low: int, high: int, labels: Tensor
) -> Iterator[tuple[int, int, tuple[int, ...], Tensor]]:
    """`[low, high)` of a flattened tensor as whole rows, and what is left of the rows at both ends.

    Returns:
        Start, stop, shape and, along `dim` of that shape or its only one, labels of each part.
    """
    row = math.prod(shape[1:])
    first, last = -(-low // row), high // row
    ends = [(low, high)] if first > last else [(low, first * row), (last * row, high)]
    if first < last:
        rows = labels[first:last] if dim == 0 else labels
        yield first * row, last * row, (last - first, *shape[1:]), rows
    inner = math.prod(shape[dim + 1 :])
    for start, stop in ends:
        if start < stop:
            yield start, stop, (stop - start,), labels[torch.arange(start, stop) // inner % shape[dim]]


def dealt(algorithm: Algorithm, whole: Layout, cut: Cut) -> dict[str, tuple[Entry, ...]]:
    """The server vectors that are dealt out under a cut, each with the parameters it is made of.

    What is not among them, such as means over curvature blocks, every rank holds whole.

    Raises:
        ValueError: the algorithm has a vector that is neither.
    """

    if cut.shards == 1:
        return {}

    def sizes(layout: Layout) -> dict[str, int]:
        x = torch.empty(layout.d, device="meta")
        return {name: value.numel() for name, value in algorithm.init(x, layout).items()}

    shards = [ShardedLayout(whole, cut, ClientGroup(shard, cut.shards)) for shard in range(cut.shards)]
    by_shard = [sizes(layout) for layout in shards]
    out: dict[str, tuple[Entry, ...]] = {}
    for name, size in sizes(whole).items():
        found = [sizes_of_shard[name] for sizes_of_shard in by_shard]
        if found == [size] * cut.shards:
            continue
        if found == [layout.d for layout in shards]:
            out[name] = whole.entries
        elif found == [layout.d_matrix for layout in shards]:
            out[name] = whole.matrix_entries
        else:
            raise ValueError(f"{type(algorithm).__name__} keeps a vector {name!r} that cannot be dealt out over ranks")
    return out
