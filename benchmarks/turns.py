"""Ways to do a job that are compared with the truth, then take turns; and what is told of their times."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from common import spread


@dataclass(frozen=True)
class Variant:
    """A way to do a job.

    Args:
        run: does it once; returns what is checked.
        bytes: what it has to move; 0 where that is not what limits it.
        tolerance: the largest error with which it still counts as the same job.
        tolerances: in its place, of the errors of some names.
        foreign: made by a compiler or library that may not run here or be wrong, which is then told and not timed.
    """

    name: str
    run: Callable[[], Any]
    bytes: float = 0.0
    tolerance: float = 1.0
    foreign: bool = False
    tolerances: Mapping[str, float] = field(default_factory=dict)

    def allows(self, name: str) -> float:
        return self.tolerances.get(name, self.tolerance)


@dataclass(frozen=True)
class Job:
    """What the variants, ours first, do on the same memory.

    Args:
        facts: what tells this job from others: `op`, `shape`, `dtype` and more.
        errors: by name, of a variant that it runs; how it differs from the truth in float64.
        flops: of the equations, whatever a variant really does.
        bytes: of inputs and outputs, each moved once.
        ceiling: a copy where memory is the limit, a product of square matrices where arithmetic is.
        ceiling_work: its bytes, or its FLOP.
        limit: which of the two.
        prepare: what precedes a turn of all variants.
    """

    facts: dict[str, Any]
    variants: Sequence[Variant]
    errors: Callable[[Variant], dict[str, float]]
    flops: float
    bytes: float
    ceiling: Callable[[], Any]
    ceiling_work: float
    limit: str
    prepare: Callable[[], None]


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def graphed(run: Callable[[], Any], restore: Callable[[], None] = lambda: None) -> Callable[[], Any]:
    """The same, captured as a CUDA graph at the first call; `restore` undoes what the run before the capture did."""
    captured: list[tuple[torch.cuda.CUDAGraph, Any]] = []

    def replay() -> Any:
        if not captured:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run()  # compiles and allocates outside the capture
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured.append((graph, run()))
            restore()
        graph, result = captured[0]
        graph.replay()
        return result

    return replay


def check(job: Job) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """The errors of the variants that do the same job, and why foreign ones do not.

    Raises:
        SystemExit: an error of another variant is too large.
    """
    errors: dict[str, dict[str, float]] = {}
    refused: dict[str, str] = {}
    for variant in job.variants:
        job.prepare()
        try:
            found = job.errors(variant)
        except Exception as error:  # whatever a library can do wrong
            if not variant.foreign:
                raise
            refused[variant.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        shares = {name: error / variant.allows(name) for name, error in found.items()}
        worst = max(shares, key=lambda name: shares[name] if shares[name] == shares[name] else float("inf"))
        if shares[worst] <= 1:
            errors[variant.name] = found
            continue
        reason = f"error {found[worst]:.2g} of {worst}, expected at most {variant.allows(worst):g}"
        if not variant.foreign:
            raise SystemExit(f"{job.facts['op']}, {job.facts['shape']}, {variant.name}: {reason}; nothing was timed")
        refused[variant.name] = reason
    return errors, refused


def measure(job: Job, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Times of all variants, once each has passed its check."""
    errors, refused = check(job)
    for name, why in refused.items():
        print(f"not timed: {name}: {why}", flush=True)
    variants = [variant for variant in job.variants if variant.name in errors]
    everything = [job.ceiling, *(variant.run for variant in variants)]
    times: list[list[float]] = [[] for _ in everything]
    for r in range(repeats + 1):
        job.prepare()
        # Forwards and backwards in turn, so that none always follows the same other one.
        for i in range(len(everything))[:: 1 if r % 2 == 0 else -1]:
            elapsed = seconds(everything[i], device)
            if r > 0:  # the first turn warms up
                times[i].append(elapsed)
    ceilings = [job.ceiling_work / t for t in times[0]]
    results = []
    for variant, taken in zip(variants, times[1:], strict=True):
        work = job.flops if job.limit == "arithmetic" else variant.bytes
        rates = [work / t for t in taken]
        results.append(
            job.facts
            | {
                "device": device.type, "threads": torch.get_num_threads(), "variant": variant.name,
                "limit": job.limit, "not_timed": refused, "bytes": variant.bytes, "errors": errors[variant.name],
                "flop_per_byte": job.flops / job.bytes,
                "times_s": taken, "time_s": spread(taken), "ceiling_times_s": times[0], "ceiling": spread(ceilings),
                "flop_per_s": spread([job.flops / t for t in taken]), "rate": spread(rates),
                "of_ceiling": spread([a / b for a, b in zip(rates, ceilings, strict=True)]),
                "ours_is_faster": spread([t / ours for t, ours in zip(taken, times[1], strict=True)]),
            }
        )  # fmt: skip
    return results
