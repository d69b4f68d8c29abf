"""Ways to do a job that take turns on the same memory, and what is told of their times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import spread
from torch import Tensor


@dataclass(frozen=True)
class Variant:
    """A way to do the job: `run` returns its results; `bytes` is what it has to move per parameter."""

    name: str
    bytes: float
    run: Callable[[], Tensor | Sequence[Tensor]]


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


def in_turns(
    copy: Variant,
    variants: Sequence[Variant],
    errors: Sequence[float],
    parameters: int,
    device: torch.device,
    repeats: int,
) -> list[dict[str, Any]]:
    """Times of all variants, the first being ours, beside those of a copy of as many float32 parameters."""
    everything = [copy, *variants]
    times: list[list[float]] = [[] for _ in everything]
    for r in range(repeats + 1):
        for i in range(len(everything))[:: 1 if r % 2 == 0 else -1]:
            elapsed = seconds(everything[i].run, device)
            if r > 0:  # the first turn warms up
                times[i].append(elapsed)
    results = []
    copied = [copy.bytes * parameters / t / 1e9 for t in times[0]]
    for variant, taken, error in zip(variants, times[1:], errors, strict=True):
        rate = [variant.bytes * parameters / t / 1e9 for t in taken]
        results.append({
            "variant": variant.name, "bytes": variant.bytes, "error": error, "times_s": taken,
            "copy_times_s": times[0], "time_s": spread(taken), "gb_per_s": spread(rate),
            "of_copy": spread([a / b for a, b in zip(rate, copied, strict=True)]),
            "ours_is_faster": spread([t / ours for t, ours in zip(taken, times[1], strict=True)]),
        })  # fmt: skip
    return results
