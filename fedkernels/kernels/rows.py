"""Rows of clients in memory."""

from __future__ import annotations

from torch import Tensor

LINE_BYTES = 64  # a cache line, and the 16 floats of which Triton must know a stride a multiple for 16-byte accesses


def empty_rows(like: Tensor, clients: int, d: int) -> Tensor:
    """`[C, d]`, uninitialised, in the dtype and on the device of `like`, with every row at the start of a line.

    Example:
        >>> import torch
        >>> empty_rows(torch.empty(0), 3, 17).stride()
        (32, 1)
    """
    per_line = LINE_BYTES // like.element_size()
    return like.new_empty(clients, -(-d // per_line) * per_line)[:, :d]


def zero_rows(like: Tensor) -> Tensor:
    """Zeros `[C, d]` like a tensor of that shape, laid out as `empty_rows` does."""
    return empty_rows(like, *like.shape).zero_()
