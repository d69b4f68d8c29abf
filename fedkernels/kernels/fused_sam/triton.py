"""Norms and perturbations of sharpness-aware minimisation, in two Triton launches for all clients and parameters."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import OPTIONS, grid, per_client, place, row, scalar, stride

# A row is summed in this many parts, or one per tile where it is shorter: a number that depends on d alone, so that the
# order of additions, and with it every bit, is the same for any number of clients. Few enough for every program of the
# perturbation to add them up again, which saves a launch; enough for two large programs on each multiprocessor.
PARTS = 256
NORM_TILE = 4096
NORM_OPTIONS = {**OPTIONS, "num_warps": 8}
SAM_TILE = 2048


@triton.jit
def partial_kernel(g_ptr, partial_ptr, d, g_stride, parts, SIZE: tl.constexpr):
    """Sum of squares, in float64, of every `parts`-th tile of a row."""
    pid = tl.program_id(0)
    g_ptr = row(g_ptr, pid // parts, g_stride)
    cols = (pid % parts).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float64)
    # The number of tiles, without a sum of d and SIZE, which 32 bits may not hold.
    for _ in range(pid % parts, (d - 1) // SIZE + 1, parts):
        g = tl.load(g_ptr + cols, cols < d, other=0.0).to(tl.float64)
        total += g * g
        cols += parts * SIZE
    tl.store(partial_ptr + pid, tl.sum(total, 0))


@triton.jit
def total_of(partial_ptr, client, parts, PARTS: tl.constexpr):
    at = tl.arange(0, PARTS)
    return tl.sum(tl.load(partial_ptr + client * parts + at, at < parts, other=0.0), 0)


@triton.jit
def norm_of(partial_ptr, client, parts, PARTS: tl.constexpr):
    return tl.sqrt(total_of(partial_ptr, client, parts, PARTS))


@triton.jit
def norm_kernel(partial_ptr, norm_ptr, parts, PARTS: tl.constexpr):
    client = tl.program_id(0)
    tl.store(norm_ptr + client, norm_of(partial_ptr, client, parts, PARTS).to(tl.float32))


@triton.jit
def sam_tile(w_ptr, direction_ptr, source_ptr, saved_ptr, cols, inside, coefficient):
    y = tl.load(source_ptr + cols, inside)
    if saved_ptr is not None:
        tl.store(saved_ptr + cols, y, inside)
    tl.store(w_ptr + cols, y + coefficient * tl.load(direction_ptr + cols, inside).to(tl.float32), inside)


@triton.jit
def sam_kernel(
    w_ptr, direction_ptr, source_ptr, saved_ptr, coefficient_ptr, partial_ptr,
    clients, d, w_stride, direction_stride, source_stride, saved_stride, parts, rho, eps,
    ONE_ROW: tl.constexpr, PER_CLIENT: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    client, cols, end = place(clients, SIZE)
    w_ptr, direction_ptr = row(w_ptr, client, w_stride), row(direction_ptr, client, direction_stride)
    source_ptr, saved_ptr = row(source_ptr, client, source_stride), row(saved_ptr, client, saved_stride)
    if partial_ptr is not None:
        norm = norm_of(partial_ptr, 0 if ONE_ROW else client, parts, PARTS).to(tl.float32)
        coefficient = rho / (norm + eps)
    else:
        coefficient = scalar(coefficient_ptr, client, PER_CLIENT)
    if end <= d:
        sam_tile(w_ptr, direction_ptr, source_ptr, saved_ptr, cols, None, coefficient)
    else:
        sam_tile(w_ptr, direction_ptr, source_ptr, saved_ptr, cols, cols < d, coefficient)


def partial_sums(g: Tensor) -> Tensor:
    """`[C, parts]` float64."""
    rows, d = (1, *g.shape)[-2:]
    parts = min(PARTS, triton.cdiv(d, NORM_TILE))
    partial = torch.empty(rows, parts, dtype=torch.float64, device=g.device)
    partial_kernel[(parts * rows,)](g, partial, d, stride(g), parts, NORM_TILE, **NORM_OPTIONS)
    return partial


@torch.library.custom_op("fedkernels::row_norm_triton", mutates_args=())
def row_norm_triton(g: Tensor) -> Tensor:
    partial = partial_sums(g)
    norm = torch.empty(partial.shape[0], dtype=torch.float32, device=g.device)
    norm_kernel[(norm.numel(),)](partial, norm, partial.shape[1], PARTS, **OPTIONS)
    return norm


@row_norm_triton.register_fake
def _(g: Tensor) -> Tensor:
    return g.new_empty((1, *g.shape)[-2], dtype=torch.float32)


@torch.library.custom_op("fedkernels::fused_sam_triton", mutates_args=("w", "saved"))
def fused_sam_triton(
    w: Tensor,
    direction: Tensor,
    source: Tensor | None,
    saved: Tensor | None,
    coefficient: Tensor | None,
    rho: float,
    eps: float,
) -> None:
    partial = partial_sums(direction) if coefficient is None else None
    clients, d = w.shape
    start = w if source is None else source
    sam_kernel[grid(w, SAM_TILE)](
        w, direction, start, saved, coefficient, partial,
        clients, d, stride(w), stride(direction), stride(start), stride(saved),
        0 if partial is None else partial.shape[1], rho, eps,
        direction.dim() == 1, per_client(coefficient), PARTS, SAM_TILE, **OPTIONS,
    )  # fmt: skip


@fused_sam_triton.register_fake
def _(*arguments: object) -> None:
    return None
