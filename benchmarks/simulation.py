"""Rounds of FedAvg: the engine against a bare torch and gloo loop, on the same job and in the same processes.

1,000 clients of 50 CIFAR-shaped samples, 50 of them a round, batches of 10, one local epoch of SGD with gradients
clipped to norm 10 on all sides. The sides take turns round by round, and the ratio of each pair of neighbours counts,
so a drift of the machine cancels. Before anything is timed they train on the same batches and must arrive at the same
parameters. pfl and Flower join where they are installed; Flower, which brings its own processes, between two runs of
the engine alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common import arguments, on_ranks, peak_rss_bytes, report, spread
from peers import HAS_FLOWER, HAS_PFL, Bare, Draws, EngineDraws, Flower, Job, Pfl, Side
from torch import Tensor

from fedkernels.algorithms import FedAvg
from fedkernels.data.datasets import Dataset
from fedkernels.data.partition import Partition
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.engine import Engine
from fedkernels.federated.evaluators import EvaluatorName
from fedkernels.federated.objective import Objective
from fedkernels.federated.settings import EngineSettings
from fedkernels.models import MODELS

# In float64 what is left is the 1e-6 that `clip_grad_norm_` adds to a norm. In float32 the order of sums decides now
# and then which of two nearly equal pixels a max pooling passes on; a wrong step still moves far more.
SAME_MOVEMENT = {torch.float64: 1e-5, torch.float32: 2e-2}
NETWORKS = ("lenet5", "cnn3x3")


class Ours:
    """The engine, used as a library, with clients one by one or many at once."""

    def __init__(self, job: Job, data: Dataset, evaluator: EvaluatorName = "loop") -> None:
        count = job.clients * job.samples
        partition = Partition(np.arange(count), np.arange(0, count + 1, job.samples))
        settings = EngineSettings(
            seed=job.seed,
            rounds=10**6,
            cohort=job.cohort,
            work=LocalWork(job.batch, local_epochs=1),
            lr=job.lr,
            schedule="constant",
            clip_norm=job.clip_norm,
            evaluator=evaluator,
        )
        self._engine = Engine(FedAvg(), Objective(job.module(), data, torch.device(job.device)), partition, settings)

    def run_round(self) -> float:
        loss = self._engine.run_round()["train_loss"]
        assert loss is not None
        return loss

    def parameters(self) -> dict[str, Tensor]:
        return self._engine.named_parameters()


MakeSide = Callable[[Job, Dataset, type[Draws]], Side]
SIDES: dict[str, MakeSide] = {
    "fedkernels": lambda job, data, draws: Ours(job, data),
    "fedkernels, batched": lambda job, data, draws: Ours(job, data, "batched"),
    "bare loop": lambda job, data, draws: Bare(job, data, draws(job)),
    "bare, channels last": lambda job, data, draws: Bare(job, data, draws(job), channels_last=True),
}
if HAS_PFL:
    SIDES["pfl"] = lambda job, data, draws: Pfl(job, data, draws(job))
OURS = "fedkernels"
# Batching clients pays on a GPU, where small clients wait for launches; on a CPU it costs time.
ON_GPU = ("fedkernels, batched",)


def sides_on(device: str) -> list[str]:
    return [name for name in SIDES if device == "cuda" or name not in ON_GPU]


def check_job(job: Job) -> Job:
    """A small job, with gradients clipped so low that every one is."""
    return replace(job, clients=20, cohort=4, clip_norm=0.1)


def difference(job: Job, name: str, make: MakeSide, dtype: torch.dtype, rounds: int) -> float:
    """How far a side ends from ours on the same batches, relative to how far ours has moved.

    Raises:
        ValueError: too far.
    """
    torch.set_default_dtype(dtype)
    data = job.data()
    sides = [make_side(job, data, EngineDraws) for make_side in (SIDES[OURS], make)]
    for side in sides:
        for _ in range(rounds):
            side.run_round()
    start = dict(job.module().to(job.device).named_parameters())
    torch.set_default_dtype(torch.float32)
    ours, other = (side.parameters() for side in sides)
    apart = sum((ours[n] - other[n]).square().sum() for n in start)
    moved = sum((ours[n] - p.detach()).square().sum() for n, p in start.items())
    relative = float(torch.as_tensor(apart / moved).sqrt())
    if not relative <= SAME_MOVEMENT[dtype]:
        raise ValueError(f"{job.model}, {name}: {relative:.1e} of the movement apart in {dtype}; nothing was timed")
    return relative


@dataclass
class Times:
    """Of one side, per round: on the wall clock, and of this process on its processor."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


def check_sides(job: Job) -> dict[str, float]:
    """How far each side that takes turns ends from ours."""
    # pfl sends updates as float32.
    precisions = {name: (torch.float32, 1) if name == "pfl" else (torch.float64, 2) for name in SIDES}
    return {name: difference(check_job(job), name, SIDES[name], *precisions[name]) for name in sides_on(job.device)}


