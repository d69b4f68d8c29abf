"""Flat layout: parameter names as slices, blocks and matrix slabs of one vector.

A model's parameters are one vector of length `d`. The layout orders them block by block and, inside a block,
same-shape matrices side by side followed by everything else. So a block is one contiguous slice to send, and a
shape group is one batched `[n, rows, cols]` view for matrix optimizers, both without a copy. A tensor cut by rows stays
whole in the vector: it lies across the border of its blocks.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

Kind = Literal["matrix", "embedding", "head", "norm", "bias", "other"]
Route = Literal["hidden", "all_matrices"]


@dataclass(frozen=True)
class Role:
    """What one parameter tensor is, as far as optimizers care.

    Args:
        kind: `matrix` for hidden weights with an output and an input side; the rest say why a tensor is not one.
        out_dim: the output dimension (0 for `nn.Linear` and convolutions, 1 for GPT-2's transposed `Conv1D`).
        groups: `(low, high, n)` runs along `out_dim`, each cut into `n` equal groups: the curvature blocks of the
            tensor (one per head for queries and keys, one per row for most matrices). Empty: every coordinate alone.
    """

    kind: Kind
    out_dim: int = 0
    groups: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Entry:
    """One parameter tensor at `[start, stop)` of the flat vector."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    role: Role


@dataclass(frozen=True)
class Slab:
    """`count` matrices of one shape side by side: `vector[..., start:stop]` viewed as `[count, rows, cols]`.

    `matrix_start` is where the slab begins in a vector that holds matrices only; `scale` is √max(1, out/in).
    """

    start: int
    stop: int
    matrix_start: int
    matrix_stop: int
    count: int
    rows: int
    cols: int
    scale: float

    def view(self, vector: Tensor) -> Tensor:
        """The matrices `[..., count, rows, cols]` of a flat vector `[..., d]`, without a copy."""
        return vector[..., self.start : self.stop].unflatten(-1, (self.count, self.rows, self.cols))


class MatrixPart(Protocol):
    """A shard's parts of all matrices, side by side at `[start, stop)` of its vectors."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...

    def map(self, part: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """What a function of whole matrices makes of them times their slab's scale: this part `[C, stop - start]`.

        Args:
            part: `[C, stop - start]`.
            function: maps each matrix of `[C, count, rows, cols]` alone.
        """
        ...


class Layout:
    """Maps parameter names to slices, blocks and matrix slabs of a flat vector.

    Args:
        shapes: parameter name to shape, in module order.
        roles: parameter name to `Role`.
        blocks: how many contiguous runs, balanced by parameter count; or the members of every block as name patterns
            (`fnmatch`), of which the first match wins.
        cut_rows: whether runs may begin and end inside a tensor, at a row of its first dimension longer than one;
            False keeps tensors whole. Blocks of patterns are whole tensors.
        shared: name patterns of parameters that form the shared block, laid out last; they go before `blocks`.
        route: `hidden` gives matrix optimizers the parameters of kind `matrix`; `all_matrices` every tensor with two
            or more dimensions.

    Raises:
        ValueError: a name without a role, more blocks than there are rows or tensors, no block, an empty one, a pattern
            that matches nothing, or patterns that leave parameters out.

    Example:
        >>> layout = Layout.of(nn.Linear(3, 2))
        >>> layout.d, layout["weight"].shape
        (8, (2, 3))
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        roles: Mapping[str, Role],
        *,
        blocks: int | Sequence[Sequence[str]] = 1,
        cut_rows: bool = False,
        shared: Iterable[str] = (),
        route: Route = "hidden",
    ) -> None:
        if missing := [name for name in shapes if name not in roles]:
            raise ValueError(f"parameters without a role: {', '.join(missing)}")
        spans, lengths = _assign_blocks(shapes, blocks, tuple(shared), cut_rows)

        def is_matrix(name: str) -> bool:
            wide = len(shapes[name]) >= 2
            return wide and (route == "all_matrices" or roles[name].kind == "matrix")

        def key(name: str) -> tuple[int, bool, bool, str]:
            first, last = spans[name]
            shape_group = str(_as_matrix(shapes[name], roles[name].out_dim)) if is_matrix(name) else ""
            # A tensor cut at the end of its first block lies there, after what is whole in that block.
            return first, last > first, not is_matrix(name), shape_group

        entries: list[Entry] = []
        slabs: list[Slab] = []
        start = matrix_start = 0
        group: object = None
        for name in sorted(shapes, key=key):
            shape, role = tuple(shapes[name]), roles[name]
            stop = start + math.prod(shape)
            entries.append(Entry(name, shape, start, stop, role))
            if is_matrix(name):
                rows, cols, scale = _as_matrix(shape, role.out_dim)
                matrix_stop = matrix_start + rows * cols
                if key(name) == group:
                    first = slabs.pop()
                    slab = Slab(first.start, stop, first.matrix_start, matrix_stop, first.count + 1, rows, cols, scale)
                else:
                    slab = Slab(start, stop, matrix_start, matrix_stop, 1, rows, cols, scale)
                slabs.append(slab)
                group, matrix_start = key(name), matrix_stop
            start = stop
        self.slabs = tuple(slabs)
        self._index(entries, [entry for entry in entries if is_matrix(entry.name)], lengths)

    def _index(self, entries: Sequence[Entry], matrices: Sequence[Entry], lengths: Sequence[int]) -> None:
        """Take over what a vector holds: all parameters, those that are matrices, and the length of every block."""
        self.entries = tuple(entries)
        self.matrix_entries = tuple(matrices)
        self._sizes = [entry.stop - entry.start for entry in entries]
        self.d = sum(self._sizes)
        self.d_matrix = sum(entry.stop - entry.start for entry in matrices)
        self.n_blocks = len(lengths) - 1
        edges = [0, *itertools.accumulate(lengths)]
        self._blocks = [slice(a, b) for a, b in itertools.pairwise(edges)]
        self._by_name = {entry.name: entry for entry in entries}
        self._matrix_runs = _runs((entry.start, entry.stop) for entry in matrices)
        self._curvature: dict[str, CurvatureBlocks] = {}
        self._vector_runs = _gaps(self._matrix_runs, self.d)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        roles: Mapping[str, Role] | None = None,
        *,
        blocks: int | Sequence[Sequence[str]] = 1,
        cut_rows: bool = False,
        shared: Iterable[str] = (),
        route: Route = "hidden",
    ) -> Layout:
        """The layout of a module's trainable parameters; roles are read off the module types where none are given."""
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
        roles = roles or infer_roles(module)
        return cls(shapes, roles, blocks=blocks, cut_rows=cut_rows, shared=shared, route=route)

    def __getitem__(self, name: str) -> Entry:
        return self._by_name[name]

    def block(self, b: int) -> slice:
        """The contiguous slice of block `b`; `b = n_blocks` is the shared block (empty where none was asked for)."""
        return self._blocks[b]

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Named views `[..., *shape]` of a flat vector `[..., d]`: no copy, one split."""
        parts = vector.split(self._sizes, dim=-1)
        lead = vector.shape[:-1]
        return {entry.name: part.view((*lead, *entry.shape)) for entry, part in zip(self.entries, parts, strict=True)}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Named tensors as one new flat vector `[d]`."""
        return torch.cat([tensors[entry.name].detach().reshape(-1) for entry in self.entries])

    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """The module's parameters in flat order, for `bind`."""
        return [module.get_parameter(entry.name) for entry in self.entries]

    def bind(self, parameters: Sequence[nn.Parameter], row: Tensor, grad_row: Tensor | None) -> None:
        """Make parameters views of `row [d]`, and their gradients views of `grad_row [d]`, so backward lands flat."""
        grads = grad_row.split(self._sizes) if grad_row is not None else [None] * len(self._sizes)
        for entry, parameter, data, grad in zip(self.entries, parameters, row.split(self._sizes), grads, strict=True):
            parameter.data = data.view(entry.shape)
            parameter.grad = None if grad is None else grad.view(entry.shape)

    def curvature_blocks(self, rule: Literal["hessian", "tensor"]) -> CurvatureBlocks:
        """The curvature blocks of this layout, made once."""
        if rule not in self._curvature:
            self._curvature[rule] = CurvatureBlocks(self, rule)
        return self._curvature[rule]

    def matrices(self, vector: Tensor) -> Tensor:
        """The matrix coordinates `[..., d_matrix]` of `vector [..., d]`: a view where they are contiguous."""
        return _take(vector, self._matrix_runs)

    def vectors(self, vector: Tensor) -> Tensor:
        """All other coordinates `[..., d - d_matrix]`: a view where they are contiguous."""
        return _take(vector, self._vector_runs)

    @property
    def matrix_part(self) -> MatrixPart | None:
        """Where no matrix is whole, since vectors are shards, what maps them all the same; otherwise None."""
        return None

    @property
    def whole(self) -> Layout:
        """The layout of whole vectors, where those of this one are shards; otherwise this one."""
        return self

    def norms(self, vectors: Tensor) -> Tensor:
        """The l2 norms `[..., 1]` of vectors `[..., d]`, over all shards of each where these are shards."""
        return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)

    @property
    def vector_runs(self) -> Iterator[tuple[slice, slice]]:
        """Per contiguous run of what `vectors` gives, where it lies in a vector `[..., d]` and where in the result."""
        at = 0
        for start, stop in self._vector_runs:
            yield slice(start, stop), slice(at, at + stop - start)
            at += stop - start

    def merge(self, matrices: Tensor, vectors: Tensor) -> Tensor:
        """The inverse of (`matrices`, `vectors`): one new `[..., d]` tensor."""
        out = torch.empty(*matrices.shape[:-1], self.d, dtype=matrices.dtype, device=matrices.device)
        for part, runs in ((matrices, self._matrix_runs), (vectors, self._vector_runs)):
            at = 0
            for start, stop in runs:
                out[..., start:stop] = part[..., at : at + stop - start]
                at += stop - start
        return out


