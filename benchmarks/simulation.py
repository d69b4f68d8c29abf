"""Rounds of FedAvg: the engine against a bare torch and gloo loop, on the same job and in the same processes.

1,000 clients of 50 CIFAR-shaped samples, 50 of them a round, batches of 10, one local epoch of SGD with gradients
clipped to norm 10 on all sides. The sides take turns round by round, and the ratio of each pair of neighbours counts,
so a drift of the machine cancels. Before anything is timed they train on the same batches and must arrive at the same
parameters. pfl joins where it is installed.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import arguments, noise_images, on_ranks, peak_rss_bytes, report, spread
from torch import Tensor, nn

from fedkernels.algorithms import FedAvg
from fedkernels.data.datasets import Dataset
from fedkernels.data.partition import Partition
from fedkernels.federated.batches import LocalWork
from fedkernels.federated.engine import Engine, EngineSettings
from fedkernels.federated.objective import Objective
from fedkernels.federated.schedule import sample_cohort
from fedkernels.models import MODELS
from fedkernels.rng import Purpose, stream

SHAPE, CLASSES = (3, 32, 32), 10
# In float64 what is left is the 1e-6 that `clip_grad_norm_` adds to a norm. In float32 the order of sums decides now
# and then which of two nearly equal pixels a max pooling passes on; a wrong step still moves far more.
SAME_MOVEMENT = {torch.float64: 1e-5, torch.float32: 2e-2}


NETWORKS = ("lenet5", "cnn3x3")


@dataclass(frozen=True)
class Job:
    """What both sides train."""

    model: str
    clients: int = 1000
    samples: int = 50
    cohort: int = 50
    batch: int = 10
    lr: float = 0.05
    clip_norm: float = 10.0
    seed: int = 0

    def data(self) -> Dataset:
        return noise_images(self.clients * self.samples, SHAPE, CLASSES, self.seed)

    def module(self) -> nn.Module:
        torch.manual_seed(self.seed)
        module: nn.Module = MODELS[self.model]().build("image", SHAPE, CLASSES)
        return module


class Side(Protocol):
    """One of the programs that train the job."""

    def run_round(self) -> float:
        """Train one round and return its mean training loss."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """The server's parameters by name."""
        ...


class Ours:
    """The engine, used as a library."""

    def __init__(self, job: Job, data: Dataset) -> None:
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
            evaluator="loop",
        )
        self._engine = Engine(FedAvg(), Objective(job.module(), data, torch.device("cpu")), partition, settings)

    def run_round(self) -> float:
        loss = self._engine.run_round()["train_loss"]
        assert loss is not None
        return loss

    def parameters(self) -> dict[str, Tensor]:
        return self._engine.named_parameters()


@dataclass
class Draws:
    """The bare loop's own sampling."""

    job: Job
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def cohort(self, r: int) -> Sequence[int]:
        return self.rng.choice(self.job.clients, self.job.cohort, replace=False).tolist()

    def order(self, r: int, client: int) -> Tensor:
        return torch.randperm(self.job.samples)


class EngineDraws(Draws):
    """The engine's sampling, so that both sides see the same batches."""

    def cohort(self, r: int) -> Sequence[int]:
        return sample_cohort("uniform", self.job.seed, r, self.job.clients, self.job.cohort).tolist()

    def order(self, r: int, client: int) -> Tensor:
        return torch.from_numpy(stream(self.job.seed, Purpose.BATCHES, r, client).permutation(self.job.samples))


class Bare:
    """The loop one writes without a framework: a module, `torch.optim.SGD`, one all-reduce of summed updates."""

    def __init__(self, job: Job, data: Dataset, draws: Draws, *, channels_last: bool = False) -> None:
        self._job, self._draws = job, draws
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._images, self._targets = data.train_inputs, data.train_targets
        self._scale = (1 / (255 * torch.tensor(data.std))).view(-1, 1, 1)
        self._shift = (torch.tensor(data.mean) / torch.tensor(data.std)).view(-1, 1, 1)
        self._module = job.module()
        self._parameters = list(self._module.parameters())
        self._server = [p.detach().clone() for p in self._parameters]
        self._optimizer = torch.optim.SGD(self._parameters, job.lr)
        sizes = [p.numel() for p in self._parameters]
        self._bucket = torch.zeros(1 + sum(sizes))
        self._loss_sum, *sums = self._bucket.split([1, *sizes])
        self._sums = [flat.view_as(p) for flat, p in zip(sums, self._parameters, strict=True)]
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._round = 0

    def run_round(self) -> float:
        job = self._job
        self._bucket.zero_()
        for client in self._draws.cohort(self._round)[self._rank :: self._world]:
            self._train(client)
        if self._world > 1:
            dist.all_reduce(self._bucket)
        for server, total in zip(self._server, self._sums, strict=True):
            server.add_(total, alpha=1 / job.cohort)
        self._round += 1
        return self._loss_sum.item() / (job.cohort * -(-job.samples // job.batch))

    def _train(self, client: int) -> None:
        with torch.no_grad():
            for p, server in zip(self._parameters, self._server, strict=True):
                p.copy_(server)
        images, targets = self.samples(client, self._round)
        for inputs, labels in zip(images.split(self._job.batch), targets.split(self._job.batch), strict=True):
            self._optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(self._module(inputs), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(self._parameters, self._job.clip_norm)
            self._optimizer.step()
            self._loss_sum += loss.detach()
        with torch.no_grad():
            for total, p, server in zip(self._sums, self._parameters, self._server, strict=True):
                total.add_(p).sub_(server)

    def samples(self, client: int, r: int) -> tuple[Tensor, Tensor]:
        """A client's shuffled images, normalised, and targets."""
        order = self._draws.order(r, client) + client * self._job.samples
        images = (self._images[order] * self._scale - self._shift).contiguous(memory_format=self._memory_format)
        return images, self._targets[order]

    def parameters(self) -> dict[str, Tensor]:
        return dict(zip((name for name, _ in self._module.named_parameters()), self._server, strict=True))


class Pfl:
    """Apple's pfl, through its simulated backend, one central iteration a round."""

    def __init__(self, job: Job, data: Dataset, draws: Draws) -> None:
        from pfl.aggregate.simulate import SimulatedBackend
        from pfl.algorithm.base import NNAlgorithmParams
        from pfl.algorithm.federated_averaging import FederatedAveraging
        from pfl.data.dataset import Dataset as UserDataset
        from pfl.data.federated_dataset import FederatedDataset
        from pfl.hyperparam.base import NNTrainHyperParams
        from pfl.internal.ops import pytorch_ops
        from pfl.model.pytorch import PyTorchModel

        class Context(pytorch_ops.PyTorchDistributedContext):  # type: ignore[misc]
            """The ranks that have already met."""

            def __init__(self) -> None:
                on = dist.is_initialized()
                self._global_rank, self._world_size = (dist.get_rank(), dist.get_world_size()) if on else (0, 1)

        pytorch_ops.distributed = Context()
        self._job, self._draws, self._round, self._losses = job, draws, 0, torch.zeros(())
        self._bare = Bare(job, data, draws)
        module = job.module()
        module.loss = self._loss  # type: ignore[assignment]
        module.metrics = lambda *_: {}  # type: ignore[assignment]
        self._model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), 1.0))
        self._cohort: list[int] = []
        users = FederatedDataset(
            lambda client: UserDataset(list(self._bare.samples(client, self._round)), user_id=str(client)),
            lambda: self._cohort.pop(0),
        )
        self._backend = SimulatedBackend(users, users)
        self._algorithm = FederatedAveraging()
        # Iteration 0 would evaluate every client; rounds count from 1 here.
        self._params = NNAlgorithmParams(10**6, 10**6, job.cohort, None)
        self._train = NNTrainHyperParams(
            local_batch_size=job.batch,
            local_num_epochs=1,
            local_learning_rate=job.lr,
            local_max_grad_norm=job.clip_norm,
        )

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(self._model.pytorch_model(inputs), labels)
        self._losses += loss.detach()
        return loss

    def run_round(self) -> float:
        self._losses.zero_()
        self._cohort = list(self._draws.cohort(self._round))
        contexts, _, _ = self._algorithm.get_next_central_contexts(
            self._model, self._round + 1, self._params, self._train
        )
        statistics, metrics = self._backend.gather_results(self._model, self._algorithm, central_context=contexts[0])
        self._algorithm.process_aggregated_statistics(contexts[0], metrics, self._model, statistics)
        self._round += 1
        return self._losses.item() / (self._job.cohort * -(-self._job.samples // self._job.batch))

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._model.pytorch_model.named_parameters()}


SIDES: dict[str, Callable[[Job, Dataset, type[Draws]], Side]] = {
    "fedkernels": lambda job, data, draws: Ours(job, data),
    "bare loop": lambda job, data, draws: Bare(job, data, draws(job)),
    "bare, channels last": lambda job, data, draws: Bare(job, data, draws(job), channels_last=True),
}
if importlib.util.find_spec("pfl"):
    SIDES["pfl"] = lambda job, data, draws: Pfl(job, data, draws(job))
OURS, *OTHERS = SIDES


def difference(job: Job, name: str, dtype: torch.dtype, rounds: int) -> float:
    """How far a side ends from ours on the same batches, relative to how far ours has moved.

    Raises:
        ValueError: too far.
    """
    torch.set_default_dtype(dtype)
    data = job.data()
    sides = [SIDES[side](job, data, EngineDraws) for side in (OURS, name)]
    for side in sides:
        for _ in range(rounds):
            side.run_round()
    start = dict(job.module().named_parameters())
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


def time_sides(job: Job, rounds: int) -> tuple[dict[str, Times], dict[str, float]]:
    """Round times of every side, taking turns, and how far each ended from ours in the check."""
    # Clipped so low that every gradient is.
    small = replace(job, clients=20, cohort=4, clip_norm=0.1)
    apart = {}
    for name in OTHERS:
        # pfl sends updates as float32.
        apart[name] = difference(small, name, *((torch.float32, 1) if name == "pfl" else (torch.float64, 2)))
    data = job.data()
    sides = {name: make(job, data, Draws) for name, make in SIDES.items()}
    for side in sides.values():
        side.run_round()
    times = {name: Times() for name in sides}
    for r in range(rounds):
        # Forwards and backwards in turn, so that no side always follows the same other one.
        for name in list(sides)[:: 1 if r % 2 == 0 else -1]:
            if dist.is_initialized():
                dist.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            sides[name].run_round()
            times[name].wall_s.append(time.perf_counter() - start)
            times[name].cpu_s.append(time.process_time() - start_cpu)
    return times, apart


def peak_of_side(job: Job, name: str) -> int:
    """Peak memory of a process that holds the data and runs this side alone."""
    side = SIDES[name](job, job.data(), Draws)
    side.run_round()
    return peak_rss_bytes()


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", default=list(NETWORKS), choices=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", nargs="+", type=int, default=[10, 4], help="timed rounds, one number per model")
    options = parser.parse_args()
    if len(options.rounds) != len(options.models):
        parser.error(f"--rounds has {len(options.rounds)} numbers for {len(options.models)} models")
    columns = ["model", "parameters", "ranks", "side", "round, ms", "fedkernels / side", "in CPU time", "peak RSS, MB"]
    rows: list[list[Any]] = []
    details: list[dict[str, Any]] = []
    for model, rounds in zip(options.models, options.rounds, strict=True):
        job = Job(model)
        d = sum(p.numel() for p in job.module().parameters())
        # A process's peak depends on neither the cohort nor the other ranks.
        peaks = {name: on_ranks(1, peak_of_side, replace(job, cohort=4), name)[0] for name in SIDES}
        for ranks in options.ranks:
            # Ranks leave a round together, so the first one's clock stands for all.
            times, apart = on_ranks(ranks, time_sides, job, rounds)[0]
            for name, side in times.items():
                round_s = spread(side.wall_s)
                ratio = spread([a / b for a, b in zip(times[OURS].wall_s, side.wall_s, strict=True)])
                cpu_ratio = spread([a / b for a, b in zip(times[OURS].cpu_s, side.cpu_s, strict=True)])
                shown = ["", ""] if name == OURS else [_ratio(ratio), _ratio(cpu_ratio)]
                rows.append([model, f"{d:,}", ranks, name, f"{1e3 * round_s['median']:.0f}", *shown])
                rows[-1].append(round(peaks[name] / 1e6))
                details.append(
                    {
                        "model": model,
                        "parameters": d,
                        "ranks": ranks,
                        "side": name,
                        "peak_rss_bytes": peaks[name],
                        "relative_difference": apart.get(name, 0.0),
                        "round_s": round_s,
                        "ours_over_side": ratio,
                        "ours_over_side_cpu": cpu_ratio,
                        "rounds_wall_s": side.wall_s,
                        "rounds_cpu_s": side.cpu_s,
                    }
                )
                print(*rows[-1], sep="  ", flush=True)
    report("simulation", {"columns": columns, "rows": rows}, {"sides": details}, options.out)


if __name__ == "__main__":
    main()
