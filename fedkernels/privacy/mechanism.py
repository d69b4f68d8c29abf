"""The Gaussian mechanism on sums over clients: one clip a client, one noise draw a round, one fixed divisor."""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from ..rng import Purpose, stream
from ..wire import Wire
from .accountant import METHODS, MOST_NOISE, Method


def _public(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError("C is one fixed public number: no ε covers a norm taken from clients' data") from None
    return value


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """How client updates are released.

    Args:
        noise_multiplier: σ, below a million; the noise on the sum over clients has standard deviation σC.
        clip: C, the l2 norm that all a client sends in a round is clipped to; a fixed public number.
        delta: δ of the (ε, δ) guarantee; below 1/clients.
        target_epsilon: the run ends before ε would exceed it; null for no limit.
        accountant: whose ε counts towards the target.
        noise: `seeded` is reproducible, `secure` comes from the operating system's generator and is not.
        noise_seed: of seeded noise and of the cohorts, a secret apart from the run's seed, for one published run; null
            draws one and keeps what follows from it in the checkpoints.

    Raises:
        ValueError: a number outside its range, an unknown name, or a seed for secure noise.
    """

    noise_multiplier: Annotated[float, Field(gt=0, lt=MOST_NOISE)]
    clip: Annotated[float, Field(gt=0, lt=math.inf), BeforeValidator(_public)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    target_epsilon: Annotated[float, Field(gt=0, lt=math.inf)] | None = None
    accountant: Method = "pld"
    noise: Literal["seeded", "secure"] = "seeded"
    noise_seed: Annotated[int, Field(ge=0)] | None = None

    def __post_init__(self) -> None:
        # Not only configurations make one, and nothing later would show that no noise was added.
        limits: dict[str, float] = {"noise_multiplier": MOST_NOISE, "clip": math.inf, "delta": 1.0}
        if self.target_epsilon is not None:
            limits["target_epsilon"] = math.inf
        for name, limit in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < limit:
                raise ValueError(f"privacy.{name}: {value!r}, expected a number > 0 and < {limit:g}")
        for name, known in (("accountant", METHODS), ("noise", ("seeded", "secure"))):
            if getattr(self, name) not in known:
                raise ValueError(f"privacy.{name}: {getattr(self, name)!r}, expected {' or '.join(known)}")
        if self.noise == "secure" and self.noise_seed is not None:
            raise ValueError(f"privacy.noise_seed: {self.noise_seed} has no effect on secure noise; leave it null")


def check(
    privacy: Privacy | None,
    wires: Mapping[str, Wire],
    *,
    algorithm: str,
    sampling: str,
    weighting: str,
    local_steps: int | None,
    on_nonfinite: str,
) -> None:
    """Refuse a run whose releases the accountant would not describe.

    Raises:
        ValueError: private wires without settings, wires that would go out un-noised, a cohort not drawn by independent
            coins, weights, a number of steps or an end that depend on clients' data.
    """
    if privacy is None:
        if private := [name for name, wire in wires.items() if wire.private]:
            raise ValueError(
                f"privacy: missing; {algorithm} sends {', '.join(map(repr, private))} through the private mechanism: "
                "set privacy.noise_multiplier, privacy.clip and privacy.delta"
            )
        return
    if bare := [name for name, wire in wires.items() if not wire.private]:
        raise ValueError(
            f"privacy: {algorithm} sends {', '.join(map(repr, bare))} un-noised, so no ε would hold; "
            "choose an algorithm whose wires are all private, such as dp_fedavg"
        )
    if sampling != "poisson":
        raise ValueError(
            f"sampling: {sampling!r}; privacy needs poisson, clients that join on independent coins, "
            "also where all take part: ε is accounted for that"
        )
    if weighting != "uniform":
        raise ValueError(
            f"weighting: {weighting!r}; privacy needs uniform: a client must weigh 1, whatever data it has"
        )
    if local_steps is None:
        raise ValueError("local_steps: missing; under privacy K is a public number, not that of the largest client")
    if on_nonfinite != "drop_client":
        raise ValueError(
            f"on_nonfinite: {on_nonfinite!r}; privacy needs drop_client, since a stop would tell that a client sent NaN"
        )


class GaussianMechanism:
    """`M(r_1, ..., r_S) = (Σ_i r_i min(1, C/‖r_i‖) + σC z) / (qN)`, `z ~ N(0, I)`, with everything but r public.

    Adding or removing a client moves the sum by at most C, so σ is the noise multiplier the accountant is told. The
    divisor does not know who came. In floating point the argument holds to rounding only: see Mironov, On significance
    of the least significant bits for differential privacy, 2012.

    Args:
        privacy: σ, C and the kind of noise.
        divisor: qN, the expected cohort.
        run: which run it is: those that differ share no noise and no cohorts, whatever their `noise_seed`.

    Attributes:
        seed: of cohorts and of seeded noise: a secret that all ranks and all continuations of a run share.
        secure: whether the noise comes from the operating system instead.
    """

    def __init__(self, privacy: Privacy, divisor: float, run: int = 0) -> None:
        self.clip = privacy.clip
        self.scale = privacy.noise_multiplier * privacy.clip
        self.divisor = divisor
        self.secure = privacy.noise == "secure"
        noise_seed = secrets.randbits(128) if privacy.noise_seed is None else privacy.noise_seed
        self.seed = int.from_bytes(hashlib.sha256(f"{noise_seed} {run}".encode()).digest()[:16])

    def clip_factor(self, norm: Tensor) -> Tensor:
        """`min(1, C/‖r‖)` of float64 norms."""
        return (self.clip / norm).clamp(max=1)

    def noise(self, r: int, size: int) -> Tensor:
        """σC z of round `r`, `[size]` float64 on the host; another one at every call where noise is secure."""
        z = secure_normal(size) if self.secure else seeded_normal(self.seed, r, size)
        return torch.from_numpy(z).mul_(self.scale)


def seeded_normal(seed: int, r: int, size: int) -> np.ndarray:
    """Standard normal numbers `[size]` of round `r`; a function of its arguments."""
    return stream(seed, Purpose.NOISE, r).standard_normal(size)


def secure_normal(size: int) -> np.ndarray:
    """Standard normal numbers `[size]` from the operating system's cryptographic generator, by Box and Muller:
    `√(−2 ln u) cos 2πv` and `√(−2 ln u) sin 2πv` of uniform u in (0, 1] and v in [0, 1)."""
    pairs = -(-size // 2)
    bits = np.frombuffer(os.urandom(16 * pairs), dtype=np.uint64) >> np.uint64(11)
    u, v = (bits[:pairs] + np.uint64(1)) * 2.0**-53, bits[pairs:] * 2.0**-53
    radius = np.sqrt(-2 * np.log(u))
    return np.concatenate([radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)])[:size]
