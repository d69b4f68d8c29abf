"""Ways to compute the gradients of `C` clients, behind one signature.

`loop` binds the module to one client's row after another; `batched` runs all clients in one vectorised pass;
`compiled` is `loop` through `torch.compile`; `auto` times `loop` and `batched` and takes the faster. Each can take a
mini-batch in pieces, whose gradients add up to the whole one's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..contract import Batch
from ..layout import Layout
from .objective import Objective

EvaluatorName = Literal["auto", "loop", "batched", "compiled"]


class Evaluator(Protocol):
    """Fills `g [C, d]` with the gradients at `y [C, d]` and returns the losses `[C]`; inactive rows are undefined."""

    def __call__(self, y: Tensor, batch: Batch, g: Tensor) -> Tensor: ...


class BoundModule:
    """The objective's module with its parameters bound to a flat row; rebinding to the same row is free."""

    def __init__(self, objective: Objective, layout: Layout) -> None:
        self._layout = layout
        self._parameters = layout.parameters(objective.module)
        self._bound: tuple[Tensor, Tensor | None] | None = None

    def bind(self, row: Tensor, grad_row: Tensor | None) -> None:
        """Bind to `row [d]` and `grad_row [d]`."""
        if self._bound is not None and _same(self._bound[0], row) and _same(self._bound[1], grad_row):
            return
        self._layout.bind(self._parameters, row, grad_row)
        # Holding the rows keeps their memory from being handed out again, so equal addresses mean equal rows.
        self._bound = (row, grad_row)


def pieces(batch: Batch, size: int | None) -> list[tuple[Batch, Tensor | float | None]]:
    """A mini-batch cut into pieces of at most `size` samples, each with what its sum of losses is divided by.

    That is the number of samples of the whole mini-batch that count, `[C]` where some are padding; None where the
    mini-batch is left whole.
    """
    samples = batch.targets.shape[1]
    if size is None or size >= samples:
        return [(batch, None)]
    count = samples if batch.weights is None else batch.weights.sum(1)
    cut = [
        replace(
            batch,
            inputs=batch.inputs[:, at : at + size],
            targets=batch.targets[:, at : at + size],
            weights=None if batch.weights is None else batch.weights[:, at : at + size],
        )
        for at in range(0, samples, size)
    ]
    return [(piece, count) for piece in cut]


class Loop:
    """One client after another; gradients land in flat memory by backward itself."""

    def __init__(
        self, objective: Objective, bound: BoundModule, *, compiled: bool = False, microbatch_size: int | None = None
    ) -> None:
        self._objective = objective
        self._bound = bound
        self._microbatch_size = microbatch_size
        self._forward: Callable[[Tensor], Tensor] = torch.compile(objective.module) if compiled else objective.module

    def __call__(self, y: Tensor, batch: Batch, g: Tensor) -> Tensor:
        g.zero_()
        losses = torch.zeros(len(y), dtype=y.dtype, device=y.device)
        active = [True] * len(y) if batch.active is None else batch.active.tolist()
        cut = pieces(batch, self._microbatch_size)
        for c in range(len(y)):
            if active[c]:
                self._bound.bind(y[c], g[c])
                for piece, count in cut:
                    weights = None if piece.weights is None else piece.weights[c]
                    of = count[c] if isinstance(count, Tensor) else count
                    loss = self._objective.loss(self._forward, piece.inputs[c], piece.targets[c], weights, of)
                    loss.backward()
                    losses[c] += loss.detach()
        return losses


