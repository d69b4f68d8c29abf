"""What the engine is compared with: the job, a bare torch and gloo loop, and pfl and Flower where installed."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import noise_images, peak_rss_bytes
from torch import Tensor, nn

from fedkernels.data.datasets import Dataset
from fedkernels.federated.schedule import sample_cohort
from fedkernels.models import MODELS
from fedkernels.rng import Purpose, stream

SHAPE, CLASSES = (3, 32, 32), 10
HAS_PFL = importlib.util.find_spec("pfl") is not None
HAS_FLOWER = all(importlib.util.find_spec(name) for name in ("flwr", "ray"))


@dataclass(frozen=True)
class Job:
    """What all sides train."""

    model: str
    clients: int = 1000
    samples: int = 50
    cohort: int = 50
    batch: int = 10
    lr: float = 0.05
    clip_norm: float = 10.0
    seed: int = 0
    device: str = "cpu"

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


@dataclass
class Draws:
    """The peers' own sampling."""

    job: Job
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def cohort(self, r: int) -> Sequence[int]:
        return self.rng.choice(self.job.clients, self.job.cohort, replace=False).tolist()

    def order(self, r: int, client: int) -> Tensor:
        return torch.randperm(self.job.samples)


class EngineDraws(Draws):
    """The engine's sampling, so that all sides see the same batches."""

    def cohort(self, r: int) -> Sequence[int]:
        return sample_cohort("uniform", self.job.seed, r, self.job.clients, self.job.cohort).tolist()

    def order(self, r: int, client: int) -> Tensor:
        return torch.from_numpy(stream(self.job.seed, Purpose.BATCHES, r, client).permutation(self.job.samples))


