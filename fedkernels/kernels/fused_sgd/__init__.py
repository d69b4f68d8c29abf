"""Federated SGD in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import MISSING, ON_ROWS, choose, require_rows
from ..steps import check_step
from .reference import fused_sgd_reference

if MISSING["cpp"] is None:
    torch.library.register_fake("fedkernels::fused_sgd_cpp", lambda *arguments, **options: None)


def fused_sgd(
    y: Tensor,
    m: Tensor | None,
    g: Tensor,
    *,
    lr: Tensor,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
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
    """One SGD step of `C` clients with a global direction, `y` and `m` in place.

    `m ← μm + cg + λy`, `y ← y − η(sm + αG)`, without momentum `y ← y − η(s(cg + λy) + αG)`: 20 and 12 bytes per
    float32 parameter, and 4/C for G. Rows `[C, d]` are contiguous, and may lie apart: `y[:, a:b]` is one of them.

    Args:
        y: parameters `[C, d]`, float32; float64 without Triton.
        m: momentum `[C, d]`; None runs without.
        g: gradients `[C, d]`, in the dtype of `y`, or bfloat16 beside float32.
        lr: η on the device, one value or `[C]`.
        momentum: μ.
        weight_decay: λ, coupled: it enters the momentum.
        share: s, weight of the local direction.
        alpha: α, weight of the global direction.
        G: global direction `[d]`, the same for all clients.
        scale: c, a factor of each client's gradient, such as that of clipping; one value or `[C]`.
        active: `[C]` bool; other rows keep parameters and momentum.
        source: `[C, d]`, what `y` is computed from instead of itself, such as the parameters before a perturbation;
            inactive rows are restored from it as well.
        x: start of the round `[d]`, for `delta`.
        delta: `[C, d]`, receives `y − x` of the new `y` in all rows.
        backend: `reference`, `cpp` or `triton`; by default the fastest that can run.

    Raises:
        ValueError: a tensor is on another device, of another shape or dtype than above, or has rows that are not
            contiguous, or that overlap and are written to; or there is momentum without `m`.
        BackendError: the backend asked for cannot run here.

    Example:
        >>> y, m = torch.ones(2, 3), torch.zeros(2, 3)
        >>> fused_sgd(y, m, torch.ones(2, 3), lr=torch.tensor(0.5), momentum=0.9)
        >>> y[0].tolist()
        [0.5, 0.5, 0.5]
    """
    if momentum and m is None:
        raise ValueError(f"m is missing: momentum is {momentum}")
    check_step(y, g, lr, G, scale, active, source, x, delta)
    clients, d = y.shape
    require_rows("m", m, y, (clients, d), y.dtype, written=True)
    chosen = choose("fused_sgd", ON_ROWS, y.device.type, y.dtype, (clients, d), backend).backend
    arguments = (y, m, g, lr, momentum, weight_decay, share, alpha, G, scale, active, source, x, delta)
    if chosen == "triton":
        from .triton import fused_sgd_triton

        fused_sgd_triton(*arguments)
    elif chosen == "cpp":
        torch.ops.fedkernels.fused_sgd_cpp(*arguments)
    else:
        fused_sgd_reference(*arguments)
