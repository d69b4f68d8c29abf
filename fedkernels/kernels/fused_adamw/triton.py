"""Federated AdamW as one Triton launch for all clients and parameters."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import OPTIONS, TILE, grid, is_active, moved, per_client, place, row, scalar, store_parameters, stride


@triton.jit
def bias_correction(steps, log_beta):
    """`1 − β^steps` in float32, without the cancellation of that formula where the power is close to 1."""
    x = steps * log_beta
    series = x * 0.0 + 1.0
    for n in tl.static_range(9, 1, -1):
        series = 1.0 + series * x / n
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def adamw_tile(
    y_ptr, m_ptr, v_ptr, g_ptr, G_ptr, source_ptr, x_ptr, delta_ptr,
    cols, inside, active, scale, lr, correction1, correction2,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, share, alpha,
):  # fmt: skip
    y = tl.load(source_ptr + cols, inside)
    if active:
        g = tl.load(g_ptr + cols, inside).to(tl.float32) * scale
        m, v = tl.load(m_ptr + cols, inside), tl.load(v_ptr + cols, inside)
        m = beta1 * m + one_minus_beta1 * g
        v = beta2 * v + one_minus_beta2 * (g * g)
        tl.store(m_ptr + cols, m, inside)
        tl.store(v_ptr + cols, v, inside)
        p = m / correction1 / (tl.sqrt(v / correction2) + eps) + weight_decay * y
        y = moved(y, p, G_ptr, cols, inside, lr, share, alpha)
    store_parameters(y, y_ptr, x_ptr, delta_ptr, cols, inside)


@triton.jit
def adamw_kernel(
    y_ptr, m_ptr, v_ptr, g_ptr, lr_ptr, step_ptr, v_steps_ptr,
    G_ptr, scale_ptr, active_ptr, source_ptr, x_ptr, delta_ptr,
    clients, d, y_stride, m_stride, v_stride, g_stride, source_stride, delta_stride,
    beta1, one_minus_beta1, log_beta1, beta2, one_minus_beta2, log_beta2, eps, weight_decay, share, alpha,
    LR_PER_CLIENT: tl.constexpr, STEP_PER_CLIENT: tl.constexpr, V_STEPS_PER_CLIENT: tl.constexpr,
    SCALE_PER_CLIENT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    client, cols, end = place(clients, SIZE)
    y_ptr, m_ptr, v_ptr = row(y_ptr, client, y_stride), row(m_ptr, client, m_stride), row(v_ptr, client, v_stride)
    g_ptr, source_ptr = row(g_ptr, client, g_stride), row(source_ptr, client, source_stride)
    delta_ptr = row(delta_ptr, client, delta_stride)
    lr = scalar(lr_ptr, client, LR_PER_CLIENT)
    k = scalar(step_ptr, client, STEP_PER_CLIENT)
    correction1 = bias_correction(k, log_beta1)
    correction2 = bias_correction(k + scalar(v_steps_ptr, client, V_STEPS_PER_CLIENT), log_beta2)
    scale = 1.0
    if scale_ptr is not None:
        scale = scalar(scale_ptr, client, SCALE_PER_CLIENT)
    active = is_active(active_ptr, client)
    if end <= d:
        adamw_tile(
            y_ptr, m_ptr, v_ptr, g_ptr, G_ptr, source_ptr, x_ptr, delta_ptr,
            cols, None, active, scale, lr, correction1, correction2,
            beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, share, alpha,
        )  # fmt: skip
    else:
        adamw_tile(
            y_ptr, m_ptr, v_ptr, g_ptr, G_ptr, source_ptr, x_ptr, delta_ptr,
            cols, cols < d, active, scale, lr, correction1, correction2,
            beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, share, alpha,
        )  # fmt: skip


def log_of(beta: float) -> float:
    """`log β`, and −∞ at 0, where the correction is 1."""
    return math.log(beta) if beta else -math.inf


@torch.library.custom_op("fedkernels::fused_adamw_triton", mutates_args=("y", "m", "v", "delta"))
def fused_adamw_triton(
    y: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    lr: Tensor,
    step: Tensor,
    v_steps: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
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
    adamw_kernel[grid(y)](
        y, m, v, g, lr, step, v_steps, G, scale, active, start, x, delta,
        clients, d, stride(y), stride(m), stride(v), stride(g), stride(start), stride(delta),
        beta1, 1 - beta1, log_of(beta1), beta2, 1 - beta2, log_of(beta2), eps, weight_decay, share, alpha,
        per_client(lr), per_client(step), per_client(v_steps), per_client(scale), TILE, **OPTIONS,
    )  # fmt: skip


@fused_adamw_triton.register_fake
def _(*arguments: object) -> None:
    return None
