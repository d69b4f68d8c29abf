"""Muon's step in Triton: a launch before Newton–Schulz and one after it, for the matrices of all clients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..newton_schulz import run
from ..tiles import OPTIONS, TILE, is_active, moved, per_client, scalar


@triton.jit
def place_in_matrix(count, size, SIZE: tl.constexpr):
    """This program's client and matrix, its elements of that matrix, and which of them exist."""
    tiles = (size - 1) // SIZE + 1  # of a sum with SIZE 32 bits may be too few
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    at = (tl.program_id(0) % tiles).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    return matrix // count, matrix % count, at, at < size


@triton.jit
def direction_kernel(
    M_ptr, g_ptr, u_ptr, active_ptr, count, size, M_outer, M_inner, g_outer, g_inner, momentum, SIZE: tl.constexpr
):
    """`M ← M + (1−β)(g − M)` and `U = g + β(M − g)`."""
    client, matrix, at, inside = place_in_matrix(count, size, SIZE)
    u_at = (client * count + matrix) * size + at
    if is_active(active_ptr, client):
        M_at = client * M_outer + matrix * M_inner + at
        g = tl.load(g_ptr + client * g_outer + matrix * g_inner + at, inside)
        M = tl.load(M_ptr + M_at, inside)
        M += (1 - momentum) * (g - M)
        tl.store(M_ptr + M_at, M, inside)
        tl.store(u_ptr + u_at, g + momentum * (M - g), inside)
    else:
        tl.store(u_ptr + u_at, tl.zeros((SIZE,), tl.float32), inside)


@triton.jit
def step_kernel(
    y_ptr, o_ptr, lr_ptr, G_ptr, active_ptr, count, size, y_outer, y_inner,
    scale, weight_decay, share, alpha, LR_PER_CLIENT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """`y ← y − η(s(ηₘ O + λy) + αG)`."""
    client, matrix, at, inside = place_in_matrix(count, size, SIZE)
    if is_active(active_ptr, client):
        y_at = client * y_outer + matrix * y_inner + at
        y = tl.load(y_ptr + y_at, inside)
        o = tl.load(o_ptr + (client * count + matrix) * size + at, inside)
        lr = scalar(lr_ptr, client, LR_PER_CLIENT)
        p = scale * o + weight_decay * y
        tl.store(y_ptr + y_at, moved(y, p, G_ptr, matrix * size + at, inside, lr, share, alpha), inside)


@torch.library.custom_op("fedkernels::muon_step_triton", mutates_args=("y", "M"))
def muon_step_triton(
    y: Tensor,
    M: Tensor,
    g: Tensor,
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    scale: float,
    share: float,
    alpha: float,
    G: Tensor | None,
    active: Tensor | None,
    coefficients: Sequence[float],
    margin: float,
    inner: str,
) -> None:
    """The step, with `newton_schulz` on the backend `inner`."""
    clients, count, rows, cols = y.shape
    size = rows * cols
    grid = (clients * count * triton.cdiv(size, TILE),)
    u = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    direction_kernel[grid](
        M, g, u, active, count, size, M.stride(0), M.stride(1), g.stride(0), g.stride(1), momentum, TILE, **OPTIONS
    )
    o = run("cuda" if inner == "cuda" else "triton", u, list(coefficients), margin)
    step_kernel[grid](
        y, o, lr, G, active, count, size, y.stride(0), y.stride(1), scale, weight_decay, share, alpha, per_client(lr),
        TILE, **OPTIONS,
    )  # fmt: skip


@muon_step_triton.register_fake
def _(*arguments: object) -> None:
    return None
