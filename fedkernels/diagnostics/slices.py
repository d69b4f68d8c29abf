"""The loss along filter-normalised random directions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor, zeros_like
from torch.linalg import vector_norm

from ..layout import Layout

Loss = Callable[[Tensor], float]


def filter_normalised(direction: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """The direction with every filter as long as the model's: `d_j ← d_j ‖x_j‖/‖d_j‖`, and zero for 1-D parameters.

    A filter is what feeds one output: a row of a linear layer, a kernel of a convolution, a token's embedding.

    Args:
        direction: `[d]`, such as a Gaussian draw.
        x: the model, `[d]`.
        layout: of both.

    Reference: Li et al., Visualizing the loss landscape of neural nets, 2018 (arXiv 1712.09913), section 4.
    """
    out = zeros_like(x)
    given, weights, made = layout.views(direction), layout.views(x), layout.views(out)
    for entry in layout.entries:
        if len(entry.shape) < 2:  # biases and norms, which would drown the slice in their scale
            continue
        d, w, target = (views[entry.name].movedim(entry.role.out_dim, 0) for views in (given, weights, made))
        axes = tuple(range(1, d.dim()))
        target.copy_(d * (vector_norm(w, dim=axes, keepdim=True) / vector_norm(d, dim=axes, keepdim=True)))
    return out


def slice_1d(loss: Loss, x: Tensor, u: Tensor, offsets: np.ndarray) -> np.ndarray:
    """`f(x + a u)` for every offset a, `[n]`."""
    return np.array([loss(x + a * u) for a in offsets.tolist()])


def slice_2d(loss: Loss, x: Tensor, u: Tensor, v: Tensor, offsets: np.ndarray) -> np.ndarray:
    """`f(x + a u + b v)`, `[n, n]` with a row for every b."""
    return np.stack([slice_1d(loss, x + b * v, u, offsets) for b in offsets.tolist()])


def centred(span: float, each_side: int) -> np.ndarray:
    """Offsets from −span to span, `[2·each_side + 1]`, 0 exactly in the middle."""
    half = np.linspace(0, span, each_side + 1)
    return np.concatenate([-half[:0:-1], half])
