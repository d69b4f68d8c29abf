"""What `fedkernels diagnose` can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
Length = Annotated[float, Field(gt=0, lt=math.inf)]


@dataclass(frozen=True, kw_only=True)
class DiagnosisSettings:
    """How a run is measured.

    Args:
        seed: of subsamples, probes and directions.
        samples: most training samples of the global loss and of each client's; more are subsampled.
        iterations: most Lanczos iterations, a product with the Hessian each.
        tolerance: relative residual at which λ_max has settled.
        probes: of the trace.
        rho: radius of the ball of sharpness, ρ.
        ascent_steps: of the projected ascent in it.
        span: slices go from −span to span, in filter-normalised units.
        points: of the 1-D slice on each side of the model.
        grid: points of the 2-D slice on each side of the model.
        lr: of the round of local training; null takes the run's `lr`, before its schedule.
    """

    seed: Annotated[int, Field(ge=0)] = 0
    samples: Count = 2048
    iterations: Count = 60
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    probes: Annotated[int, Field(ge=2)] = 32
    rho: Length = 0.05
    ascent_steps: Count = 10
    span: Length = 1.0
    points: Count = 20
    grid: Count = 8
    lr: Length | None = None