class CurvatureBlocks:
    """Means over curvature blocks: FedAdamW's `v̄ ∈ R^B` of a flat `v ∈ R^d`.

    `hessian` follows the groups of each `Role` (queries and keys one value per head, rows of other matrices,
    embeddings and heads one per row, norms one per tensor, biases every coordinate); `tensor` is one per tensor.

    Example:
        >>> blocks = CurvatureBlocks(Layout.of(nn.Linear(3, 2)), "hessian")
        >>> blocks.size                                     # two rows of the weight, two biases
        4
    """

    def __init__(self, layout: Layout, rule: Literal["hessian", "tensor"]) -> None:
        # Per run: flat start and stop of the tensor, its shape, the grouped dimension, and the run (low, high, n).
        self._runs: list[tuple[int, int, tuple[int, ...], int, int, int, int]] = []
        for entry in layout.entries:
            shape, out_dim, groups = entry.shape, entry.role.out_dim, entry.role.groups
            if rule == "tensor" or not groups:
                size = entry.stop - entry.start
                shape, out_dim, groups = (size,), 0, ((0, size, 1 if rule == "tensor" else size),)
            if groups[-1][1] != shape[out_dim] or any(a[1] != b[0] for a, b in itertools.pairwise(groups)):
                raise ValueError(f"groups {groups} of {entry.name} do not cover its dimension {out_dim} {shape}")
            for low, high, n in groups:
                self._runs.append((entry.start, entry.stop, shape, out_dim, low, high, n))
        self.size = sum(run[-1] for run in self._runs)
        self.d = layout.d

    def _grouped(self, vector: Tensor) -> Iterable[Tensor]:
        """Per run a view `[n, ...]` with the grouped dimension first."""
        for start, stop, shape, out_dim, low, high, n in self._runs:
            run = vector[start:stop].view(shape).narrow(out_dim, low, high - low)
            yield run.unflatten(out_dim, (n, (high - low) // n)).movedim(out_dim, 0)

    def mean(self, v: Tensor) -> Tensor:
        """`[C, d] -> [C, B]`: the mean of `v` over every block."""
        return torch.stack([torch.cat([run.flatten(1).mean(1) for run in self._grouped(row)]) for row in v])

    def expand(self, means: Tensor) -> Tensor:
        """`[B] -> [d]`: every coordinate gets the value of its block."""
        out = torch.empty(self.d, dtype=means.dtype, device=means.device)
        at = 0
        for run in self._grouped(out):
            run.copy_(means[at : at + run.shape[0]].view(-1, *[1] * (run.dim() - 1)).expand_as(run))
            at += run.shape[0]
        return out


def infer_roles(module: nn.Module) -> dict[str, Role]:
    """Roles read off module types: linear and convolution weights are matrices, embeddings and norms are named so."""
    roles: dict[str, Role] = {}
    for prefix, child in module.named_modules():
        for leaf, parameter in child.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            rows = ((0, parameter.shape[0], parameter.shape[0]),) if parameter.dim() else ()
            if isinstance(child, nn.Embedding):
                roles[name] = Role("embedding", 0, rows)
            elif "norm" in type(child).__name__.lower():
                roles[name] = Role("norm", 0, ((0, parameter.shape[0], 1),))
            elif parameter.dim() < 2:
                roles[name] = Role("bias")
            elif isinstance(child, (nn.Linear, nn.modules.conv._ConvNd)):
                roles[name] = Role("matrix", 0, rows)
            else:
                roles[name] = Role("other")
    return roles


def _as_matrix(shape: Sequence[int], out_dim: int) -> tuple[int, int, float]:
    """Rows, columns and √max(1, out/in) of a tensor cut after its output dimension, or before it where it is last."""
    last = out_dim == len(shape) - 1
    cut = out_dim if last else out_dim + 1
    rows, cols = math.prod(shape[:cut]), math.prod(shape[cut:])
    return rows, cols, math.sqrt(max(1.0, cols / rows if last else rows / cols))


def _assign_blocks(
    shapes: Mapping[str, Sequence[int]], blocks: int | Sequence[Sequence[str]], shared: Sequence[str], cut_rows: bool
) -> tuple[dict[str, tuple[int, int]], list[int]]:
    """The first and the last block of every name, and the length of every block; the shared block comes last."""
    common = _matching(list(shapes), shared, "shared block")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    own = [name for name in shapes if name not in common]
    if isinstance(blocks, int):
        rows = [next((n for n in shapes[name] if n > 1), 1) if cut_rows else 1 for name in own]
        if not 1 <= blocks <= max(1, sum(rows)):
            kind = "rows of tensors" if cut_rows else "tensors"
            raise ValueError(f"{blocks} blocks asked for, but the model has {sum(rows)} {kind} to spread over them")
        edges = [0, *itertools.accumulate(sizes[name] for name in own)]
        units = [sizes[name] // n for name, n in zip(own, rows, strict=True)]
        cuts = _even_cuts(np.repeat(np.array(units, np.int64), rows), blocks) if blocks > 1 else []
        firsts, lasts = np.searchsorted(cuts, edges[:-1], "right"), np.searchsorted(cuts, edges[1:], "left")
        spans = dict(zip(own, zip(firsts.tolist(), lasts.tolist(), strict=True), strict=True))
        lengths = [high - low for low, high in itertools.pairwise([0, *cuts, edges[-1]])]
    else:
        labels = _blocks_by_name(own, blocks)
        spans = {name: (b, b) for name, b in labels.items()}
        lengths = [sum(sizes[name] for name in own if labels[name] == b) for b in range(len(blocks))]
    spans |= dict.fromkeys(common, (len(lengths), len(lengths)))
    return spans, [*lengths, sum(sizes[name] for name in common)]


def _even_cuts(units: np.ndarray, n_blocks: int) -> list[int]:
    """Where all blocks but the last end: at the end of a unit of `units [n]` nearest to an even share of the rest."""
    ends = np.cumsum(units)
    middles = ends - units / 2
    cuts: list[int] = []
    count = start = 0
    for left in range(n_blocks, 1, -1):
        share = (int(ends[-1]) - start) / left
        # A unit whose middle lies beyond the share goes to the next block; every block gets one at least.
        nearest = int(np.searchsorted(middles, start + share, "right"))
        count = min(max(nearest, count + 1), len(units) - left + 1)
        start = int(ends[count - 1])
        cuts.append(start)
    return cuts


def _blocks_by_name(names: Sequence[str], blocks: Sequence[Sequence[str]]) -> dict[str, int]:
    if not blocks:
        raise ValueError("the list of blocks is empty; expected a number, or patterns of at least one block")
    labels: dict[str, int] = {}
    for b, patterns in enumerate(blocks):
        members = [name for name in _matching(names, patterns, f"block {b}") if name not in labels]
        if not members:
            raise ValueError(f"block {b} is empty: earlier blocks leave nothing to {list(patterns)}")
        labels |= dict.fromkeys(members, b)
    if uncovered := [name for name in names if name not in labels]:
        raise ValueError(f"parameters in no block: {', '.join(uncovered)}")
    return labels


def _matching(names: Sequence[str], patterns: Sequence[str], whose: str) -> list[str]:
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"{whose} pattern {pattern!r} matches no parameter of {', '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def _runs(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring ranges joined."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _gaps(runs: Sequence[tuple[int, int]], d: int) -> list[tuple[int, int]]:
    edges = [0, *(edge for run in runs for edge in run), d]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def _take(vector: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    if len(runs) == 1:
        return vector[..., runs[0][0] : runs[0][1]]
    return torch.cat([vector[..., a:b] for a, b in runs], dim=-1) if runs else vector[..., :0]
