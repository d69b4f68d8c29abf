"""The mean loss of chosen training samples as a function of flat parameters, with two derivatives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..federated.objective import Objective
from ..layout import Layout

CHUNK = 256


class SampleLoss:
    """`f(x) = (1/n) Σ_j ℓ(x; ξ_j)` over fixed training samples, without augmentation and dropout.

    Chunks of samples are computed in the dtype of `x` and added up in float64.

    Args:
        objective: model, loss and data.
        layout: of the flat vectors.
        indices: training samples `[n]`; one that occurs twice counts twice.

    Example:
        `f = SampleLoss(engine.objective, engine.layout, partition[0]); f(x), f.hvp(x, v)`
    """

    def __init__(self, objective: Objective, layout: Layout, indices: np.ndarray) -> None:
        self._objective = objective
        self._layout = layout
        self._chunks = torch.from_numpy(np.asarray(indices, dtype=np.int64)).to(objective.device).split(CHUNK)
        self.samples = len(indices)

    def __call__(self, x: Tensor) -> float:
        """f(x)."""
        with torch.no_grad():
            return sum(share * loss.double() for share, loss in self._losses(x)).item()  # type: ignore[union-attr]

    def gradient(self, x: Tensor) -> Tensor:
        """∇f(x), `[d]` in float64."""
        x = x.detach().requires_grad_()
        total = torch.zeros_like(x, dtype=torch.float64)
        for share, loss in self._losses(x):
            (g,) = torch.autograd.grad(loss, x)
            total.add_(g, alpha=share)
        return total

    def hvp(self, x: Tensor, v: Tensor) -> Tensor:
        """∇²f(x) v, `[d]` in float64, by differentiating the gradient."""
        x = x.detach().requires_grad_()
        v = v.to(x.dtype)
        total = torch.zeros_like(x, dtype=torch.float64)
        for share, loss in self._losses(x):
            (g,) = torch.autograd.grad(loss, x, create_graph=True)
            (hv,) = torch.autograd.grad(g, x, v)
            total.add_(hv, alpha=share)
        return total

    def _losses(self, x: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Per chunk its share of the samples and its mean loss at `x`."""
        module, views = self._objective.module, self._layout.views(x)
        for chunk in self._chunks:
            inputs, targets = self._objective.train_batch(chunk[None], None)
            with _undisturbed(module):
                loss = self._objective.loss(
                    lambda batch: functional_call(module, views, (batch,)), inputs[0], targets[0], None
                )
            yield len(chunk) / self.samples, loss


@contextmanager
def _undisturbed(module: torch.nn.Module) -> Iterator[None]:
    """Without dropout, and with the one attention that can be differentiated twice."""
    training = module.training
    module.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        module.train(training)
