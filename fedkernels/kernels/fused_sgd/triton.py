"""Federated SGD as one Triton launch for all clients and parameters."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import OPTIONS, TILE, grid, is_active, moved, per_client, place, row, scalar, store_parameters, stride

# Left to itself, ptxas takes so few registers on sm_90 that it spills two where rates are those of each client.
SGD_OPTIONS = {**OPTIONS, "maxnreg": 128}


@triton.jit
def sgd_tile(
    y_ptr, m_ptr, g_ptr, G_ptr, source_ptr, x_ptr, delta_ptr,
    cols, inside, active, scale, lr, momentum, weight_decay, share, alpha,
):  # fmt: skip
    y = tl.load(source_ptr + cols, inside)
    if active:
        p = tl.load(g_ptr + cols, inside).to(tl.float32) * scale + weight_decay * y
        if m_ptr is not None:
            p += momentum * tl.load(m_ptr + cols, inside)
            tl.store(m_ptr + cols, p, inside)
        y = moved(y, p, G_ptr, cols, inside, lr, share, alpha)
    store_parameters(y, y_ptr, x_ptr, delta_ptr, cols, inside)


@triton.jit
def sgd_kernel(
    y_ptr, m_ptr, g_ptr, lr_ptr, G_ptr, scale_ptr, active_ptr, source_ptr, x_ptr, delta_ptr,
    clients, d, y_stride, m_stride, g_stride, source_stride, delta_stride, momentum, weight_decay, share, alpha,
    LR_PER_CLIENT: tl.constexpr, SCALE_PER_CLIENT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    client, cols, end = place(clients, SIZE)
    y_ptr, m_ptr, g_ptr = row(y_ptr, client, y_stride), row(m_ptr, client, m_stride), row(g_ptr, client, g_stride)
    source_ptr, delta_ptr = row(source_ptr, client, source_stride), row(delta_ptr, client, delta_stride)
    lr = scalar(lr_ptr, client, LR_PER_CLIENT)
    scale = 1.0
    if scale_ptr is not None:
        scale = scalar(scale_ptr, client, SCALE_PER_CLIENT)
    active = is_active(active_ptr, client)
    if end <= d:
        sgd_tile(
            y_ptr, m_ptr, g_ptr, G_ptr, source_ptr, x_ptr, delta_ptr,
            cols, None, active, scale, lr, momentum, weight_decay, share, alpha,
        )  # fmt: skip
    else:
        sgd_tile(
            y_ptr, m_ptr, g_ptr, G_ptr, source_ptr, x_ptr, delta_ptr,
            cols, cols < d, active, scale, lr, momentum, weight_decay, share, alpha,
        )  # fmt: skip


@torch.library.custom_op("fedkernels::fused_sgd_triton", mutates_args=("y", "m", "delta"))
def fused_sgd_triton(
    y: Tensor,
    m: Tensor | None,
    g: Tensor,
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    share: float,
    alpha: float,
    G: Tensor | None,
    scale: Tensor | None,
    active: Tensor | None,
    source: Tensor | None,
    x: Tensor | None,
    delta: Tensor | None,
) -> None:
    clients, d = y.shape
    start = y if source is None else source
    sgd_kernel[grid(y)](
        y, m, g, lr, G, scale, active, start, x, delta,
        clients, d, stride(y), stride(m), stride(g), stride(start), stride(delta), momentum, weight_decay, share, alpha,
        per_client(lr), per_client(scale), TILE, **SGD_OPTIONS,
    )  # fmt: skip


@fused_sgd_triton.register_fake
def _(*arguments: object) -> None:
    return None
