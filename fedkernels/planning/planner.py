"""What a run would cost on many ranks: round time, bytes and memory, from a few rounds measured on one.

A round lasts `T = a + max over ranks Σ (b + K_i s) + R`: a is what every round costs, b what every client, s a local
step, and R the reduction over ranks. Cohorts, steps K_i and placement are drawn as the engine draws them, so the
maximum is that of real rounds; a, b and s are measured here, R follows from bytes, bandwidths and latency.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..config import Config
from ..data.datasets import Dataset
from ..data.partition import Partition
from ..federated.aggregate import protocol_bytes
from ..federated.collectives import Collectives
from ..federated.engine import Engine
from ..federated.evaluators import Choice
from ..federated.intake import N_SLOTS
from ..federated.schedule import place
from ..train import build
from .memory import TensorPeak
from .network import Backend, Network

DRAWN_ROUNDS = 20  # over which predictions are means


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of training on one rank.

    Args:
        round_s: a, of every round, whatever it trains.
        client_s: b, of every client besides its steps.
        step_s: s, of a local step.
    """

    round_s: float
    client_s: float
    step_s: float

    def batch_s(self, steps: Sequence[float]) -> float:
        """Of clients trained at once: all take as long as the one with the most steps."""
        return len(steps) * (self.client_s + max(steps) * self.step_s)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A round on so many ranks, the mean over drawn rounds.

    Args:
        efficiency: the ranks' share of time spent on clients.
        link_bytes: that cross links in a round, over all ranks.
    """

    ranks: int
    cohort: float
    round_s: float
    train_s: float
    reduce_s: float
    efficiency: float
    link_bytes: float
    protocol_up_bytes: float
    protocol_down_bytes: float


class Planner:
    """Draws the rounds of a configuration on any number of ranks, without training.

    Args:
        config: of the run.
        data: its dataset, or one of the same shapes.

    Raises:
        ValueError: as `train.build`.
    """

    def __init__(self, config: Config, data: Dataset) -> None:
        self._config, self._data = config, data
        self._engine, _, _ = build(config, Collectives(), data)
        self.layout = self._engine.layout
        self.backend: Backend = "nccl" if self._engine.objective.device.type == "cuda" else "gloo"
        self.choice: Choice = self._engine.settle()

    def measure(self, *, budget_s: float = 5.0) -> Costs:
        """Time rounds of few clients and few steps here, and tell a, b and s apart.

        Args:
            budget_s: for each of three kinds of rounds; one round to warm up and one that counts are run in any case,
                and of more the fastest counts.
        """
        together = self.choice.clients_per_batch
        most = int(self._engine.batches.steps(range(self._engine.population)).max())
        rows: list[list[float]] = []
        for batches, steps in ((1, 1), (1, min(3, most)), (2, 1)):
            engine, _, _ = self._short(min(batches * together, self._config.clients), steps)
            engine.run_round()
            timed: list[list[float]] = []
            deadline = time.perf_counter() + budget_s
            while not timed or (time.perf_counter() < deadline and len(timed) < 5):
                ids, _ = engine.draw_cohort()
                taken = sorted(engine.batches.steps(ids).tolist(), reverse=True)
                round_s = engine.run_round()["round_s"]
                assert round_s is not None
                if taken:  # under Poisson sampling nobody may have come
                    work = sum(len(part) * max(part) for part in _chunks(taken, together))
                    timed.append([1.0, len(taken), work, round_s])
            rows.append(min(timed, key=lambda row: row[3] / row[2]))
        from sklearn.linear_model import LinearRegression

        table = np.array(rows)
        # Relative errors count alike, so that the short rounds are not lost beside the long one.
        fit = LinearRegression(positive=True, fit_intercept=False)
        round_s, client_s, step_s = fit.fit(table[:, :3] / table[:, 3:], np.ones(len(table))).coef_
        return Costs(round_s=float(round_s), client_s=float(client_s), step_s=float(step_s))

    def _short(self, cohort: int, steps: int) -> tuple[Engine, Dataset, Partition]:
        """The run with rounds of few clients and steps."""
        config = replace(
            self._config,
            cohort=cohort,
            local_steps=steps,
            evaluator=self.choice.evaluator,
            clients_per_batch=self.choice.clients_per_batch,
            # A core that is spare here is some rank's where ranks fill their nodes.
            overlap="never",
        )
        if config.privacy is not None:
            config = replace(config, privacy=replace(config.privacy, target_epsilon=None))
        return build(config, Collectives(), self._data)

    def predict(self, ranks: int, costs: Costs, network: Network, *, clients_per_rank: int | None = None) -> Prediction:
        """A round on so many ranks.

        Args:
            clients_per_rank: let the cohort grow with the ranks, its clients being like those of the population; None
                keeps the cohort of the configuration.

        Raises:
            ValueError: more ranks than clients in the cohort.
        """
        engine, settings = self._engine, self._engine.settings
        cohort = settings.cohort if clients_per_rank is None else clients_per_rank * ranks
        if ranks > cohort:
            raise ValueError(f"{ranks} ranks for a cohort of {cohort}: some would have no client")
        owners: dict[int, int] = {}
        drawn: list[dict[str, float]] = []
        for r in range(DRAWN_ROUNDS):
            ids, blocks = self._draw(r, None if clients_per_rank is None else cohort)
            steps = engine.batches.steps(ids).astype(float).tolist()
            placed = place(range(len(ids)) if clients_per_rank else ids, steps, owners, [1.0] * ranks)
            loads = [
                sum(costs.batch_s(part) for part in _chunks([steps[p] for p in mine], self.choice.clients_per_batch))
                for mine in placed
            ]
            reduce_s, link_bytes = self._reduce(ranks, placed, blocks, network)
            moved = self._moves(ids, placed, owners) if clients_per_rank is None else 0
            row_bytes = len(engine.store.names) * self.layout.d * engine.server.x.element_size()
            reduce_s += network.send_s(row_bytes, ranks) * -(-moved // ranks) if moved else 0.0
            round_s = costs.round_s + max(loads, default=0.0) + reduce_s
            up, down = protocol_bytes(
                engine.algorithm.down, engine.server, engine.wires, self.layout, blocks, engine.server.x.element_size()
            )
            drawn.append({
                "cohort": len(ids), "round_s": round_s, "train_s": max(loads, default=0.0), "reduce_s": reduce_s,
                "efficiency": sum(loads) / (ranks * round_s), "link_bytes": link_bytes + moved * row_bytes,
                "protocol_up_bytes": up, "protocol_down_bytes": down,
            })  # fmt: skip
        means = {name: statistics.fmean(row[name] for row in drawn) for name in drawn[0]}
        return Prediction(ranks=ranks, **means)

    def _draw(self, r: int, cohort: int | None) -> tuple[list[int], list[int | None]]:
        """Clients and blocks of round `r` from 0; with a cohort of its own, clients come from the population again."""
        self._engine.round = r
        ids, blocks = self._engine.draw_cohort()
        self._engine.round = 0
        if cohort is not None and ids:
            ids = (ids * -(-cohort // len(ids)))[:cohort]
            blocks = (blocks * -(-cohort // len(blocks)))[:cohort]
        return ids, blocks

    def _reduce(
        self, ranks: int, placed: Sequence[Sequence[int]], blocks: Sequence[int | None], network: Network
    ) -> tuple[float, int]:
        """Seconds and link bytes of the round's reduction: the bucket, then every block among those that hold it."""
        engine, layout = self._engine, self.layout
        if ranks == 1:
            return 0.0, 0
        exact = engine.settings.reduction == "exact"
        # An exact sum is two integers of eight bytes.
        itemsize = 16 if exact else getattr(torch, engine.settings.reduce_dtype).itemsize
        sliced = sum(wire.only_block for wire in engine.wires.values())
        shared = layout.d - layout.block(layout.n_blocks).start
        numbers = N_SLOTS + 2 * ranks + 1 + (layout.n_blocks if sliced else 0)
        numbers += sum(shared if wire.only_block else wire.size(layout) for wire in engine.wires.values())
        if engine.mechanism is not None:
            numbers += len(blocks)
        bucket = numbers * itemsize + 8 * exact  # and one that tells of terms too large
        seconds = network.all_reduce_s(bucket, ranks, self._config.all_reduce, self.backend)
        n_bytes = 2 * (ranks - 1) * bucket
        received = [0.0] * ranks
        for b in range(layout.n_blocks if sliced else 0):
            holders = [w for w, mine in enumerate(placed) if any(blocks[p] == b for p in mine)]
            if not holders:
                continue
            span = layout.block(b)
            message = sliced * (span.stop - span.start) * itemsize
            n_bytes += (len(holders) - 1 + ranks - 1) * message
            # An owner receives from the other holders; blocks with different owners travel side by side.
            owner = min(holders, key=lambda w: received[w])
            received[owner] += (len(holders) - 1) * network.send_s(message, ranks)
            seconds += math.ceil(math.log2(ranks)) * network.send_s(message, ranks)
        return seconds + max(received), n_bytes

    def _moves(self, ids: Sequence[int], placed: Sequence[Sequence[int]], owners: dict[int, int]) -> int:
        """How many rows of client state change their rank; `owners` is updated."""
        if not self._engine.store.names:
            return 0
        moved = 0
        for rank, positions in enumerate(placed):
            for p in positions:
                moved += owners.get(ids[p], rank) != rank
                owners[ids[p]] = rank
        return moved

    def memory_bytes(self, ranks: int) -> dict[str, int]:
        """What one of so many ranks holds, by what it is.

        Returns:
            `server`, its vectors; `training`, the most that all other tensors took while two batches of clients trained
            here, activations included, and where uploads may be taken in meanwhile, one of them more; `clients`, kept
            state once every client was seen.
        """
        together = self.choice.clients_per_batch
        engine, _, _ = self._short(min(2 * together, self._config.clients), 1)
        with TensorPeak() as training:
            engine.run_round()
        item = engine.server.x.element_size()
        upload = sum(wire.size(self.layout) for wire in engine.wires.values()) * together * item
        return {
            "server": sum(value.numel() * value.element_size() for value in engine.server.values()),
            "training": training.peak_bytes + (0 if self._config.overlap == "never" else upload),
            "clients": -(-engine.population // ranks) * len(engine.store.names) * self.layout.d * item,
        }


def _chunks(items: Sequence[float], size: int) -> list[Sequence[float]]:
    return [items[at : at + size] for at in range(0, len(items), size)]
