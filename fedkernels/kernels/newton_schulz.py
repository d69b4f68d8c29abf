"""Newton–Schulz iteration for the orthogonal factor of a matrix."""

from __future__ import annotations

from itertools import chain, islice, repeat
from typing import Literal

import torch
from torch import Tensor

Orthogonalization = Literal["newton_schulz", "polar_express"]

QUINTIC = (3.4445, -4.7750, 2.0315)

# Amsel et al., Algorithm 1: step t is the best odd quintic for the interval that step t − 1 maps [1e-3, 1] to. From the
# last on, steps are the Padé quintic.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# Their section 4.4: rounding may push a singular value above its interval, where the polynomials grow steeply.
SAFETY = 1.01
_SCHEDULES: dict[Orthogonalization, tuple[tuple[float, float, float], ...]] = {
    "newton_schulz": (QUINTIC,),
    "polar_express": (
        *((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]),
        POLAR_EXPRESS[-1],
    ),
}


def newton_schulz(u: Tensor, steps: int = 5, method: Orthogonalization = "newton_schulz") -> Tensor:
    """Approximate polar factor `U V^T` of every matrix in a batch, by an odd quintic polynomial.

    `X ← aX + b(XXᵀ)X + c(XXᵀ)²X` from `X = U/‖U‖_F`. Five steps of `newton_schulz` drive singular values between 1/60
    and 1 into about [0.7, 1.2], and keep them there; five of `polar_express`, whose a, b and c change with the step and
    which starts from `X = U/(1.01 ‖U‖_F)`, drive those between 1e-3 and 1 into [0.84, 1.13], and further steps to 1.

    Args:
        u: `[..., rows, cols]`; computed in its own dtype; tall matrices are transposed, to work on the short side.
        steps: quintic steps.
        method: whose coefficients.

    Example:
        >>> newton_schulz(torch.eye(2)).diagonal().round().tolist()
        [1.0, 1.0]

    References: Jordan et al., Muon, 2024 (https://kellerjordan.github.io/posts/muon/); Amsel et al., The Polar Express:
    Optimal matrix sign methods and their application to the Muon algorithm, 2025 (arXiv 2505.16932), Algorithm 1.
    """
    *first, last = _SCHEDULES[method]
    tall = u.shape[-2] > u.shape[-1]
    x = u.mT if tall else u
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    # In float32 the squares of entries beyond 1e19 overflow, and x / ∞ would be zero.
    wide = torch.linalg.matrix_norm(x, keepdim=True, dtype=torch.float64).to(x.dtype)
    margin = 1.0 if method == "newton_schulz" else SAFETY
    x = x / (torch.where(norm.isinf(), wide, norm) * margin + 1e-7)
    for a, b, c in islice(chain(first, repeat(last)), steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
