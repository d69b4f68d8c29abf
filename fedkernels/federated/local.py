"""Local training: the loop of local steps for `C` clients at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..contract import Batch, LocalOptimizer, SamplesCurvature, Task


def run_local(
    task: Task,
    x: Tensor,
    optimizer: LocalOptimizer,
    *,
    state: Mapping[str, Tensor] | None = None,
    grad: Callable[[Tensor, Batch], Tensor] | None = None,
    direction: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run every local step of `C` clients from `x`: `y ← y − η direction(P(grad(y, batch)))`.

    Clients with fewer steps than the others are masked: their parameters and state stay as they were.

    Args:
        x: the start, `[d]` for all clients or `[C, d]`.
        state: entries that replace fresh optimizer state, `[d]` for all clients or `[C, d]`.
        grad: replaces `task.grad`, for control variates, proximal terms and perturbed points.
        direction: maps the optimizer's direction `[C, d]` to the one taken, for corrections.

    Returns:
        `y [C, d]` after the last step, and the optimizer's state.

    Example:
        `y, _ = run_local(task, s.x, Sgd(), grad=lambda y, b: task.grad(y, b) + mu * (y - s.x))`
    """
    clients = task.steps.shape[0]
    y = x.expand(clients, -1).clone()
    own = optimizer.init(y, task.layout)
    for name, value in (state or {}).items():
        own[name].copy_(value)
    gradient = grad or task.grad
    for k, batch in enumerate(task.batches(), start=1):
        g = gradient(y, batch)
        before = None if batch.active is None else {name: value.clone() for name, value in own.items()}
        if isinstance(optimizer, SamplesCurvature) and optimizer.curvature_due(k):
            optimizer.observe(own, *task.sampled_grad(y, batch, k))
        p = optimizer.step(own, g, y, k, task.layout)
        if direction is not None:
            p = direction(p)
        if batch.active is not None and before is not None:
            active = batch.active.to(y.device)[:, None]
            p = torch.where(active, p, 0)
            for name, value in own.items():
                value.copy_(torch.where(active, value, before[name]))
        y.add_(p, alpha=-task.lr)
    return y, own
