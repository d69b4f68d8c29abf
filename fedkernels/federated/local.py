"""Local training: the loop of local steps for `C` clients at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..contract import Batch, LocalOptimizer, SamplesCurvature, Task
from ..layout import Layout


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
    sampling = optimizer if isinstance(optimizer, SamplesCurvature) else None
    for k, batch in enumerate(task.batches(), start=1):
        g = gradient(y, batch)
        before = None if batch.active is None else {name: value.clone() for name, value in own.items()}
        if sampling is not None and sampling.curvature_due(k):
            sampling.observe(own, *task.sampled_grad(y, batch, k))
        p = optimizer.step(own, g, y, k, task.layout)
        if direction is not None:
            p = direction(p)
        if batch.active is not None and before is not None:
            active = batch.active.to(y.device)[:, None]
            p = torch.where(active, p, 0)
            for name, value in own.items():
                value.copy_(torch.where(active, value, before[name]))
        y.add_(p, alpha=-task.lr)
    task.trained(y)
    return y, own


def rescale_(v: Tensor, rho: float, eps: float = 1e-12, layout: Layout | None = None) -> Tensor:
    """Scale `v [..., d]` to length ρ in place, `ρ v/(‖v‖ + ε)`; a zero vector stays zero.

    Args:
        layout: of v, where it may be a shard.

    Example:
        >>> rescale_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 10.0).tolist()
        [[6.0, 8.0], [0.0, 0.0]]
    """
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True) if layout is None else layout.norms(v)
    return v.mul_(rho / (norm + eps))


def sam_gradient(task: Task, rho: float) -> Callable[[Tensor, Batch], Tensor]:
    """The `grad` of sharpness-aware minimisation: `∇f_i(y + ρ g/(‖g‖ + ε))`, `g = ∇f_i(y)` on the same batch.

    Both gradients are clipped as the run says; of the first only its direction counts.

    Args:
        rho: ρ, the radius of the ascent step.

    Example:
        `y, _ = run_local(task, s.x, Sgd(), grad=sam_gradient(task, 0.05))`

    Reference: Foret et al., Sharpness-aware minimization for efficiently improving generalization, 2021
    (arXiv 2010.01412), equations 2 and 3.
    """
    ascended = task.steps.new_empty(len(task.steps), task.layout.d)

    def gradient(y: Tensor, batch: Batch) -> Tensor:
        torch.add(y, rescale_(task.grad(y, batch), rho, layout=task.layout), out=ascended)
        return task.grad(ascended, batch)

    return gradient
