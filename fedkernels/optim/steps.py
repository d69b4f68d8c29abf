"""What local optimizers without a kernel of their own share: the step along a direction, and masking of clients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..contract import Move
from ..kernels.fused_sgd import fused_sgd


def step_along(p: Tensor, y: Tensor, move: Move, *, weight_decay: float = 0.0, factor: float = 1.0) -> None:
    """`y ← y − η(s(factor·p + λy) + αG)` for active clients, in one pass.

    Args:
        p: direction `[C, n]`.
        y: parameters `[C, n]`.
        weight_decay: λ, decoupled.
        factor: of the direction, positive.

    Example:
        >>> y = torch.ones(1, 2)
        >>> step_along(torch.ones(1, 2), y, Move(torch.tensor(0.5)), weight_decay=0.5)
        >>> y.tolist()
        [[0.25, 0.25]]
    """
    fused_sgd(
        y,
        None,
        p,
        lr=move.lr,
        weight_decay=weight_decay / factor,
        share=move.share * factor,
        alpha=move.alpha,
        G=move.G,
        active=move.active,
    )


@contextmanager
def active_rows(active: Tensor | None, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Write to rows of active clients only: what the block does to other rows of `tensors [C, ...]` is undone."""
    if active is None:
        yield
        return
    kept = [(tensor, tensor.clone()) for tensor in tensors]
    yield
    for tensor, before in kept:
        torch.where(active.view(-1, *[1] * (tensor.dim() - 1)), tensor, before, out=tensor)
