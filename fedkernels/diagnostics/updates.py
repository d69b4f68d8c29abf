"""How the updates of a cohort agree, and how far its clients' optimizer states have drifted apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import Layout
from ..wire import Wire

CHUNK = 2**20  # columns that are widened to float64 at once


@dataclass(frozen=True)
class Agreement:
    """Of updates Δ_i, in float64.

    Args:
        norms: ‖Δ_i‖, `[S]`.
        cosine: cos(Δ_i, Δ_j), `[S, S]`; 0 where one of them is zero.
        to_mean: cos(Δ_i, Δ̄), `[S]`.
        mean_norm: ‖Δ̄‖.
    """

    norms: Tensor
    cosine: Tensor
    to_mean: Tensor
    mean_norm: float


def agreement(updates: Tensor) -> Agreement:
    """Norms and cosines of updates `[S, d]`.

    Example:
        >>> found = agreement(torch.tensor([[3.0, 4.0], [4.0, -3.0]]))
        >>> found.norms.tolist(), found.cosine.round(decimals=6).tolist()
        ([5.0, 5.0], [[1.0, 0.0], [0.0, 1.0]])
    """
    gram = torch.zeros(len(updates), len(updates), dtype=torch.float64, device=updates.device)
    for part in updates.split(CHUNK, dim=1):
        gram += part.double() @ part.double().T  # ⟨Δ_i, Δ_j⟩
    norms = gram.diagonal().sqrt()
    mean_norm = gram.mean().clamp(min=0).sqrt()
    return Agreement(
        norms,
        _cosine(gram, norms[:, None] * norms),
        _cosine(gram.mean(1), norms * mean_norm),
        float(mean_norm),
    )


@dataclass(frozen=True)
class Drift:
    """Of aligned states Θ_i.

    Args:
        absolute: `(1/S) Σ_i ‖Θ_i − Θ̄‖²`.
        relative: that over `‖Θ̄‖²`; None where Θ̄ is zero.
    """

    absolute: float
    relative: float | None


def drift(states: Tensor) -> Drift:
    """Preconditioner drift of states `[S, n]`, in float64.

    Example:
        >>> drift(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
        Drift(absolute=1.0, relative=0.125)

    Reference: FedPAC, 2026 (arXiv 2602.19271).
    """
    mean = states.mean(0, dtype=torch.float64)
    absolute = sum(float((row - mean).square().sum()) for row in states) / len(states)
    scale = float(mean.square().sum())
    return Drift(absolute, absolute / scale if scale else None)


def aligned_wires(wires: Mapping[str, Wire]) -> list[str]:
    """The wires that carry the same state of every client, sent or riding along."""
    return [name for name, wire in wires.items() if wire.state and not wire.only_block]


def by_layer(states: Tensor, wire: Wire, layout: Layout) -> dict[str, Tensor]:
    """Parts `[S, n]` of an aligned state by parameter name; empty where a wire has no such parts.

    Args:
        states: `[S, size of the wire]`.
    """
    if wire.like == "params":
        return {name: view.flatten(1) for name, view in layout.views(states).items()}
    if wire.like != "matrices":
        return {}
    parts = {}
    for slab in layout.slabs:
        for entry in layout.entries:
            if slab.start <= entry.start < slab.stop:
                start = slab.matrix_start + entry.start - slab.start
                parts[entry.name] = states[:, start : start + entry.stop - entry.start]
    return parts


def _cosine(products: Tensor, lengths: Tensor) -> Tensor:
    return torch.where(lengths > 0, products / lengths, 0).clamp(-1, 1)
