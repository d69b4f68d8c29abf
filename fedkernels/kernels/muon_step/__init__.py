"""Muon's step on matrices: momentum, orthogonalization and the move of the parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import MISSING, Backend, Rule, choose, require, require_scalars, triton_on_rows
from ..newton_schulz import Orthogonalization, is_row_major
from ..newton_schulz import rules_of as rules_of_newton_schulz
from ..newton_schulz.reference import schedule
from .reference import muon_step_reference

if MISSING["cpp"] is None:
    torch.library.register_fake("fedkernels::muon_step_cpp", lambda *arguments, **options: None)


def muon_step(
    y: Tensor,
    M: Tensor,
    g: Tensor,
    *,
    lr: Tensor,
    momentum: float,
    weight_decay: float = 0.0,
    scale: float = 1.0,
    share: float = 1.0,
    alpha: float = 0.0,
    G: Tensor | None = None,
    active: Tensor | None = None,
    steps: int = 5,
    method: Orthogonalization = "newton_schulz",
    backend: str | None = None,
) -> None:
    """One step of Muon with a global direction on the matrices of one shape of `C` clients, `y` and `M` in place.

    `M ← M + (1−β)(g − M)`, `U = g + β(M − g)`, `y ← y − η(s(ηₘ NS(U) + λy) + αG)`. On the CPU a matrix passes through
    all of it while it is in the cache.

    Args:
        y: parameters `[C, count, rows, cols]`, float32; float64 without Triton. Usually a view of rows `[C, d]`:
            clients and matrices may be any distance apart, and each matrix is row-major without gaps.
        M: momentum, of that shape, with strides of its own.
        g: gradients, likewise, in the dtype of `y`.
        lr: η on the device, one value or `[C]`.
        momentum: β.
        weight_decay: λ, decoupled.
        scale: ηₘ, a factor of the orthogonal matrices.
        share: s, weight of the local direction.
        alpha: α, weight of the global direction.
        G: global direction `[count, rows, cols]`, the same for all clients.
        active: `[C]` bool; other clients keep parameters and momentum.
        steps: steps of `newton_schulz`.
        method: whose coefficients those have.
        backend: `reference`, `cpp`, `triton` or `cuda`; by default the fastest that can run. On `cuda` the step begins
            and ends in Triton, and has its matrices orthogonalized by CUDA C++ in between.

    Raises:
        ValueError: a tensor is on another device, of another shape or dtype than above, has matrices with gaps, or is
            written to and has some that overlap.
        BackendError: the backend asked for cannot run here.

    Example:
        >>> y, M = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
        >>> muon_step(y, M, torch.eye(2).view(1, 1, 2, 2), lr=torch.tensor(1.0), momentum=0.9)
        >>> y.round().flatten().tolist()
        [-1.0, 0.0, 0.0, -1.0]
    """
    if y.dim() != 4:
        raise ValueError(f"y has shape {list(y.shape)}, expected [C, count, rows, cols]")
    _require_matrices("y", y, y, written=True)
    _require_matrices("M", M, y, written=True)
    _require_matrices("g", g, y)
    require("G", G, y, tuple(y.shape[1:]), y.dtype)
    require("active", active, y, (len(y),), torch.bool)
    require_scalars("lr", lr, y, len(y))
    polynomials = schedule(method, steps)
    if y.numel() == 0:
        return
    chosen = choose("muon_step", rules_of(steps, backend), y.device.type, y.dtype, tuple(y.shape), backend).backend
    arguments = (y, M, g, lr, momentum, weight_decay, scale, share, alpha, G, active, *polynomials)
    if chosen in ("triton", "cuda"):
        from .triton import muon_step_triton

        muon_step_triton(*arguments, chosen)
    elif chosen == "cpp":
        torch.ops.fedkernels.muon_step_cpp(*arguments)
    else:
        muon_step_reference(*arguments)


def rules_of(steps: int = 5, backend: str | None = None) -> dict[Backend, Rule]:
    """The rules of a call: matrices go where `newton_schulz` alone would send them, if what goes before can run."""
    rules = rules_of_newton_schulz(steps, backend)
    in_between = rules["cuda"]

    def cuda(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
        if (reason := in_between(device, dtype, shape)) is not None:
            return reason
        reason = MISSING["triton"] or triton_on_rows(device, dtype, shape)
        return None if reason is None else f"begins and ends in triton, and that cannot: {reason}"

    rules["cuda"] = cuda
    return rules


def _require_matrices(name: str, tensor: Tensor, y: Tensor, *, written: bool = False) -> None:
    """Check that what holds one matrix after the other fits `y`, and that each is row-major without gaps."""
    if tensor.device != y.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {y.device}")
    if tensor.shape != y.shape or tensor.dtype != y.dtype:
        found, expected = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (tensor, y))
        raise ValueError(f"{name} is {found}, expected {expected}")
    if not is_row_major(tensor):
        raise ValueError(f"{name} has matrices of strides {list(tensor.stride()[-2:])}, expected {[y.shape[-1], 1]}")
    extent = y.shape[2] * y.shape[3]
    for stride, count in sorted(zip(tensor.stride()[:2], y.shape[:2], strict=True)) if written else ():
        if count == 1 or stride >= extent:
            extent += stride * (count - 1)
            continue
        raise ValueError(f"{name} has matrices that overlap: strides {list(tensor.stride())} of shape {list(y.shape)}")