class Bare:
    """The loop one writes without a framework: a module, `torch.optim.SGD`, one all-reduce of summed updates."""

    def __init__(self, job: Job, data: Dataset, draws: Draws, *, channels_last: bool = False) -> None:
        self._job, self._draws = job, draws
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._device = torch.device(job.device)
        self._images, self._targets = data.train_inputs.to(self._device), data.train_targets.to(self._device)
        self._scale = (1 / (255 * torch.tensor(data.std))).view(-1, 1, 1).to(self._device)
        self._shift = (torch.tensor(data.mean) / torch.tensor(data.std)).view(-1, 1, 1).to(self._device)
        self.module = job.module().to(self._device)
        self._parameters = list(self.module.parameters())
        self._server = [p.detach().clone() for p in self._parameters]
        self._optimizer = torch.optim.SGD(self._parameters, job.lr)
        sizes = [p.numel() for p in self._parameters]
        self._bucket = torch.zeros(1 + sum(sizes), device=self._device)
        self._loss_sum, *sums = self._bucket.split([1, *sizes])
        self._sums = [flat.view_as(p) for flat, p in zip(sums, self._parameters, strict=True)]
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._round = 0

    def run_round(self) -> float:
        job = self._job
        self._bucket.zero_()
        for client in self._draws.cohort(self._round)[self._rank :: self._world]:
            with torch.no_grad():
                for p, server in zip(self._parameters, self._server, strict=True):
                    p.copy_(server)
            self._loss_sum += self.train(client, self._round)
            with torch.no_grad():
                for total, p, server in zip(self._sums, self._parameters, self._server, strict=True):
                    total.add_(p).sub_(server)
        if self._world > 1:
            dist.all_reduce(self._bucket)
        for server, total in zip(self._server, self._sums, strict=True):
            server.add_(total, alpha=1 / job.cohort)
        self._round += 1
        return self._loss_sum.item() / (job.cohort * -(-job.samples // job.batch))

    def train(self, client: int, r: int) -> Tensor:
        """Train the module on one client, from where it stands, and return the sum of the losses."""
        loss_sum = torch.zeros((), device=self._device)
        images, targets = self.samples(client, r)
        for inputs, labels in zip(images.split(self._job.batch), targets.split(self._job.batch), strict=True):
            self._optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(self.module(inputs), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(self._parameters, self._job.clip_norm)
            self._optimizer.step()
            loss_sum += loss.detach()
        return loss_sum

    def samples(self, client: int, r: int) -> tuple[Tensor, Tensor]:
        """A client's shuffled images, normalised, and targets."""
        order = (self._draws.order(r, client) + client * self._job.samples).to(self._device)
        images = (self._images[order] * self._scale - self._shift).contiguous(memory_format=self._memory_format)
        return images, self._targets[order]

    def parameters(self) -> dict[str, Tensor]:
        return dict(zip((name for name, _ in self.module.named_parameters()), self._server, strict=True))


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
        self._job, self._draws, self._round, self._losses = job, draws, 0, torch.zeros((), device=job.device)
        self._bare = Bare(job, data, draws)
        module = job.module().to(job.device)
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


@functools.cache
def trainer(job: Job, draws: type[Draws]) -> Bare:
    """The data and the module of a Ray actor, made once."""
    torch.set_num_threads(1)
    return Bare(job, job.data(), draws(job))


class Flower:
    """Flower's simulation: clients in Ray actors, each a process; the server and its strategy in this one."""

    def __init__(self, job: Job, draws: type[Draws], actors: int) -> None:
        os.environ.update(FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0")
        from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
        from flwr.clientapp import ClientApp

        logging.getLogger("flwr").setLevel(logging.ERROR)
        self._job, self._actors = job, actors
        self._arrays = ArrayRecord(job.module().state_dict())
        self._metrics: dict[str, Any] = {}
        self._client_app = ClientApp()

        @self._client_app.train()  # type: ignore[untyped-decorator]
        def train(message: Message, context: Context) -> Message:
            bare = trainer(job, draws)
            bare.module.load_state_dict(message.content["arrays"].to_torch_state_dict())
            loss_sum = bare.train(context.node_config["partition-id"], message.content["config"]["server-round"] - 1)
            metrics = {"num-examples": job.samples, "loss-sum": loss_sum.item(), "peak-rss-bytes": peak_rss_bytes()}
            content = {"arrays": ArrayRecord(bare.module.state_dict()), "metrics": MetricRecord(metrics)}
            return Message(RecordDict(content), reply_to=message)

    def run(self, rounds: int) -> list[float]:
        """Train a warm-up round and `rounds` more, and return the seconds that each of these took."""
        from flwr.serverapp import ServerApp
        from flwr.serverapp.strategy import FedAvg
        from flwr.simulation import run_simulation

        ends: list[float] = []

        class Timed(FedAvg):  # type: ignore[misc]
            """FedAvg that notes when each round ends."""

            def aggregate_train(self, server_round: int, replies: Any) -> Any:
                replies = list(replies)
                if sum(not reply.has_error() for reply in replies) < job.cohort:
                    raise RuntimeError(f"clients failed in round {server_round}")
                aggregated = super().aggregate_train(server_round, replies)
                ends.append(time.perf_counter())
                return aggregated

        job, server_app = self._job, ServerApp()

        @server_app.main()  # type: ignore[untyped-decorator]
        def main(grid: Any, context: Any) -> None:
            strategy = Timed(job.cohort / job.clients, 0.0, job.cohort, min_available_nodes=job.clients)
            result = strategy.start(grid, self._arrays, num_rounds=1 + rounds)
            self._arrays, self._metrics = result.arrays, result.train_metrics_clientapp[1 + rounds]

        backend = {"init_args": {"num_cpus": self._actors}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
        run_simulation(server_app, self._client_app, job.clients, backend_config=backend)
        return np.diff(ends).tolist()

    def run_round(self) -> float:
        """The first round alone: rounds, and so the batches, count from there in every run."""
        self.run(0)
        return self._metrics["loss-sum"] / -(-self._job.samples // self._job.batch)

    def parameters(self) -> dict[str, Tensor]:
        return dict(self._arrays.to_torch_state_dict())

    @property
    def actor_peak_rss_bytes(self) -> int:
        """Peak memory of an actor, the mean over the clients of the last round."""
        return int(self._metrics["peak-rss-bytes"])
