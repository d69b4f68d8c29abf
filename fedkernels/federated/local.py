"""Local training: the loop of local steps for `C` clients at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..contract import Batch, LocalOptimizer, Move, SamplesCurvature, Task
from ..kernels.fused_sam import fused_sam, row_norm
from ..kernels.rows import empty_rows
from ..optim.steps import active_rows


def run_local(
    task: Task,
    x: Tensor,
    optimizer: LocalOptimizer,
    *,
    state: Mapping[str, Tensor] | None = None,
    grad: Callable[[Tensor, Batch], Tensor] | None = None,
    share: float = 1.0,
    alpha: float = 0.0,
    G: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run every local step of `C` clients from `x`: `y ← y − η(s·P(grad(y, batch)) + αG)`.

    Clients with fewer steps than the others are masked: their parameters and state stay as they were.

    Args:
        x: the start, `[d]` for all clients or `[C, d]`.
        state: entries that replace fresh optimizer state, `[d]` for all clients or `[C, d]`.
        grad: replaces `task.grad`, for control variates, proximal terms and perturbed points.
        share: s, weight of the optimizer's direction P.
        alpha: α, weight of the global direction.
        G: the global direction `[d]`; None for none.

    Returns:
        `y [C, d]` after the last step, and the optimizer's state.

    Example:
        `y, _ = run_local(task, s.x, Sgd(), grad=lambda y, b: task.grad(y, b) + mu * (y - s.x))`
    """
    clients = task.steps.shape[0]
    y = empty_rows(x, clients, task.layout.d).copy_(x)
    own = optimizer.init(y, task.layout)
    for name, value in (state or {}).items():
        own[name].copy_(value)
    gradient = grad or task.grad
    sampling = optimizer if isinstance(optimizer, SamplesCurvature) else None
    everyone = Move(y.new_full((), task.lr), share, alpha, G)
    for k, batch in enumerate(task.batches(), start=1):
        g = gradient(y, batch)
        move = everyone if batch.active is None else replace(everyone, active=batch.active.to(y.device))
        if sampling is not None and sampling.curvature_due(k):
            with active_rows(move.active, own.values()):
                sampling.observe(own, *task.sampled_grad(y, batch, k))
        optimizer.step(own, g, y, k, task.layout, move)
    task.trained(y)
    return y, own


def rescale_(v: Tensor, rho: float, eps: float = 1e-12) -> Tensor:
    """Scale `v [..., d]` to length ρ in place, `ρ v/(‖v‖ + ε)`; a zero vector stays zero.

    Example:
        >>> rescale_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 10.0).tolist()
        [[6.0, 8.0], [0.0, 0.0]]
    """
    return v.mul_(rho / (torch.linalg.vector_norm(v, dim=-1, keepdim=True) + eps))


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
    ascended = empty_rows(task.steps, len(task.steps), task.layout.d)

    def gradient(y: Tensor, batch: Batch) -> Tensor:
        g = task.grad(y, batch)
        if task.layout.whole is task.layout:
            fused_sam(y, g, rho=rho, out=ascended)
        else:
            fused_sam(y, g, coefficient=rho / (task.layout.norms(g).squeeze(1) + 1e-12), out=ascended)
        return task.grad(ascended, batch)

    return gradient


def shifted_gradient(task: Task, direction: Tensor, coefficient: Tensor) -> Callable[[Tensor, Batch], Tensor]:
    """The `grad` at a point that is off by the same vector all round, `∇f_i(y + c·v)`; the vector is never stored.

    Args:
        direction: v, `[C, d]`, or `[d]` for all clients.
        coefficient: c, one value or `[C]`, such as `ascent(v, ρ)`.
    """
    shifted = empty_rows(task.steps, len(task.steps), task.layout.d)

    def gradient(y: Tensor, batch: Batch) -> Tensor:
        fused_sam(y, direction, coefficient=coefficient, out=shifted)
        return task.grad(shifted, batch)

    return gradient


def ascent(v: Tensor, rho: float, eps: float = 1e-7) -> Tensor:
    """What makes rows of `v [C, d]` or `[d]` as long as ρ: `ρ/(‖v‖ + ε)`, `[C]` or `[1]`.

    Example:
        >>> ascent(torch.tensor([[3.0, 4.0]]), 10.0).tolist()
        [2.0]
    """
    return rho / (row_norm(v) + eps)
