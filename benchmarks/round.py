"""Whole rounds of ViT-Tiny: reference steps, the fastest kernels, and those overlapped; and where the time goes.

One process of one thread trains clients on CIFAR-shaped noise. Engines take turns round by round: `kernels: reference`,
`auto`, and `auto` with what clients send taken in while the next ones train, on a second core, also with Muon's
matrices in AMX tiles. Before anything is timed all train two clients in float64 and must arrive at the same parameters.
The gradient is forward and backward, the optimizer is what steps from it, the tail is the rest: sampling, Δ, sums,
server; overlapped, what is left to wait for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from common import arguments, noise_images, on_ranks, report, spread
from newton_schulz import amx_is, has_amx

from fedkernels.algorithms import FedAdamW, FedMuon
from fedkernels.contract import Algorithm
from fedkernels.data.partition import Partition
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.behind import Overlap
from fedkernels.federated.codecs import Int8
from fedkernels.federated.engine import Engine
from fedkernels.federated.objective import Objective
from fedkernels.federated.settings import EngineSettings
from fedkernels.kernels.dispatch import KernelsName
from fedkernels.models import MODELS
from fedkernels.optim import AdamW, Muon

ALGORITHMS: dict[str, tuple[Algorithm, type]] = {"fedmuon": (FedMuon(), Muon), "fedadamw": (FedAdamW(), AdamW)}
SIDES: dict[str, tuple[KernelsName, Overlap]] = {
    "reference": ("reference", "never"),
    "auto": ("auto", "never"),
    "auto, overlapped": ("auto", "always"),
    "auto, overlapped, FEDKERNELS_AMX=1": ("auto", "always"),
}
IN_TILES = {"auto, overlapped, FEDKERNELS_AMX=1"}  # float32 matrices of Muon
PARTS = ("gradient", "optimizer", "tail")
# Of the update of one round, in float64. In float32 the key biases of attention, whose gradient is rounding that Adam
# blows up, differ by all of their update.
SAME_UPDATE = 1e-6


@dataclass(frozen=True)
class Job:
    """One cell of the table."""

    algorithm: str
    cohort: int
    steps: int
    batch: int
    rounds: int
    device: str
    int8: bool = False


class Clock:
    """Seconds spent in functions, by part of a round."""

    def __init__(self, device: str) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._device = device

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = now(self._device)
            result = function(*arguments)
            self.seconds[part] += now(self._device) - start
            return result

        return call


def now(device: str) -> float:
    """The time when the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def watched(engine: Engine, optimizer: type, device: str) -> Iterator[Clock]:
    """Time gradients and steps, as long as the block lasts."""
    clock, evaluator, step = Clock(device), engine.evaluator, optimizer.step
    engine._evaluator = clock.timed("gradient", evaluator)
    optimizer.step = clock.timed("optimizer", step)
    try:
        yield clock
    finally:
        engine._evaluator, optimizer.step = evaluator, step


def make(job: Job, side: str, dtype: torch.dtype = torch.float32) -> Engine:
    data = noise_images(job.cohort * job.batch, (3, 32, 32))
    torch.manual_seed(0)
    choice = MODELS["vit"]()
    module = choice.build(data.kind, data.input_shape, data.classes)
    count = job.cohort * job.batch
    partition = Partition(np.arange(count), np.arange(0, count + 1, job.batch))
    kernels, overlap = SIDES[side]
    settings = EngineSettings(
        rounds=10**6,
        cohort=job.cohort,
        work=LocalWork(job.batch, local_steps=job.steps),
        lr=1e-3,
        schedule="constant",
        evaluator="loop",
        kernels=kernels,
        overlap=overlap,
        codec=Int8() if job.int8 else None,
        clients_per_batch=1,
    )
    algorithm, _ = ALGORITHMS[job.algorithm]
    return Engine(
        algorithm,
        Objective(module.to(dtype), data, torch.device(job.device)),
        partition,
        settings,
        roles=choice.roles(module),
    )


def check(job: Job) -> None:
    """Compare a round of two clients on all sides.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    updates = []
    for side in SIDES:
        engine = make(replace(job, cohort=2, int8=False), side, torch.float64)
        start = engine.server.x.clone()
        engine.run_round()
        updates.append(engine.server.x - start)
    apart = max(float((update - updates[0]).norm() / updates[0].norm()) for update in updates[1:])
    if not apart <= SAME_UPDATE:
        raise RuntimeError(f"{job.algorithm}: the sides differ by {apart:.1e} of an update; nothing was timed")


def measure(job: Job) -> dict[str, dict[str, list[float]]]:
    """Seconds of every round and part, by side."""
    check(job)
    sides = [side for side in SIDES if side not in IN_TILES or (job.algorithm == "fedmuon" and has_amx())]
    engines = {side: make(job, side) for side in sides}
    for engine in engines.values():
        engine.run_round()
    seconds: dict[str, dict[str, list[float]]] = {side: {part: [] for part in ("round", *PARTS)} for side in sides}
    for _ in range(job.rounds):
        for side, engine in engines.items():
            tiles = amx_is("1" if side in IN_TILES else "0")
            with tiles, watched(engine, ALGORITHMS[job.algorithm][1], job.device) as clock:
                begin = now(job.device)
                engine.run_round()
                whole = now(job.device) - begin
            clock.seconds["tail"] = whole - clock.seconds["gradient"] - clock.seconds["optimizer"]
            for part, value in (("round", whole), *clock.seconds.items()):
                seconds[side][part].append(value)
    print(engines["auto"].kernels.summary())
    return seconds


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--cohort", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    rows, details = [], {}
    common = (options.cohort, options.steps, options.batch, options.rounds, options.device)
    for name, int8 in (("fedmuon", False), ("fedadamw", False), ("fedadamw", True)):
        job = Job(name, *common, int8=int8)
        label = f"{name}, int8" if int8 else name
        (seconds,) = on_ranks(1, measure, job)
        details[label] = {
            "job": asdict(job),
            "seconds": {
                side: {part: spread(values) for part, values in parts.items()} for side, parts in seconds.items()
            },
        }
        for side in seconds:
            medians = {part: spread(values)["median"] for part, values in seconds[side].items()}
            shares = [f"{medians[part] / medians['round']:.1%}" for part in PARTS]
            ratios = zip(seconds["reference"]["round"], seconds[side]["round"], strict=True)
            gain = f"{spread([a / b for a, b in ratios])['median']:.2f}"
            rows.append([label, side, f"{medians['round']:.2f}", *shares, f"{medians['optimizer']:.3f}", gain])
    columns = [
        "algorithm",
        "kernels",
        "round, s",
        *(f"{part}, share" for part in PARTS),
        "optimizer, s",
        "reference / it",
    ]
    report("round", {"columns": columns, "rows": rows}, details, options.out, options.device)


if __name__ == "__main__":
    main()
