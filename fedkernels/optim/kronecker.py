"""Kronecker factors of the layout's matrices: two squares for each, all in one flat vector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from ..layout import Layout

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
# Eigenvalues below this share of the trace are noise: a null space, which has no eigenvectors of its own.
NULL_SHARE = 1e-6


def factor_size(layout: Layout) -> int:
    """Σ rows² + cols² over the matrices, the length of a flat vector of factors."""
    return sum(slab.count * (slab.rows**2 + slab.cols**2) for slab in layout.slabs)


def factors(vector: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Tensor]]:
    """Per slab the left `[C, count, rows, rows]` and right `[C, count, cols, cols]` factors, views of `[C, size]`."""
    at = 0
    for slab in layout.slabs:
        pair = []
        for n in (slab.rows, slab.cols):
            stop = at + slab.count * n * n
            pair.append(vector[:, at:stop].unflatten(1, (slab.count, n, n)))
            at = stop
        yield pair[0], pair[1]


def accumulate(vector: Tensor, g: Tensor, layout: Layout, beta: float) -> None:
    """`L ← βL + (1−β)GGᵀ`, `R ← βR + (1−β)GᵀG` for every matrix G of `g [C, d]`, in place."""
    for slab, (left, right) in zip(layout.slabs, factors(vector, layout), strict=True):
        matrix = slab.view(g)
        left.lerp_(matrix @ matrix.mT, 1 - beta)
        right.lerp_(matrix.mT @ matrix, 1 - beta)


def multiply(g: Tensor, vector: Tensor, layout: Layout, *, transpose: bool = False) -> Tensor:
    """A copy of `g [C, d]` with every matrix G replaced by `L G Rᵀ` (`LᵀGR` where `transpose`)."""
    out = g.clone()
    for slab, (left, right) in zip(layout.slabs, factors(vector, layout), strict=True):
        matrix = slab.view(g)
        slab.view(out).copy_(left.mT @ matrix @ right if transpose else left @ matrix @ right.mT)
    return out


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` in float64 of matrices `[..., n, n]`; one with NaN or infinity gives NaN, where torch raises.

    Factors are sums of squares: their spectrum spans more digits than float32 has.
    """
    finite = a.isfinite().all(-1).all(-1)[..., None]
    wide = torch.where(finite[..., None], a, 0).double()
    try:
        values, vectors = torch.linalg.eigh(wide)
    except LinAlgError:  # of one matrix, but raised for all
        pairs = [_eigh_of_one(matrix) for matrix in wide.flatten(0, -3)]
        values, vectors = (torch.stack(part).view(wide.shape[:-2] + part[0].shape) for part in zip(*pairs, strict=True))
    return torch.where(finite, values, torch.nan), torch.where(finite[..., None], vectors, torch.nan)


def _eigh_of_one(a: Tensor) -> tuple[Tensor, Tensor]:
    """LAPACK may give up on an ordinary matrix; on a multiple of it, it does not."""
    try:
        return torch.linalg.eigh(a)
    except LinAlgError:
        largest = a.abs().max()
        values, vectors = torch.linalg.eigh(a / largest)
        return values * largest, vectors


def inverse_root(a: Tensor, root: Literal[2, 4], eps: float) -> Tensor:
    """`(A + εI)^(−1/root)` of positive semi-definite matrices `[..., n, n]`.

    Example:
        >>> inverse_root(torch.eye(2).double(), 2, 3.0).diagonal().tolist()
        [0.5, 0.5]
    """
    values, vectors = eigh(a)
    # Square roots are exact to the last bit; a power may round by the place in the tensor, and so by the batch.
    scale = (values.clamp(min=0) + eps).sqrt()
    scale = scale if root == 2 else scale.sqrt()
    return ((vectors / scale[..., None, :]) @ vectors.mT).to(a.dtype)


def eigenbasis(a: Tensor) -> Tensor:
    """Eigenvectors of positive semi-definite matrices `[..., n, n]` as columns, the largest eigenvalue first.

    In the null space every basis is one of eigenvectors, and rounding would choose, differently on every machine. The
    one taken is that of `diag(1, …, n)` restricted to it: no rounding shows, and no curvature means coordinates.
    """
    a = a.double()
    a = a / a.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=torch.finfo(a.dtype).tiny)[..., None, None]
    values, vectors = eigh(a)
    null = vectors * (values < NULL_SHARE)[..., None, :]
    projector = null @ null.mT
    places = torch.linspace(1 / a.shape[-1], 1, a.shape[-1], dtype=a.dtype, device=a.device)
    # On the null space this is −diag(1/n, …, 1), elsewhere A: the eigenvectors of the rest stay, and stay first.
    _, vectors = eigh(a - projector @ (a + places.diag()) @ projector)
    return vectors.flip(-1)
