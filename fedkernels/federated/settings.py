"""How rounds are run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..kernels.dispatch import KernelsName
from ..privacy.mechanism import Privacy
from ..wire import Codec
from .batches import LocalWork
from .behind import Overlap
from .closing import DropSlowest
from .evaluators import EvaluatorName
from .parallel import DeepSpeedSettings, Sharding
from .schedule import LrSchedule


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How rounds are run.

    Args:
        rounds: R, also the length of the cosine schedule.
        cohort: clients per round, S; under Poisson sampling the expected number.
        clip_norm: l2 norm that every mini-batch gradient is clipped to; infinity for none.
        codec: of the updates that clients send on wires like params without one of their own; None sends floats.
        weighting: `uniform` averages clients, `samples` weights them by their number of samples.
        clients_per_batch: clients a rank trains at once; None lets the evaluator decide.
        placement: `estimated` balances local steps over ranks, `measured` also each rank's measured speed.
        microbatch_size: samples of a mini-batch that go forward and backward at once; None for all of them.
        drop_slowest: sample more clients than the cohort, and leave out those that report last; None waits for all.
        overlap: take in what clients send while the next ones train, on a thread; `auto` where a core is spare.
        reduce_dtype: of sums over clients; `float64` makes float32 results independent of ranks and their order.
        reduction: `exact` sums integers, whose sum no number and order of ranks can change; `fast` sums `reduce_dtype`.
        kernels: what optimizer steps and the other ops run on; `auto` takes the fastest backend that can run each.
        store_memory_bytes: client state held in memory per rank before pages are mapped from files.
        sharding: how the ranks of a client group share its model; `none` where groups are single ranks.
        deepspeed: what `sharding: deepspeed` leaves to choose; None for its defaults.
        privacy: how an algorithm's private wires are released; they need it, and no other wires may be there with it.
    """

    seed: int = 0
    rounds: int
    cohort: int
    work: LocalWork
    lr: float
    schedule: LrSchedule = "cosine"
    sampling: Literal["uniform", "poisson"] = "uniform"
    weighting: Literal["uniform", "samples"] = "uniform"
    clip_norm: float = 10.0
    codec: Codec | None = None
    evaluator: EvaluatorName = "auto"
    clients_per_batch: int | None = None
    microbatch_size: int | None = None
    placement: Literal["estimated", "measured"] = "estimated"
    drop_slowest: DropSlowest | None = None
    overlap: Overlap = "auto"
    reduce_dtype: Literal["float64", "float32"] = "float64"
    reduction: Literal["exact", "fast"] = "fast"
    on_nonfinite: Literal["error", "drop_client"] = "error"
    kernels: KernelsName = "auto"
    store_memory_bytes: float = 2.0**30
    sharding: Sharding = "none"
    deepspeed: DeepSpeedSettings | None = None
    privacy: Privacy | None = None

    @property
    def sampled(self) -> int:
        """Clients to sample in a round."""
        return self.cohort if self.drop_slowest is None else self.drop_slowest.sampled(self.cohort)