def time_sides(job: Job, rounds: int, names: Sequence[str]) -> dict[str, Times]:
    """Round times of sides that take turns, after one round each."""
    data = job.data()
    sides = {name: SIDES[name](job, data, Draws) for name in names}
    for side in sides.values():
        side.run_round()
    times = {name: Times() for name in names}
    for r in range(rounds):
        # Forwards and backwards in turn, so that no side always follows the same other one.
        for name in list(sides)[:: 1 if r % 2 == 0 else -1]:
            if dist.is_initialized():
                dist.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            sides[name].run_round()
            if job.device == "cuda":
                torch.cuda.synchronize()
            times[name].wall_s.append(time.perf_counter() - start)
            times[name].cpu_s.append(time.process_time() - start_cpu)
    return times


def peak_of_side(job: Job, name: str) -> int:
    """Peak memory of a process that holds the data and runs this side alone."""
    side = SIDES[name](job, job.data(), Draws)
    side.run_round()
    return peak_rss_bytes()


@dataclass
class Measured:
    """One side of one job on one number of ranks."""

    side: str
    relative_difference: float
    peak_rss_bytes: int
    rounds_wall_s: list[float]
    rounds_cpu_s: list[float]
    ours_over_side: list[float]
    ours_over_side_cpu: list[float]


def measure_sides(job: Job, rounds: int, ranks: int, peaks: dict[str, int]) -> list[Measured]:
    """The sides that take turns."""
    # Ranks leave a round together, so the first one's clock stands for all.
    apart = on_ranks(ranks, check_sides, job)[0]
    times = on_ranks(ranks, time_sides, job, rounds, sides_on(job.device))[0]
    ours = times[OURS]
    return [
        Measured(
            name,
            apart[name],
            peaks[name],
            side.wall_s,
            side.cpu_s,
            ratios(ours.wall_s, side.wall_s),
            ratios(ours.cpu_s, side.cpu_s),
        )
        for name, side in times.items()
    ]


def run_flower(job: Job, rounds: int, actors: int) -> tuple[float, list[float], int]:
    """Flower's difference from ours, seconds per round, and an actor's peak memory."""
    # It samples clients itself; in the check all take part.
    everyone = replace(check_job(job), clients=4)
    apart = difference(everyone, "Flower", lambda j, _, draws: Flower(j, draws, actors), torch.float32, 1)
    flower = Flower(job, Draws, actors)
    return apart, flower.run(rounds), flower.actor_peak_rss_bytes


def measure_flower(job: Job, rounds: int, ranks: int) -> Measured:
    """Flower with an actor per rank, between two runs of ours."""
    before = on_ranks(ranks, time_sides, job, rounds, [OURS])[0][OURS]
    apart, wall_s, peak = on_ranks(1, run_flower, job, rounds, ranks)[0]
    after = on_ranks(ranks, time_sides, job, rounds, [OURS])[0][OURS]
    beside = [(a + b) / 2 for a, b in zip(before.wall_s, after.wall_s, strict=True)]
    return Measured("Flower", apart, peak, wall_s, [], ratios(beside, wall_s), [])


def ratios(ours: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(ours, other, strict=True)]


def shown(values: Sequence[float]) -> str:
    """Median and extremes, or nothing."""
    if not values:
        return ""
    of = spread(values)
    return f"{of['median']:.3f} ({of['min']:.3f} to {of['max']:.3f})"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", default=list(NETWORKS), choices=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, help="1 and 2 on a CPU, 1 on a GPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", nargs="+", type=int, default=[10, 4], help="timed rounds, one number per model")
    options = parser.parse_args()
    if len(options.rounds) != len(options.models):
        parser.error(f"--rounds has {len(options.rounds)} numbers for {len(options.models)} models")
    names = sides_on(options.device)
    columns = ["model", "parameters", "ranks", "side", "round, ms", "fedkernels / side", "in CPU time", "peak RSS, MB"]
    rows: list[list[Any]] = []
    details: list[dict[str, Any]] = []
    for model, rounds in zip(options.models, options.rounds, strict=True):
        job = Job(model, device=options.device)
        d = sum(p.numel() for p in job.module().parameters())
        # A process's peak depends on neither the cohort nor the other ranks.
        peaks = {name: on_ranks(1, peak_of_side, replace(job, cohort=4), name)[0] for name in names}
        for ranks in options.ranks or ([1, 2] if options.device == "cpu" else [1]):
            measured = measure_sides(job, rounds, ranks, peaks)
            if HAS_FLOWER and options.device == "cpu":
                measured.append(measure_flower(job, rounds, ranks))
            for m in measured:
                round_ms = 1e3 * spread(m.rounds_wall_s)["median"]
                ratio, cpu_ratio = (
                    ("", "") if m.side == OURS else (shown(m.ours_over_side), shown(m.ours_over_side_cpu))
                )
                memory_mb = round(m.peak_rss_bytes / 1e6)
                rows.append([model, f"{d:,}", ranks, m.side, f"{round_ms:.0f}", ratio, cpu_ratio, memory_mb])
                details.append({"model": model, "parameters": d, "ranks": ranks, **asdict(m)})
                print(*rows[-1], sep="  ", flush=True)
    report("simulation", {"columns": columns, "rows": rows}, {"sides": details}, options.out, options.device)


if __name__ == "__main__":
    main()