class Batched:
    """All clients in one `vmap` over rows of `y`; a single split and concatenation per client, no copies by name."""

    def __init__(self, objective: Objective, layout: Layout, *, microbatch_size: int | None = None) -> None:
        if any(getattr(child, "gradient_checkpointing", False) for child in objective.module.modules()):
            raise ValueError("activation_checkpointing computes again in a backward pass that vmap does not have")

        def loss(
            row: Tensor, inputs: Tensor, targets: Tensor, weights: Tensor | None, count: Tensor | float | None
        ) -> Tensor:
            def forward(x: Tensor) -> Tensor:
                return functional_call(objective.module, views, (x,))

            views = layout.views(row)
            return objective.loss(forward, inputs, targets, weights, count)

        self._gradient = grad_and_value(loss)
        self._microbatch_size = microbatch_size

    def __call__(self, y: Tensor, batch: Batch, g: Tensor) -> Tensor:
        losses = torch.zeros(len(y), dtype=y.dtype, device=y.device)
        # The fused attention of a CPU has no batching rule and would run client by client; the plain one has.
        with nullcontext() if y.is_cuda else sdpa_kernel(SDPBackend.MATH):
            g.zero_()
            for piece, count in pieces(batch, self._microbatch_size):
                own = (0 if piece.weights is not None else None, 0 if isinstance(count, Tensor) else None)
                run = vmap(self._gradient, in_dims=(0, 0, 0, *own), randomness="different")
                gradients, part = run(y, piece.inputs, piece.targets, piece.weights, count)
                g.add_(gradients)
                losses += part.detach()
        return losses


@dataclass(frozen=True)
class Choice:
    """The evaluator that runs, how many clients at once, and why."""

    evaluator: Literal["loop", "batched", "compiled"]
    clients_per_batch: int
    why: str


def make_evaluator(
    choice: Choice, objective: Objective, layout: Layout, bound: BoundModule, microbatch_size: int | None = None
) -> Evaluator:
    if choice.evaluator == "batched":
        return Batched(objective, layout, microbatch_size=microbatch_size)
    return Loop(objective, bound, compiled=choice.evaluator == "compiled", microbatch_size=microbatch_size)


def choose(
    evaluator: EvaluatorName,
    clients_per_batch: int | None,
    most_clients: int,
    x: Tensor,
    sample: Callable[[int], Batch],
    make: Callable[[Choice], Evaluator],
) -> Choice:
    """Settle `auto` evaluators and batch sizes, by timing a few gradient evaluations on real data.

    Args:
        most_clients: clients one rank trains in a round; no batch is larger.
        sample: makes a batch for that many clients.
    """
    on_gpu = x.device.type == "cuda"
    # Rows in one batch: bounded by what a GPU's memory holds many times over; a CPU gains nothing from long batches.
    wanted = clients_per_batch or (max(1, min(64, int(2**28 // max(1, x.numel())))) if on_gpu else 8)
    together = max(1, min(wanted, most_clients))
    loop_size = min(clients_per_batch or 1, together)
    if evaluator in ("loop", "compiled"):
        return Choice(evaluator, loop_size, "as configured")
    if evaluator == "batched":
        choice = Choice("batched", together, "as configured")
        try:
            make(choice)(x[None], sample(1), torch.empty_like(x)[None])
        except (RuntimeError, NotImplementedError, ValueError) as error:
            raise ValueError(f"evaluator: this model cannot be batched over clients: {_reason(error)}") from error
        return choice
    if together == 1:
        return Choice("loop", 1, "one client at a time, nothing to batch")
    try:
        batched_s = _time_per_client(make(Choice("batched", together, "")), x, sample(together))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return Choice("loop", loop_size, f"this model cannot be batched over clients: {_reason(error)}")
    loop_s = _time_per_client(make(Choice("loop", 1, "")), x, sample(1))
    why = f"measured {1e3 * loop_s:.2f} ms per client-step in a loop, {1e3 * batched_s:.2f} ms batched by {together}"
    return Choice("batched", together, why) if batched_s < loop_s else Choice("loop", loop_size, why)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0]


def _time_per_client(evaluator: Evaluator, x: Tensor, batch: Batch) -> float:
    clients = len(batch.inputs)
    y = x.expand(clients, -1).clone()
    g = torch.empty_like(y)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        evaluator(y, batch, g)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        best = min(best, time.perf_counter() - start)
    return best / clients


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape
