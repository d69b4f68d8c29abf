"""ViT-Tiny of depth 6 on 32-pixel images, batch 50: a local step in bf16 against fp32, and where both end in training.

Steps are timed in rounds of one client, the two precisions taking turns on one thread, and each pair of neighbours
gives a ratio. One more step of each runs under the profiler, which says what the time went to. Both precisions then
train from the same initial parameters on the same batches of scikit-learn's digits, enlarged to 32 pixels, with several
seeds; the loss at the end is on held-out digits.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from common import arguments, cpu_flags, noise_images, on_ranks, report, spread
from sklearn.datasets import load_digits
from torch.profiler import ProfilerActivity, profile

from fedkernels.algorithms import FedAvg
from fedkernels.data.datasets import Dataset
from fedkernels.data.partition import Partition
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.engine import Engine
from fedkernels.federated.objective import Objective, Precision
from fedkernels.federated.settings import EngineSettings
from fedkernels.models.attention import Vit
from fedkernels.optim import AdamW, Sgd

SHAPE, CLASSES, BATCH, TEST_SAMPLES = (3, 32, 32), 10, 50, 297
PRECISIONS: tuple[Precision, Precision] = ("fp32", "bf16")
# Parts of operator names, and what they are shown as; the first that fits counts.
GROUPS = {"attention": "attention", "mm": "matrix products", "convolution": "patch projection", "": "everything else"}


def digits(seed: int) -> Dataset:
    """Scikit-learn's digits enlarged from 8 to 32 pixels, in three equal channels; another split for every seed."""
    source = load_digits()
    order = np.random.default_rng(seed).permutation(len(source.target))
    small = torch.from_numpy(source.images[order] * (255 / 16)).to(torch.uint8)
    images = small.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].repeat(1, SHAPE[0], 1, 1)
    targets = torch.from_numpy(source.target[order])
    test, train = slice(TEST_SAMPLES), slice(TEST_SAMPLES, None)
    mean_std = (0.3,) * SHAPE[0], (0.35,) * SHAPE[0]
    return Dataset(
        "image", images[train], targets[train], images[test], targets[test], CLASSES, targets[train], None, *mean_std
    )


def engine(data: Dataset, precision: Precision, steps: int, optimizer: Sgd | AdamW, lr: float, seed: int) -> Engine:
    """One client that holds all the data and takes `steps` local steps a round."""
    torch.manual_seed(seed)
    module = Vit().build("image", SHAPE, CLASSES)
    count = len(data.train_targets)
    settings = EngineSettings(
        seed=seed,
        rounds=10**6,
        cohort=1,
        work=LocalWork(BATCH, local_steps=steps),
        lr=lr,
        schedule="constant",
        evaluator="loop",
    )
    objective = Objective(module, data, torch.device("cpu"), precision)
    return Engine(FedAvg(local=optimizer), objective, Partition(np.arange(count), np.array([0, count])), settings)


def time_steps(repeats: int, steps: int) -> dict[str, Any]:
    """Times per local step of both precisions, on the wall clock and in CPU time, and profiles of one step."""
    data = noise_images(BATCH * steps, SHAPE)
    engines = {precision: engine(data, precision, steps, Sgd(), 0.01, 0) for precision in PRECISIONS}
    wall_s: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    cpu_s: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for job in engines.values():
        job.run_round()
    for r in range(repeats):
        for precision in PRECISIONS[:: 1 if r % 2 == 0 else -1]:
            start, start_cpu = time.perf_counter(), time.process_time()
            engines[precision].run_round()
            wall_s[precision].append((time.perf_counter() - start) / steps)
            cpu_s[precision].append((time.process_time() - start_cpu) / steps)
    profiles = {}
    for precision, job in engines.items():
        with profile(activities=[ProfilerActivity.CPU]) as run:
            job.run_round()
        operators = Counter({e.key: e.self_cpu_time_total / 1e6 / steps for e in run.key_averages()})
        groups: Counter[str] = Counter()
        for name, operator_s in operators.items():
            groups[next(group for part, group in GROUPS.items() if part in name)] += operator_s
        profiles[precision] = {"groups_s": dict(groups), "operators_s": dict(operators.most_common(12))}
    return {"wall_s": wall_s, "cpu_s": cpu_s, "profiles": profiles}


def final_losses(seed: int, steps: int, lr: float) -> dict[str, dict[str, float]]:
    """Held-out loss and accuracy after the same training in both precisions; the last look is in fp32 for both."""
    ends = {}
    for precision in PRECISIONS:
        job = engine(digits(seed), precision, steps, AdamW(), lr, seed)
        job.run_round()
        job.objective.precision = "fp32"
        ends[precision] = job.evaluate()
    return ends


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--repeats", type=int, default=7, help="timed pairs of rounds")
    parser.add_argument("--steps", type=int, default=3, help="local steps in a timed round")
    parser.add_argument("--train_steps", type=int, default=200, help="one epoch of the digits is 30")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    (timed,) = on_ranks(1, time_steps, options.repeats, options.steps)
    rows: list[list[Any]] = []
    for clock in ("wall", "cpu"):
        times = timed[f"{clock}_s"]
        step = {precision: spread(times[precision]) for precision in PRECISIONS}
        ratio = spread([a / b for a, b in zip(times["fp32"], times["bf16"], strict=True)])
        shown = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        cells = [f"{1e3 * step[precision]['median']:.0f}" for precision in PRECISIONS]
        rows.append([f"local step, {'wall clock' if clock == 'wall' else 'CPU time'}, ms", *cells, shown])
        timed[f"{clock}_fp32_over_bf16"] = ratio
    groups = {precision: timed["profiles"][precision]["groups_s"] for precision in PRECISIONS}
    for group in GROUPS.values():
        parts = [groups[precision].get(group, 0.0) for precision in PRECISIONS]
        cells = [f"{1e3 * part:.0f}" for part in parts]
        rows.append([f"of that, profiled: {group}, ms", *cells, f"{parts[0] / parts[1]:.2f}" if parts[1] else ""])
    ends = [on_ranks(1, final_losses, seed, options.train_steps, options.lr)[0] for seed in range(options.seeds)]
    losses = {precision: [end[precision]["test_loss"] for end in ends] for precision in PRECISIONS}
    cells = [f"{mean(losses[p]):.4f} ± {stdev(losses[p]):.4f}" for p in PRECISIONS] if options.seeds > 1 else ["", ""]
    gaps = [b - a for a, b in zip(losses["fp32"], losses["bf16"], strict=True)]
    gap = f"difference {mean(gaps):+.4f} ({min(gaps):+.4f} to {max(gaps):+.4f})"
    rows.append([f"held-out loss after {options.train_steps} steps, {options.seeds} seeds", *cells, gap])
    units = sorted(cpu_flags() & {"avx512_bf16", "amx_bf16"}) or ["none"]
    rows.append(["bf16 units of the CPU", "", ", ".join(units), ""])
    table = {"columns": ["what", *PRECISIONS, "fp32 / bf16 (min to max)"], "rows": rows}
    details = {"timed": timed, "ends": ends, "bf16_units": units, "options": {**vars(options), "out": None}}
    report("precision", table, details, Path(options.out))


if __name__ == "__main__":
    main()
