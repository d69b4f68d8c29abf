"""The contract: a federated algorithm is declared wires plus three pure functions over flat vectors.

`Algorithm.init` makes the server state, `client` trains `C` clients at once, `server` folds the aggregate back in.
Everything else (sampling, placement, batching, collectives, byte counts, checkpoints, metrics) is the engine's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .layout import Layout, Role, Route
from .wire import Wire


class Vectors(MutableMapping[str, Tensor]):
    """Named flat tensors, read and written as attributes or items: `s.x`, `k.c_i`, `agg["delta"]`.

    Args:
        tensors: by name, taken over without a copy.
        what: whose they are, for error messages.
        read_only: whether names keep their tensors; what the tensors hold is not guarded here.

    Raises:
        AttributeError: a name that is not there was read as an attribute, or a read-only set was written to.

    Example:
        >>> import torch
        >>> k = Vectors({"c_i": torch.zeros(2)})
        >>> k.c_i = k.c_i + 1
        >>> k["c_i"].tolist()
        [1.0, 1.0]
    """

    _tensors: dict[str, Tensor]
    _what: str
    _read_only: bool

    def __init__(self, tensors: Mapping[str, Tensor], *, what: str = "state", read_only: bool = False) -> None:
        object.__setattr__(self, "_tensors", dict(tensors))
        object.__setattr__(self, "_what", what)
        object.__setattr__(self, "_read_only", read_only)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._check_writable(name)
        self._tensors[name] = value

    def __delitem__(self, name: str) -> None:
        self._check_writable(name)
        del self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):  # copy and pickle ask for these before there is anything to look in
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{self._what} has no {name!r}; it has {', '.join(self) or 'nothing'}") from None

    def __setattr__(self, name: str, value: Tensor) -> None:
        self[name] = value

    def _check_writable(self, name: str) -> None:
        if self._read_only:
            raise AttributeError(f"{self._what}: {name!r} is read-only; return a new value instead of writing to it")


@dataclass(frozen=True)
class Round:
    """What the server and the clients know about the current round.

    Args:
        index: the round, from 0.
        cohort: S. Clients see how many were sampled (under Poisson sampling the number drawn, not its expectation); the
            server sees how many of those count, which is fewer after a drop. Under privacy both see the expectation.
        population: all clients, N.
        steps: K, local steps. Clients see the nominal number, the largest K_i of the population, which is known in
            advance; the server sees the mean K_i over the clients that count, weighted as the run weights clients, so
            that `−Δ̄/(Kη)` is a mean direction. Under privacy both see the public constant, whoever came.
        lr: the client learning rate η_r, constant inside a round.
    """

    index: int
    cohort: int
    population: int
    steps: float
    lr: float


@dataclass(frozen=True)
class Batch:
    """One local step's mini-batches for `C` clients.

    Args:
        inputs: `[C, b, ...]`.
        targets: `[C, b]` or `[C, b, length]`: int64 labels, or floats in [0, 1), the quantiles at which labels are
            drawn from the model's own softmax.
        weights: `[C, b]`, 1 for a sample and 0 for padding; None where nothing is padded.
        active: `[C]` bool on the host, False for clients that have no step left; None where all have.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor | None
    active: Tensor | None


class Task(Protocol):
    """The local work of `C` clients, as an algorithm sees it.

    Attributes:
        layout: names, blocks and matrices of the flat vectors.
        round: the round this is.
        lr: η_r.
        steps: `[C, 1]` local steps K_i of each client, in the dtype of the parameters.
    """

    layout: Layout
    round: Round
    lr: float
    steps: Tensor

    def batches(self) -> Iterator[Batch]:
        """The mini-batches of the local steps, in order."""
        ...

    def grad(self, y: Tensor, batch: Batch) -> Tensor:
        """Clipped mini-batch gradients `[C, d]` of the clients' losses at `y [C, d]`.

        The returned tensor is overwritten by the next call.
        """
        ...

    def trained(self, y: Tensor) -> None:
        """Told by `run_local` where local training ended, `y [C, d]`."""
        ...

    def full_grad(self, y: Tensor) -> Tensor:
        """Clipped gradients `[C, d]` at `y [C, d]` of the mean loss over all samples of each client, not augmented."""
        ...

    @property
    def sent(self) -> Tensor:
        """`[C, d]` bool, the coordinates that each client sends on `only_block` wires: its block and the shared one."""
        ...

    def sampled_grad(self, y: Tensor, batch: Batch, k: int) -> tuple[Tensor, Tensor]:
        """Gradients `[C, d]` on the same inputs with labels drawn from the model's own softmax, neither clipped nor
        counted in the training loss, and how many labels `[C, 1]` the loss of each client averages.

        Args:
            k: the local step, from 1; the draw depends on it, the round and the client alone.
        """
        ...


