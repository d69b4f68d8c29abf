"""Newton–Schulz in CUDA C++: all steps of all matrices of short sides up to 256 in one launch, on chip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import MISSING

MAX_SHORT_SIDE, MAX_STEPS = 256, 32
# Up to here one Triton program holds a matrix, and several share a multiprocessor. Which is faster is not measured yet.
TRITON_SIDE = 128

if MISSING["cuda"] is None:
    torch.library.register_fake(
        "fedkernels::newton_schulz_cuda",
        lambda u, coefficients, margin: [batch.new_empty(batch.shape) for batch in u],
    )


def cuda_on_matrices(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """What the kernel can run."""
    if device != "cuda":
        return f"runs on cuda, not on {device}"
    if dtype != torch.float32:
        return f"computes in float32, not in {str(dtype).removeprefix('torch.')}"
    if (side := min(shape[-2:])) > MAX_SHORT_SIDE:
        return f"holds short sides up to {MAX_SHORT_SIDE} on chip, not {side}"
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)
    return None if major >= 8 else f"needs compute capability 8.0, not {major}.{minor}"


def cuda_on_medium_matrices(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    """What the kernel should run."""
    if (reason := cuda_on_matrices(device, dtype, shape)) is not None:
        return reason
    side = min(shape[-2:])
    return f"left to triton up to a short side of {TRITON_SIDE}, as {side}" if side <= TRITON_SIDE else None


def newton_schulz_cuda(us: Sequence[Tensor], coefficients: list[float], margin: float) -> list[Tensor]:
    """Newton–Schulz of any number of batches `[..., rows, cols]` of any shapes in one launch."""
    if len(coefficients) > 3 * MAX_STEPS:
        raise ValueError(f"steps is {len(coefficients) // 3}, expected at most {MAX_STEPS} on cuda")
    os: list[Tensor] = torch.ops.fedkernels.newton_schulz_cuda(
        [u if _has_two_strides(u) else u.contiguous() for u in us], coefficients, margin
    )
    return os


def _has_two_strides(u: Tensor) -> bool:
    """Whether the dimensions before the matrices are two at most, where those are joined that continue another."""
    lead: list[tuple[int, int]] = []  # size and stride
    for size, stride in zip(u.shape[:-2], u.stride()[:-2], strict=True):
        if size > 1 and not (lead and lead[-1][1] == size * stride):
            lead.append((size, stride))
        elif size > 1:
            lead[-1] = (lead[-1][0] * size, stride)
    return len(lead) <= 2
