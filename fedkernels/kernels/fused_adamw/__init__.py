"""Federated AdamW in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import MISSING, ON_ROWS, choose, require_rows, require_scalars
from ..steps import check_step
from .reference import fused_adamw_reference

if MISSING["cpp"] is None:
    torch.library.register_fake("fedkernels::fused_adamw_cpp", lambda *arguments, **options: None)


def fused_adamw(
    y: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    lr: Tensor,
    step: Tensor,
    v_steps: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    share: float = 1.0,
    alpha: float = 0.0,
    G: Tensor | None = None,
    scale: Tensor | None = None,
    active: Tensor | None = None,
    source: Tensor | None = None,
    x: Tensor | None = None,
    delta: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One AdamW step of `C` clients with a global direction, `y`, `m` and `v` in place.

    `m ← β₁m + (1−β₁)cg`, `v ← β₂v + (1−β₂)(cg)²`, `y ← y − η(s(m̂/(√v̂ + ε) + λy) + αG)` with `m̂ = m/(1−β₁^k)` and
    `v̂ = v/(1−β₂^(k₀+k))`: 28 bytes per float32 parameter, and 4/C for G. What changes from step to step is a tensor on
    the device, of any dtype, so that a captured graph replays with its current value. Rows `[C, d]` are contiguous, and
    may lie apart: `y[:, a:b]` is one of them.

    Args:
        y: parameters `[C, d]`, float32; float64 without Triton.
        m: first moments `[C, d]`.
        v: second moments `[C, d]`.
        g: gradients `[C, d]`, in the dtype of `y`, or bfloat16 beside float32.
        lr: η, one value or `[C]`.
        step: k, local steps that `m` has seen, this one included; one value or one for each client.
        v_steps: k₀, steps that `v` had seen before the round; likewise, `[C, 1]` too.
        beta1: β₁.
        beta2: β₂.
        eps: ε.
        weight_decay: λ, decoupled.
        share: s, weight of the local direction.
        alpha: α, weight of the global direction.
        G: global direction `[d]`, the same for all clients.
        scale: c, a factor of each client's gradient, such as that of clipping; one value or `[C]`.
        active: `[C]` bool; other rows keep parameters and moments.
        source: `[C, d]`, what `y` is computed from instead of itself, such as the parameters before a perturbation;
            inactive rows are restored from it as well.
        x: start of the round `[d]`, for `delta`.
        delta: `[C, d]`, receives `y − x` of the new `y` in all rows.
        backend: `reference`, `cpp` or `triton`; by default the fastest that can run.

    Raises:
        ValueError: a tensor is on another device, of another shape or dtype than above, or has rows that are not
            contiguous, or that overlap and are written to.
        BackendError: the backend asked for cannot run here.

    Example:
        >>> y, m, v, g = torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3)
        >>> constants = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
        >>> fused_adamw(y, m, v, g, lr=torch.tensor(0.5), step=torch.tensor(1), v_steps=torch.zeros(2), **constants)
        >>> y[0].tolist()
        [0.5, 0.5, 0.5]

    Reference: FedAdamW: A communication-efficient optimizer with convergence and generalization guarantees for
    federated large models, 2025 (arXiv 2510.27486).
    """
    check_step(y, g, lr, G, scale, active, source, x, delta)
    clients, d = y.shape
    require_rows("m", m, y, (clients, d), y.dtype, written=True)
    require_rows("v", v, y, (clients, d), y.dtype, written=True)
    require_scalars("step", step, y, clients)
    require_scalars("v_steps", v_steps, y, clients)
    chosen = choose("fused_adamw", ON_ROWS, y.device.type, y.dtype, (clients, d), backend).backend
    # fmt: off
    arguments = (
        y, m, v, g, lr, step, v_steps, beta1, beta2, eps, weight_decay, share, alpha,
        G, scale, active, source, x, delta,
    )
    # fmt: on
    if chosen == "triton":
        from .triton import fused_adamw_triton

        fused_adamw_triton(*arguments)
    elif chosen == "cpp":
        torch.ops.fedkernels.fused_adamw_cpp(*arguments)
    else:
        fused_adamw_reference(*arguments)