@dataclass(frozen=True)
class Move:
    """How a direction `P(g) [C, d]` becomes a step: `y ← y − η(s·P(g) + αG)` for active clients.

    Args:
        lr: η on the device, one value in the dtype of `y`, so that a captured graph replays with its current value.
        share: s, weight of the local direction.
        alpha: α, weight of the global direction.
        G: the global direction `[d]`, the same for all clients; None without.
        active: `[C]` bool on the device, False for clients that have no step left: they keep parameters and state,
            whatever their gradient. None where all are active.
    """

    lr: Tensor
    share: float = 1.0
    alpha: float = 0.0
    G: Tensor | None = None
    active: Tensor | None = None

    def on(self, run: slice) -> Move:
        """The move of a run of the coordinates."""
        return self if self.G is None else replace(self, G=self.G[run])


class LocalOptimizer(Protocol):
    """Steps along directions made of gradients, with per-client state.

    Attributes:
        shared: names of the state that a preconditioner-aligning algorithm averages.
        counters: names of the state that counts the steps which shared state has seen before this round, `[C, 1]`.
        route: which parameters are its matrices; an optimizer without matrices has the default.
        shardable: whether it works on shards of vectors: by coordinate, and through the layout beyond.
    """

    shared: ClassVar[tuple[str, ...]]
    counters: ClassVar[tuple[str, ...]]
    shardable: ClassVar[bool]

    @property
    def route(self) -> Route: ...

    def init(self, y: Tensor, layout: Layout) -> dict[str, Tensor]:
        """Fresh state for clients at `y [C, d]`; every tensor has the leading client axis."""
        ...

    def step(self, state: dict[str, Tensor], g: Tensor, y: Tensor, k: int, layout: Layout, move: Move) -> None:
        """Step along the direction `P(g)`: `y ← y − η(s·P(g) + αG)` and `state` in place, for active clients.

        Args:
            state: as `init` made it, changed by earlier steps.
            g: gradients `[C, d]`, not written to; rows of inactive clients are undefined.
            y: parameters `[C, d]`.
            k: the local step, from 1.
            layout: of the flat vectors.
            move: η, s, αG and who is active.
        """
        ...


@runtime_checkable
class SamplesCurvature(Protocol):
    """What a local optimizer has besides `LocalOptimizer` if it estimates curvature from sampled labels."""

    def curvature_due(self, k: int) -> bool:
        """Whether local step `k` (from 1) starts with an estimate."""
        ...

    def observe(self, state: dict[str, Tensor], g_hat: Tensor, labels: Tensor) -> None:
        """Fold `Task.sampled_grad` at the current parameters into `state`, in place."""
        ...


def layout_for(
    local: LocalOptimizer,
    module: nn.Module,
    roles: Mapping[str, Role] | None = None,
    *,
    blocks: int | Sequence[Sequence[str]] = 1,
    cut_rows: bool = False,
    shared: Iterable[str] = (),
) -> Layout:
    """The flat layout with the matrices that a local optimizer wants; blocks are as in `Layout`.

    Raises:
        ValueError: a matrix optimizer and a model without matrices, or blocks that the model does not have.
    """
    layout = Layout.of(module, roles, blocks=blocks, cut_rows=cut_rows, shared=shared, route=local.route)
    local.init(torch.empty(1, layout.d, device="meta"), layout)
    return layout


class Algorithm(ABC):
    """Declared wires and three pure functions; `fedkernels.algorithms` has one a file.

    Attributes:
        down: the server vectors a client receives.
        keep: vectors `[d]` that stay with each client between rounds, by name; they start at zero.
        local: the clients' optimizer, where the algorithm leaves a choice.
        shardable: whether it works on shards of vectors: by coordinate, and through the layout beyond.
    """

    shardable: ClassVar[bool] = False

    @property
    def down(self) -> tuple[str, ...]:
        return ("x",)

    @property
    def keep(self) -> tuple[str, ...]:
        return ()

    @property
    def local(self) -> LocalOptimizer | None:
        return None

    def layout(self, module: nn.Module, roles: Mapping[str, Role] | None = None) -> Layout:
        """The flat layout this algorithm wants: how many blocks, what is shared, which parameters are matrices.

        Raises:
            ValueError: a model that this algorithm cannot train.
        """
        return Layout.of(module, roles) if self.local is None else layout_for(self.local, module, roles)

    @abstractmethod
    def up(self, layout: Layout) -> dict[str, Wire]:
        """The wires a client sends."""

    @abstractmethod
    def init(self, x: Tensor, layout: Layout) -> dict[str, Tensor]:
        """Server state before the first round, from the initial parameters `x [d]`; `x` must be one of its names."""

    @abstractmethod
    def client(self, s: Vectors, k: Vectors, task: Task) -> dict[str, Tensor]:
        """Train `C` clients.

        Args:
            s: the `down` vectors, `[d]` each, read-only.
            k: the `keep` vectors, `[C, d]` each; assign to keep a new value.
            task: the clients' batches and gradients.

        Returns:
            Exactly the `up` wires, `[C, size]` each.
        """

    @abstractmethod
    def server(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, Tensor]:
        """The server entries that change.

        Args:
            s: the server state.
            agg: the aggregated wires, `[size]` each, read-only.
            r: the round, with the number of clients that count and their mean number of local steps.
        """

    def metrics(self, s: Vectors, agg: Vectors, r: Round) -> dict[str, float]:
        """Further numbers of a round for `metrics.jsonl`, by name; none by default.

        Args:
            s: the server state before the round's update.
            agg, r: as `server` gets them.
        """
        return {}
