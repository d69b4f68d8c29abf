"""Peak memory of a rank that trains a GPT-2 with FedAdamW: alone, and in groups of ranks that share the client.

Each rank first trains a tiny model the same way, which imports and allocates what any run needs, and notes its resident
memory; then it trains the real one and notes the highest resident memory of a round. The difference is what training
took. The first row is plain local training, a module and `torch.optim.AdamW`. A round has one client. Before it is
dealt out the model lies in memory once; that is not part of the peak.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from common import arguments, on_ranks, report, rss_bytes
from torch.distributed.fsdp import fully_shard  # noqa: F401 - its import is no part of what is measured

from fedkernels.algorithms import FedAdamW
from fedkernels.data.datasets import Dataset
from fedkernels.data.partition import Partition
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.collectives import Collectives
from fedkernels.federated.engine import Engine
from fedkernels.federated.objective import Objective
from fedkernels.federated.parallel import Sharding
from fedkernels.federated.settings import EngineSettings
from fedkernels.federated.zero import require_deepspeed
from fedkernels.models import Gpt2

LENGTH, TOKENS, SAMPLES = 64, 256, 32
TINY = Gpt2(dim=8, depth=1, heads=2)
VARIANTS: dict[str, tuple[Sharding, int]] = {
    "one rank": ("none", 1),
    "ddp, 2 ranks": ("ddp", 2),
    "fsdp2, 2 ranks": ("fsdp2", 2),
    "fsdp2, 4 ranks": ("fsdp2", 4),
    "deepspeed, 2 ranks": ("deepspeed", 2),
    "deepspeed, 4 ranks": ("deepspeed", 4),
}


def peak_bytes(step: Callable[[], object]) -> int:
    """Highest resident memory while something runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    step()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.from_numpy(np.random.default_rng(0).integers(0, TOKENS, (SAMPLES, LENGTH + 1)))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def plain(model: Gpt2, batch: int, steps: int) -> dict[str, int]:
    """A loop of AdamW over the module's own tensors."""
    if model != TINY:
        plain(TINY, batch, steps)
    before = rss_bytes()
    module = model.build("language", (LENGTH,), TOKENS)
    optimizer = torch.optim.AdamW(module.parameters(), foreach=False)
    inputs, targets = tokens()

    def train() -> None:
        for k in range(steps):
            rows = slice(k * batch % SAMPLES, k * batch % SAMPLES + batch)
            optimizer.zero_grad()
            logits = module(inputs[rows])
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[rows].flatten()).backward()
            optimizer.step()

    train()  # moments exist after the first step
    return {"round": peak_bytes(train) - before, "parameters": sum(p.numel() for p in module.parameters())}


def federated(
    model: Gpt2, batch: int, steps: int, sharding: Sharding, shard_size: int, collectives: Collectives | None = None
) -> dict[str, int]:
    """The second round of FedAdamW on one client, by all ranks together."""
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank() if dist.is_initialized() else 0))
    if sharding == "deepspeed":
        require_deepspeed(torch.device("cpu"))
    collectives = collectives or Collectives(shard_size=shard_size)
    if model != TINY:
        federated(TINY, batch, steps, sharding, shard_size, collectives)
    before = rss_bytes()
    module = model.build("language", (LENGTH,), TOKENS)
    roles = model.roles(module)
    inputs, targets = tokens()
    data = Dataset(
        "language", inputs, targets, inputs[:1], targets[:1], TOKENS, torch.zeros(SAMPLES, dtype=torch.long), None
    )
    settings = EngineSettings(
        rounds=10, cohort=1, work=LocalWork(batch, local_steps=steps), lr=1e-3, evaluator="loop", sharding=sharding
    )
    partition = Partition(np.arange(SAMPLES), np.array([0, SAMPLES]))
    engine = Engine(
        FedAdamW(), Objective(module, data, torch.device("cpu")), partition, settings, collectives, roles=roles
    )
    del module
    engine.run_round()
    return {"round": peak_bytes(engine.run_round) - before, "parameters": engine.layout.whole.d}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4, help="samples of a local step, shared out over the ranks")
    parser.add_argument("--steps", type=int, default=2, help="local steps of the round")
    options = parser.parse_args()
    # By itself malloc keeps what is freed of tensors below a size that grows with use, and shards would look large.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    model = Gpt2(dim=options.dim, depth=options.depth, heads=8)
    found = {"plain AdamW, one process": on_ranks(1, plain, model, options.batch, options.steps)}
    for name, (sharding, size) in VARIANTS.items():
        found[name] = on_ranks(size, federated, model, options.batch, options.steps, sharding, size)
    floats = 4 * found["one rank"][0]["parameters"]
    base = max(rank["round"] for rank in found["one rank"])
    rows = []
    for name, ranks in found.items():
        peak = max(rank["round"] for rank in ranks)
        rows.append([name, f"{peak / 2**20:.0f}", f"{peak / floats:.1f}", f"{peak / base:.2f}"])
    columns = ["trained by", "peak of a rank, MiB", "in copies of the model", "to one rank of FedAdamW"]
    details = {"ranks": found, "options": {**vars(options), "out": None}}
    report("sharding", {"columns": columns, "rows": rows}, details, options.out)


if __name__ == "__main__":
    main()
