"""Exact sums in plain PyTorch: what the kernel must equal, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

HIGH, BELOW = 26, 43  # the coarse grid is 2^-HIGH, and the fine one has BELOW bits more
CLAMP = 2.0**62  # keeps what is too large, and will be refused, from undefined conversions


def exact_add_reference(sums: Tensor, rows: Tensor, weights: Tensor, largest: Tensor) -> None:
    for row, weight in zip(rows, weights.expand(len(rows)), strict=True):
        # Not a product with zero: what a client of weight 0 sent may be NaN.
        t = torch.where(weight == 0, 0.0, weight * row.double())
        if t.numel():
            torch.maximum(largest, t.abs().amax().nan_to_num(torch.inf), out=largest)
        scaled = (t * 2.0**HIGH).nan_to_num(0.0).clamp(-CLAMP, CLAMP)
        high = scaled.round()
        sums[0] += high.long()
        sums[1] += ((scaled - high) * 2.0**BELOW).round().long()


def exact_value_reference(sums: Tensor) -> Tensor:
    h, l = sums.unbind()  # noqa: E741
    carry = l >> BELOW
    h, l = h + carry, l - (carry << BELOW)  # noqa: E741
    negative = h < 0
    h, l = torch.where(negative, -h - (l > 0).long(), h), torch.where(negative & (l > 0), 2**BELOW - l, l)  # noqa: E741
    # Each of the three parts is a float64 without rounding.
    top = (h >> 32) << 32
    magnitude = (top.double() + ((h - top).double() + l.double() * 2.0**-BELOW)) * 2.0**-HIGH
    return torch.where(negative, -magnitude, magnitude)
