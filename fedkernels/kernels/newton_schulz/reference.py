"""Newton–Schulz in plain PyTorch: the polynomials, and what the kernels must equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def schedule(method: Orthogonalization, steps: int) -> tuple[list[float], float]:
    """The coefficients a, b and c of every step, one after the other, and what ‖U‖ is multiplied with at first.

    Raises:
        ValueError: `steps` is negative, or there is no such method.
    """
    if method not in _SCHEDULES:
        raise ValueError(f"method is {method!r}, expected {' or '.join(_SCHEDULES)}")
    if steps < 0:
        raise ValueError(f"steps is {steps}, expected at least 0")
    *first, last = _SCHEDULES[method]
    rows = islice(chain(first, repeat(last)), steps)
    return list(chain.from_iterable(rows)), 1.0 if method == "newton_schulz" else SAFETY


def normalised(u: Tensor, margin: float) -> Tensor:
    """`U/(margin · ‖U‖_F + 1e-7)`, whatever the size of the entries.

    Squares of float32 overflow from 1e19 on. Entries divided by the power of two below the largest of their matrix,
    which changes none of their bits, are at most 2: one more pass that only reads, where a norm in float64 would
    convert every entry.
    """
    largest = torch.linalg.vector_norm(u, math.inf, dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(u.dtype).tiny)
    power = largest / (2 * torch.frexp(largest).mantissa)
    x = u / power
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    return x.div_(norm * margin + 1e-7 / power)


def newton_schulz_reference(u: Tensor, coefficients: Sequence[float], margin: float) -> Tensor:
    tall = u.shape[-2] > u.shape[-1]
    x = normalised(u.mT if tall else u, margin)
    for a, b, c in zip(*[iter(coefficients)] * 3, strict=True):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
