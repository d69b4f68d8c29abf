"""Newton–Schulz iteration for the orthogonal factor of matrices."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import MISSING, Backend, Rule, choose, cpp_on_rows, triton_on_rows
from .cuda import MAX_STEPS, cuda_on_matrices, cuda_on_medium_matrices, newton_schulz_cuda
from .reference import POLAR_EXPRESS, QUINTIC, Orthogonalization, newton_schulz_reference, schedule

__all__ = [
    "POLAR_EXPRESS",
    "QUINTIC",
    "Orthogonalization",
    "is_row_major",
    "newton_schulz",
    "newton_schulz_all",
    "rules_of",
    "run",
]

# Of matrices, the limits of Triton and C++ are those of rows: the device and the dtype. Their kernels choose by shape.
RULES: dict[Backend, Rule] = {"cuda": cuda_on_medium_matrices, "triton": triton_on_rows, "cpp": cpp_on_rows}

if MISSING["cpp"] is None:
    torch.library.register_fake("fedkernels::newton_schulz_cpp", lambda u, coefficients, margin: u.new_empty(u.shape))


def newton_schulz(
    u: Tensor, steps: int = 5, method: Orthogonalization = "newton_schulz", *, backend: str | None = None
) -> Tensor:
    """Approximate polar factor `U V^T` of every matrix in a batch, by an odd quintic polynomial.

    `X ← aX + b(XXᵀ)X + c(XXᵀ)²X` from `X = U/(‖U‖_F + 1e-7)`. Five steps of `newton_schulz` drive singular values
    between 1/60 and 1 into about [0.7, 1.2], and keep them there; five of `polar_express`, whose a, b and c change with
    the step and which starts from `X = U/(1.01 ‖U‖_F + 1e-7)`, drive those between 1e-3 and 1 into [0.84, 1.13], and
    further steps to 1.

    Entries of any size that the dtype holds are fine: the norm neither overflows nor loses a matrix of large entries to
    infinity. A matrix that is not finite becomes NaN, and touches no other of its batch.

    Args:
        u: `[..., rows, cols]`, float32; float64 without Triton, anything on the reference. A batch may have any
            strides; matrices that are not row-major are copied. Tall ones are transposed, to work on the short side.
        steps: quintic steps.
        method: whose coefficients.
        backend: `reference`, `cpp`, `triton` or `cuda`; by default the fastest that can run. On the first two, whose
            products are float32, five steps differ from the polynomial in float64 by less than 2e-4 of the norm of the
            result. `triton` and `cuda`, where products of float16 are added up in float32, stay within 1 % on matrices
            of any spectrum, `triton` within 2 % where the short side is below 8. FEDKERNELS_AMX=1 lets `cpp` multiply
            float32 in tiles of bfloat16, two for each factor, where the short side is 32 or more: in half the time,
            with other bits, within 0.2 %, or 1 % where the rank is below 16.

    Returns:
        A new contiguous tensor of the shape and dtype of `u`; on the reference, transposed where matrices are tall.

    Raises:
        ValueError: `u` has fewer than two dimensions or holds integers, `steps` is negative, or there is no such
            method.
        BackendError: the backend asked for cannot run here.

    Example:
        >>> newton_schulz(torch.eye(2)).diagonal().round().tolist()
        [1.0, 1.0]

    References: Jordan et al., Muon, 2024 (https://kellerjordan.github.io/posts/muon/); Amsel et al., The Polar Express:
    Optimal matrix sign methods and their application to the Muon algorithm, 2025 (arXiv 2505.16932), Algorithm 1.
    """
    return newton_schulz_all([u], steps, method, backend=backend)[0]


def newton_schulz_all(
    us: Sequence[Tensor], steps: int = 5, method: Orthogonalization = "newton_schulz", *, backend: str | None = None
) -> list[Tensor]:
    """`newton_schulz` of batches of any shapes: those that CUDA C++ takes in one launch, the others one by one.

    Args:
        us: each as `u` of `newton_schulz`, and on one device.
        steps, method, backend: likewise.

    Example:
        >>> [o.shape for o in newton_schulz_all([torch.ones(3, 2, 4), torch.eye(5)])]
        [torch.Size([3, 2, 4]), torch.Size([5, 5])]
    """
    for u in us:
        if u.dim() < 2:
            raise ValueError(f"u has shape {list(u.shape)}, expected [..., rows, cols]")
        if not u.is_floating_point():
            raise ValueError(f"u is {str(u.dtype).removeprefix('torch.')}, expected real floating-point numbers")
    polynomials, rules = schedule(method, steps), rules_of(steps, backend)
    found: list[Tensor] = []
    in_cuda: list[int] = []
    for i, u in enumerate(us):
        if u.numel() == 0:
            found.append(torch.empty_like(u))
            continue
        chosen = choose("newton_schulz", rules, u.device.type, u.dtype, tuple(u.shape), backend).backend
        if chosen == "cuda":
            in_cuda.append(i)
        found.append(u if chosen == "cuda" else run(chosen, u, *polynomials))
    if in_cuda:
        for i, o in zip(in_cuda, newton_schulz_cuda([us[i] for i in in_cuda], *polynomials), strict=True):
            found[i] = o
    return found


def rules_of(steps: int = 5, backend: str | None = None) -> dict[Backend, Rule]:
    """The rules of a call with that many steps: who asks for CUDA gets it for all that it can run, not only for what it
    is best at."""
    rules = dict(RULES)
    if (backend or os.environ.get("FEDKERNELS_BACKEND")) == "cuda":
        rules["cuda"] = cuda_on_matrices
    if steps > MAX_STEPS:
        rules["cuda"] = lambda device, dtype, shape: f"takes at most {MAX_STEPS} steps, not {steps}"
    return rules


def run(backend: Backend, u: Tensor, coefficients: list[float], margin: float) -> Tensor:
    """Newton–Schulz on a backend that can run it, with the coefficients of every step."""
    if backend == "reference":
        return newton_schulz_reference(u, coefficients, margin)
    if backend == "cuda":
        return newton_schulz_cuda([u], coefficients, margin)[0]
    if not is_row_major(u):
        u = u.contiguous()
    if backend == "triton":
        from .triton import newton_schulz_triton

        return newton_schulz_triton(u, coefficients, margin)
    out: Tensor = torch.ops.fedkernels.newton_schulz_cpp(u, coefficients, margin)
    return out


def is_row_major(batch: Tensor) -> bool:
    """Whether every matrix of `[..., rows, cols]` is row-major without gaps, however far apart they are."""
    rows, cols = batch.shape[-2:]
    return (cols <= 1 or batch.stride(-1) == 1) and (rows <= 1 or batch.stride(-2) == cols)
