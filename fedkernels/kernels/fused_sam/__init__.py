"""Sharpness-aware minimisation without its temporaries.

A step is three launches: the norm in two stages (`fused_sam` sums the second where it is needed), the perturbation, and
the optimizer's step, which starts from the saved parameters by `source=`. In float32 with AdamW that is 48 bytes per
parameter, or 44 where the perturbed parameters have a buffer of their own:

    fused_sam(y, g, saved=saved, rho=0.05)                    fused_sam(y, g, out=w, rho=0.05)
    g = gradient(y)                                           g = gradient(w)
    fused_adamw(y, m, v, g, source=saved, ...)                fused_adamw(y, m, v, g, ...)

Where the direction is fixed for a round, its coefficient is computed once and `e` never stored:

    coefficient = gamma - rho / (row_norm(m) + 1e-7)
    fused_sam(y, m, out=w, coefficient=coefficient)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import MISSING, ON_ROWS, choose, require, require_apart, require_rows, require_scalars
from .reference import fused_sam_reference, row_norm_reference

if MISSING["cpp"] is None:
    torch.library.register_fake("fedkernels::fused_sam_cpp", lambda *arguments, **options: None)
    torch.library.register_fake("fedkernels::row_norm_cpp", row_norm_reference)


def row_norm(g: Tensor, *, backend: str | None = None) -> Tensor:
    """`‖g_c‖₂` of every row, `[C]`: 4 bytes per element.

    Summed in float64; in Triton and C++ in an order that depends on `d` alone.

    Args:
        g: `[C, d]` or `[d]`, float32 or bfloat16, which give float32 norms; float64 without Triton.
        backend: `reference`, `cpp` or `triton`; by default the fastest that can run.

    Raises:
        ValueError: `g` has another shape or dtype, or rows that are not contiguous.
        BackendError: the backend asked for cannot run here.

    Example:
        >>> row_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [5.0, 0.0]
    """
    if g.dim() not in (1, 2):
        raise ValueError(f"g has shape {list(g.shape)}, expected [C, d] or [d]")
    known = (torch.float32, torch.bfloat16, torch.float64)
    if g.dim() == 1:
        require("g", g, g, tuple(g.shape), *known)
    else:
        require_rows("g", g, g, (g.shape[0], g.shape[1]), *known)
    dtype = torch.float32 if g.dtype == torch.bfloat16 else g.dtype
    chosen = choose("row_norm", ON_ROWS, g.device.type, dtype, tuple(g.shape), backend).backend
    if chosen == "triton":
        from .triton import row_norm_triton

        return row_norm_triton(g)
    if chosen == "cpp":
        norm: Tensor = torch.ops.fedkernels.row_norm_cpp(g)
        return norm
    return row_norm_reference(g)


def fused_sam(
    y: Tensor,
    direction: Tensor,
    *,
    rho: float | None = None,
    coefficient: Tensor | None = None,
    eps: float = 1e-12,
    out: Tensor | None = None,
    saved: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Move the parameters of `C` clients along a direction, `y + ρ g/(‖g‖ + ε)` or `y + coefficient · direction`.

    Args:
        y: parameters `[C, d]`, float32; float64 without Triton.
        direction: `[C, d]`, such as gradients, or `[d]` for all clients; in the dtype of `y`,
            or bfloat16 beside float32.
        rho: ρ; norms are those of the rows.
        coefficient: in place of `rho` where norms are known, on the device; one value or `[C]`.
        eps: ε, added to the norm.
        out: `[C, d]`, receives the moved parameters, and `y` stays: 12 bytes per parameter, 16 with the norm.
        saved: `[C, d]`, receives `y` bit by bit, and `y` moves in place: 16 bytes per parameter, 20 with the norm.
        backend: `reference`, `cpp` or `triton`; by default the fastest that can run.

    Raises:
        ValueError: not exactly one of `rho` and `coefficient`, or of `out` and `saved`; or a tensor is on another
            device, of another shape or dtype than above, has rows that are not contiguous, or that overlap and are
            written to, or `out` or `saved` shares memory with `y`, or `saved` with `direction`.
        BackendError: the backend asked for cannot run here.

    Example:
        >>> y, saved = torch.zeros(1, 2), torch.empty(1, 2)
        >>> fused_sam(y, torch.tensor([[3.0, 4.0]]), rho=5.0, saved=saved)
        >>> y.tolist(), saved.tolist()
        ([[3.0, 4.0]], [[0.0, 0.0]])

    Reference: Foret et al., Sharpness-aware minimization for efficiently improving generalization, 2021
    (arXiv 2010.01412).
    """
    if (rho is None) == (coefficient is None):
        raise ValueError(f"rho is {rho} and coefficient {coefficient}, expected exactly one of them")
    if (out is None) == (saved is None):
        raise ValueError(f"{'neither' if out is None else 'both'} of out and saved given, expected exactly one of them")
    if y.dim() != 2:
        raise ValueError(f"y has shape {list(y.shape)}, expected [C, d]")
    clients, d = y.shape
    require_rows("y", y, y, (clients, d), written=out is None)
    dtypes = (y.dtype, torch.bfloat16) if y.dtype == torch.float32 else (y.dtype,)
    if direction.dim() == 1:
        require("direction", direction, y, (d,), *dtypes)
    else:
        require_rows("direction", direction, y, (clients, d), *dtypes)
    require_rows("out", out, y, (clients, d), y.dtype, written=True)
    require_rows("saved", saved, y, (clients, d), y.dtype, written=True)
    require_apart("out", out, "y", y)
    require_apart("saved", saved, "y", y)
    require_apart("saved", saved, "direction", direction)
    require_scalars("coefficient", coefficient, y, clients)
    chosen = choose("fused_sam", ON_ROWS, y.device.type, y.dtype, (clients, d), backend).backend
    w, source = (y, None) if out is None else (out, y)
    arguments = (w, direction, source, saved, coefficient, 0.0 if rho is None else rho, eps)
    if chosen == "triton":
        from .triton import fused_sam_triton

        fused_sam_triton(*arguments)
    elif chosen == "cpp":
        torch.ops.fedkernels.fused_sam_cpp(*arguments)
    else:
        fused_sam_reference(*arguments)
