"""The engine: sample, place, train, aggregate, and count what it cost."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..contract import Algorithm, Round, Vectors
from ..data.partition import Partition
from ..formats import format_epsilon
from ..kernels.dispatch import Kernels
from ..kernels.exact_sum import RULES as EXACT_RULES
from ..kernels.rows import empty_rows
from ..layout import Role
from ..privacy.accountant import Accountant
from ..privacy.mechanism import GaussianMechanism, check
from .aggregate import Aggregator, protocol_bytes
from .batches import Batches
from .behind import Behind, spare_core
from .closing import Closing, RoundClosedError
from .codecs import Encoder, with_codec
from .collectives import Collectives
from .evaluators import BoundModule, Choice, Evaluator, make_evaluator
from .intake import DROPPED, LATE, N_SLOTS, STOP, Intake, Upload
from .objective import Objective
from .parallel import DataParallel, ShardedLoop, ShardedModule, check_shardable, cut_of, shard
from .placement import Placement
from .schedule import assign_blocks, learning_rate, sample_cohort
from .settings import EngineSettings
from .settling import settle
from .sharding import WHOLE, ShardedLayout
from .store import ClientStore
from .task import LocalTask

EVAL_BATCH = 256
UNHEARD = 10  # rounds in a row without any report that end a run


class NonFiniteUpdateError(FloatingPointError):
    """A client sent NaN or infinity."""


class DeadlineError(RuntimeError):
    """Rounds close before any client can report."""


class Engine:
    """Runs an algorithm on an objective: the same numbers on any number of ranks and with any batching of clients.

    Args:
        algorithm: the declared wires and functions.
        objective: model, loss and data on this rank's device; the model holds the initial parameters, equal on all
            ranks.
        partition: training samples of each client.
        roles: what each parameter is, from the model.
        directory: for mapped client state, if it ever outgrows memory.
        run: under privacy, which run it is: those that differ share no noise, whatever their `noise_seed`.

    Raises:
        BackendError: the settings name a backend of kernels that cannot run here.
        ValueError: a cohort larger than the population or smaller than the number of ranks, a client without data, or
            what `privacy.mechanism.check` refuses, or a target ε that one round exceeds.

    Attributes:
        mechanism, accountant: of private wires; None without privacy.
        dropped: a line for each client that sent NaN or infinity in the last round.
        late: clients of the last round that had not reported when it closed.
        kernels: the backends of ops, and what they ran on so far.

    Example:
        >>> from fedkernels.config import load
        >>> from fedkernels.train import build
        >>> federation = {"algorithm": "fedavg", "model": "mlp", "data": "digits", "partition": "iid", "clients": 4}
        >>> work = {"cohort": 2, "local_steps": 3, "batch_size": 8, "lr": 0.1, "rounds": 9, "evaluator": "loop"}
        >>> engine, _, _ = build(load(None, {**federation, **work, "run_dir": "unused"}), Collectives())
        >>> engine.run_round()["cohort"], engine.round
        (2, 1)
    """

    def __init__(
        self,
        algorithm: Algorithm,
        objective: Objective,
        partition: Partition,
        settings: EngineSettings,
        collectives: Collectives | None = None,
        *,
        roles: Mapping[str, Role] | None = None,
        directory: Path = Path("client_state"),
        run: int = 0,
    ) -> None:
        self.algorithm = algorithm
        self.objective = objective
        self.settings = settings
        self.collectives = collectives or Collectives()
        self.population = len(partition)
        self._check(partition)
        whole = algorithm.layout(objective.module, roles)
        group = self.collectives.group
        self.cut = cut_of(settings.sharding, group.size)
        self.layout = whole if self.cut == WHOLE else ShardedLayout(whole, self.cut, group)
        self.wires = with_codec(algorithm.up(self.layout), settings.codec)
        if self.cut != WHOLE:
            check_shardable(settings.sharding, algorithm, self.wires)
        encoder = Encoder(self.wires, self.layout, settings.seed)
        self.round = 0
        self.mechanism: GaussianMechanism | None = None
        self.accountant: Accountant | None = None
        self._check_privacy(run)
        self.batches = Batches(partition, objective, settings.work, settings.seed)
        self.sizes = partition.sizes
        self.nominal_steps = int(self.batches.work.steps(self.sizes).max())
        if settings.privacy is not None and settings.work.local_steps is not None:
            self.nominal_steps = settings.work.local_steps  # public, whatever the largest client has
        x = self.layout.flatten(dict(objective.module.named_parameters())).to(objective.device)
        self.server = Vectors(algorithm.init(x, self.layout), what="the server")
        self._sizes: Mapping[str, Tensor] = self.server
        if self.cut != WHOLE:
            self._sizes = algorithm.init(torch.empty(whole.d, dtype=x.dtype, device="meta"), whole)
        self.stop_requested = False  # by this rank, at any moment
        self.stop_agreed = False  # by all ranks, with the last round
        self.dropped: list[str] = []
        self.late: list[int] = []
        self._unheard = 0
        self._worked = 0  # local steps begun in this round by clients of this rank
        self.store = ClientStore(
            (*algorithm.keep, *encoder.residuals.values()),
            self.layout.d,
            x.dtype,
            directory / f"rank{self.collectives.process_rank}",
            settings.store_memory_bytes,
        )
        self.placement = Placement(self.store, self.collectives, measured=settings.placement == "measured")
        self.kernels = Kernels(settings.kernels)
        exact = {"exact_add": EXACT_RULES} if settings.reduction == "exact" else {}
        self.kernels.check(x.device.type, x.dtype, self.layout.d, exact)
        self._bound: BoundModule | ShardedModule
        if isinstance(self.layout, ShardedLayout):
            self._bound = shard(objective, self.layout, settings.sharding, self.collectives, settings.deepspeed)
        else:
            self._bound = BoundModule(objective, self.layout)
        self._gradients = x.new_empty(0, self.layout.d)
        self._sliced = any(wire.only_block for wire in self.wires.values())
        self._aggregator = Aggregator(
            self.wires,
            self.layout,
            x,
            torch.int64 if settings.reduction == "exact" else getattr(torch, settings.reduce_dtype),
            N_SLOTS + 2 * self.collectives.world_size,
            self.mechanism,
            self.collectives.group,
        )
        by_samples = settings.weighting == "samples"
        self._intake = Intake(encoder, self._aggregator, self.store, self.sizes if by_samples else None)
        self._closing = Closing(settings.drop_slowest, settings.cohort, self.collectives, x.device)
        # Ranks of a group would meet for jobs and for training in an order that is not the same on all.
        able = self.collectives.group.size == 1 and settings.overlap != "never"
        self._overlaps = able and (settings.overlap == "always" or spare_core(torch.get_num_threads()))
        self._evaluator: Evaluator | None = None
        self.choice: Choice | None = None

    def _check(self, partition: Partition) -> None:
        cohort, ranks, shards = self.settings.cohort, self.collectives.world_size, self.collectives.group.size
        if not 1 <= cohort <= self.population:
            raise ValueError(f"cohort is {cohort}, expected 1 to the number of clients, {self.population}")
        if (sampled := self.settings.sampled) > self.population:
            raise ValueError(
                f"drop_slowest: {sampled} clients to sample for a cohort of {cohort}, of {self.population}"
            )
        if ranks > cohort:
            who = "ranks" if shards == 1 else f"groups of {shards} ranks"
            raise ValueError(f"{ranks} {who} for a cohort of {cohort}: some would have no client; start fewer ranks")
        sizes = partition.sizes
        if (empty := np.flatnonzero(sizes == 0)).size:
            raise ValueError(f"client {empty[0]} has no sample ({empty.size} of {self.population} clients are empty)")

    def _check_privacy(self, run: int) -> None:
        settings, privacy = self.settings, self.settings.privacy
        check(
            privacy,
            self.wires,
            algorithm=type(self.algorithm).__name__,
            sampling=settings.sampling,
            weighting=settings.weighting,
            local_steps=settings.work.local_steps,
            on_nonfinite=settings.on_nonfinite,
        )
        if privacy is None:
            return
        if settings.drop_slowest is not None:
            raise ValueError("drop_slowest: who is heard would depend on data, which no ε counts; leave it null")
        if privacy.noise == "secure" and self.collectives.group.size > 1:
            raise ValueError("privacy.noise: 'secure' would differ among the ranks of a client group; use seeded noise")
        self.mechanism = GaussianMechanism(privacy, divisor=settings.cohort, run=run)
        self.accountant = Accountant(privacy.noise_multiplier, settings.cohort / self.population, privacy.delta)
        if self.last_round() == 0:
            raise ValueError(
                f"privacy.target_epsilon: {privacy.target_epsilon:g} is out of reach: the first round alone has "
                f"ε = {format_epsilon(self.accountant.epsilon(1, privacy.accountant))}; "
                "raise noise_multiplier or lower cohort"
            )

    def last_round(self) -> int:
        """The round the run ends with: R, or the last one before ε would exceed its target."""
        privacy = self.settings.privacy
        if self.accountant is None or privacy is None or privacy.target_epsilon is None:
            return self.settings.rounds
        # The ledger is ahead of the round where rounds are run again with other noise.
        ahead = self.accountant.rounds - self.round
        releases = self.accountant.affordable(privacy.target_epsilon, self.settings.rounds + ahead, privacy.accountant)
        return max(self.round, releases - ahead)

    def settle(self, choice: Choice | None = None) -> Choice:
        """Decide how gradients are computed, by measuring where the settings say `auto`; the same on every rank, as is
        the mechanism's seed from here on.

        Args:
            choice: an earlier decision to take over, such as a resumed run's.

        Raises:
            ValueError: the settings say `batched`, and the model cannot be batched over clients.
        """

        if not isinstance(self._bound, BoundModule):
            if self.settings.evaluator in ("batched", "compiled"):
                raise ValueError(
                    f"evaluator: {self.settings.evaluator!r}; sharding: {self.settings.sharding} computes one client "
                    "after another; expected auto or loop"
                )
            group, together = self.collectives.group, self.settings.clients_per_batch or 1
            why = f"each on {group.size} ranks by {self.settings.sharding}"
            self.choice = Choice("loop", together, why) if choice is None else replace(choice, evaluator="loop")
            self._evaluator = ShardedLoop(self.objective, self._bound, group, self.settings.microbatch_size)
            return self.choice
        bound = self._bound

        def make(choice: Choice) -> Evaluator:
            return make_evaluator(choice, self.objective, self.layout, bound, self.settings.microbatch_size)

        if choice is None:
            secret = None if self.mechanism is None else self.mechanism.seed
            choice, secret = settle(self.settings, self.server.x, self.batches, make, self.collectives, secret)
            if self.mechanism is not None and secret is not None:
                self.mechanism.seed = secret
        self.choice, self._evaluator = choice, make(choice)
        if self.collectives.group.size > 1:
            self._evaluator = DataParallel(self._evaluator, self.collectives.group)
        return choice

    @property
    def evaluator(self) -> Evaluator:
        """What computes gradients, settled if it was not yet."""
        if self._evaluator is None:
            self.settle()
        assert self._evaluator is not None
        return self._evaluator

    def run_round(self) -> dict[str, float | int | None]:
        """Run one round and return its metrics, timed on this rank and otherwise the same on all.

        Under privacy the first rank, which adds the noise, also tells ε and what clip and noise did.

        Raises:
            NonFiniteUpdateError: a client sent NaN or infinity and the settings say `error`; the server is as before.
            DeadlineError: the last rounds all closed at their deadline before any client had reported.
        """
        with self.kernels.use():
            return self._run_round(self.choice or self.settle())

    def _run_round(self, choice: Choice) -> dict[str, float | int | None]:
        link_before, start = self.collectives.link_bytes, time.perf_counter()
        settings, rank, world = self.settings, self.collectives.rank, self.collectives.world_size
        ids, blocks = self.draw_cohort()
        lr = learning_rate(settings.schedule, settings.lr, self.round, settings.rounds)
        private = self.mechanism is not None
        nominal = self.nominal_round(len(ids), lr)
        costs = self.batches.steps(ids).astype(float).tolist()
        placed = self.placement.place(ids, costs)
        self.collectives.at(self.round + 1, "move")
        self.placement.move(ids, placed, self.objective.device)

        aggregator = self._aggregator
        aggregator.reset(len(ids))
        self._closing.open(self.round)
        self.collectives.at(self.round + 1, "train")
        busy_start = time.perf_counter()
        # Where some may be late, those with least work come first.
        mine = placed[rank] if settings.drop_slowest is None else placed[rank][::-1]
        bad, late = self._train_and_take(mine, ids, blocks, nominal, choice.clients_per_batch)
        if self.objective.device.type == "cuda":
            torch.cuda.synchronize(self.objective.device)
        slots = aggregator.slots
        # Either may differ within a group, and what its ranks tell the others must not.
        asked = slots.new_tensor([float(self.stop_requested), time.perf_counter() - busy_start])
        self.collectives.group.sum(asked).div_(self.collectives.group.size)
        slots[DROPPED], slots[LATE] = len(bad), len(late)
        slots[STOP] = asked[0]
        slots[N_SLOTS + rank] = asked[1]
        slots[N_SLOTS + world + rank] = self._worked
        holders = [
            [w for w in range(world) if any(blocks[p] == b for p in placed[w])] for b in range(self.layout.n_blocks)
        ]
        if private and rank == 0:
            aggregator.add_noise(self.round)
        self.collectives.at(self.round + 1, "reduce")
        agg = aggregator.reduce(self.collectives, holders)
        self._closing.forget()
        loss_sum, loss_count, clients, steps, dropped, missed, stop, *per_rank = slots.tolist()
        self.dropped = []
        if dropped or missed:
            told = self.collectives.gather((bad, late))[:: self.collectives.group.size]  # all of a group say the same
            self.dropped = [line for lines, _ in told for line in lines]
            late = [position for _, positions in told for position in positions]
        self.late = [ids[position] for position in late]
        if dropped and settings.on_nonfinite == "error":
            raise NonFiniteUpdateError("; ".join(self.dropped))
        self.stop_agreed = stop > 0
        if settings.drop_slowest is not None:
            self._unheard = 0 if clients or not late else self._unheard + 1
            if self._unheard == UNHEARD:
                raise DeadlineError(
                    f"drop_slowest.deadline_s: {settings.drop_slowest.deadline_s:g} s, but in {UNHEARD} rounds nobody "
                    "had reported by then; clients that train together report together, see clients_per_batch"
                )
        metrics: dict[str, float | None] = {} if settings.drop_slowest is None else {"late": len(late)}
        self.collectives.at(self.round + 1, "server")
        # Under privacy an empty cohort is a round like any other: to skip it would tell that it was empty.
        if clients or private:
            done = nominal
            if not private:
                done = replace(nominal, cohort=int(clients), steps=steps / float(aggregator.weight))
            metrics |= self._update_server(agg, done)
        if self.accountant is not None:
            self.accountant.rounds += 1
            if rank == 0:
                metrics |= {"epsilon": self.accountant.epsilon(), "epsilon_rdp": self.accountant.epsilon(method="rdp")}
                metrics |= aggregator.diagnostics(int(clients))
        self.placement.note(per_rank[:world], per_rank[world:])
        self.round += 1
        reported = [block for position, block in enumerate(blocks) if position not in late]
        up_bytes, down_bytes = protocol_bytes(
            self.algorithm.down,
            self._sizes,
            self.wires,
            self.layout.whole,
            reported,
            self.server.x.element_size(),
            sampled=len(ids),
        )
        round_s = time.perf_counter() - start
        busiest = max(per_rank[:world])
        return {
            "round": self.round,
            "round_s": round_s,
            "lr": lr,
            "train_loss": loss_sum / loss_count if loss_count else None,
            "protocol_up_bytes": up_bytes,
            "protocol_down_bytes": down_bytes,
            "link_bytes": self._of_all_shards(self.collectives.link_bytes - link_before),
            "clients_per_s": clients / round_s,
            "rank_idle": 1 - sum(per_rank[:world]) / (world * busiest) if busiest else 0.0,
            "cohort": int(clients),
            "dropped": int(dropped),
            **metrics,
        }

    def draw_cohort(self) -> tuple[list[int], list[int | None]]:
        """Client ids of the round that is next, and the block each was assigned; None where wires are whole."""
        settings = self.settings
        # The initial model tells the run's seed, and ε counts on a cohort that nobody knows.
        seed = settings.seed if self.mechanism is None else self.mechanism.seed
        ids = sample_cohort(settings.sampling, seed, self.round, self.population, settings.sampled).tolist()
        if not self._sliced:
            return ids, [None] * len(ids)
        return ids, assign_blocks(settings.seed, self.round, len(ids), self.layout.n_blocks).tolist()

    def nominal_round(self, sampled: int, lr: float) -> Round:
        """The round that is next, as its clients see it."""
        # How many came is private too: where privacy is asked for, nobody is told but the metrics. Nor do clients know
        # how many of those sampled will be heard.
        known = self.mechanism is None and self.settings.drop_slowest is None
        cohort = sampled if known else self.settings.cohort
        return Round(self.round, cohort, self.population, self.nominal_steps, lr)

    def down(self) -> Vectors:
        """What of the server state clients receive."""
        return Vectors({name: self.server[name] for name in self.algorithm.down}, what="the down wires", read_only=True)

    def _train_and_take(
        self,
        mine: Sequence[int],
        cohort: Sequence[int],
        blocks: Sequence[int | None],
        nominal: Round,
        together: int,
    ) -> tuple[list[str], list[int]]:
        """Train this rank's positions of the cohort and take in what their clients send.

        Returns:
            A line for each client that sent NaN or infinity, and the positions of those that were late.
        """
        down = self.down()
        late: list[int] = []
        self._worked = 0
        # Who is late is decided client after client, by how many before were heard.
        on_thread = self._overlaps and len(mine) > together and self.settings.drop_slowest is None
        with Behind[list[str]](self.objective.device, on=on_thread) as behind:
            for first in range(0, len(mine), together):
                positions = mine[first : first + together]
                try:
                    upload = self._train(positions, cohort, blocks, down, nominal)
                except RoundClosedError:
                    late += positions
                else:
                    behind(partial(self._intake.take, upload, self.round))
                    del upload  # so that the next clients find its memory free
                    if self.settings.drop_slowest is not None:
                        self._closing.report(len(positions) - len(behind.results[-1]))
        self._intake.missed([cohort[p] for p in late])
        return [line for lines in behind.results for line in lines], late

    def _train(
        self,
        positions: Sequence[int],
        cohort: Sequence[int],
        blocks: Sequence[int | None],
        down: Vectors,
        nominal: Round,
    ) -> Upload:
        """Train the clients at some positions of the cohort.

        Raises:
            RoundClosedError: before they were done.
        """
        self._closing.check()
        assert self._evaluator is not None
        ids = [cohort[p] for p in positions]
        if len(self._gradients) != len(ids):
            self._gradients = empty_rows(self.server.x, len(ids), self.layout.d)
        mine = [blocks[p] for p in positions]
        task = LocalTask(
            self.layout,
            self.batches,
            ids,
            mine,
            nominal,
            self._evaluator,
            self._gradients,
            self.settings.clip_norm,
            self._closing.check,
        )
        stored = self.store.get(ids, self.server.x.device)
        keep = Vectors({name: stored[name] for name in self.algorithm.keep}, what="the client's kept state")
        versions = {name: value._version for name, value in down.items()}
        try:
            up = self.algorithm.client(down, keep, task)
            self._closing.check()
        finally:
            self._worked += task.steps_begun
        if written := [name for name, value in down.items() if value._version != versions[name]]:
            raise RuntimeError(f"{type(self.algorithm).__name__}.client wrote to {', '.join(written)} in place")
        self._check_up(up, len(ids))
        if self.collectives.faults is not None:
            self.collectives.faults.spoil(up, self.round + 1)
        # The next clients get the same memory for their gradients.
        memory = self._gradients.untyped_storage().data_ptr()
        return Upload(
            up={name: v.clone() if v.untyped_storage().data_ptr() == memory else v for name, v in up.items()},
            kept=stored | {name: keep[name] for name in self.algorithm.keep},
            positions=positions,
            ids=ids,
            blocks=mine,
            steps=self.batches.steps(ids).tolist(),
            loss_sum=task.loss_sum,
            loss_count=task.loss_count,
        )

    def _check_up(self, up: Mapping[str, Tensor], clients: int) -> None:
        expected = {name: (clients, wire.size(self.layout)) for name, wire in self.wires.items()}
        found = {name: tuple(value.shape) for name, value in up.items()}
        if found != expected:
            raise RuntimeError(
                f"{type(self.algorithm).__name__}.client must return exactly its up wires {expected}, got {found}"
            )

    def _update_server(self, agg: Vectors, r: Round) -> dict[str, float]:
        """Let the algorithm fold the aggregate in; returns its metrics."""
        before = Vectors(self.server, what="the server", read_only=True)
        metrics = self.algorithm.metrics(before, agg, r)
        new = self.algorithm.server(before, agg, r)
        if unknown := set(new) - set(self.server):
            raise RuntimeError(f"{type(self.algorithm).__name__}.server returned {unknown}, which init did not declare")
        self.server.update(new)
        return metrics

    def _of_all_shards(self, link_bytes: int) -> int:
        counted = torch.tensor(float(link_bytes), dtype=torch.float64, device=self.objective.device)
        return int(self.collectives.group.sum(counted))

    def evaluate(self) -> dict[str, float]:
        """Loss, accuracy and the task's own metrics of the server model on the test set, shared out over ranks."""
        self.collectives.at(self.round, "evaluate")
        module = self.objective.module
        self._bound.bind(self.server.x, None)
        module.eval()
        collectives, samples = self.collectives, self.objective.test_samples
        share = -(-samples // collectives.processes)
        first = collectives.process_rank * share
        stop = min(samples, first + share)
        sums = torch.zeros(self.objective.n_sums, dtype=torch.float64, device=self.objective.device)
        for at in range(first, first + share, EVAL_BATCH):
            if at < stop:
                sums += self.objective.evaluate(slice(at, min(stop, at + EVAL_BATCH)))
            elif collectives.group.size > 1:
                self.objective.evaluate(slice(0, 1))  # a sharded module computes on all ranks of its group
        module.train()
        collectives.group.sum(collectives.all_reduce(sums))
        return self.objective.scores(sums)

    def named_parameters(self) -> dict[str, Tensor]:
        """The server model by parameter name, as views; where it is sharded, all ranks of a group call this, and the
        first gets it on its host, the others nothing."""
        if not isinstance(self.layout, ShardedLayout):
            return self.layout.views(self.server.x)
        x = self.layout.gather(self.server.x)
        return {} if x is None else self.layout.whole.views(x)

    def frozen_parameters(self) -> dict[str, Tensor]:
        """The parameters that are not trained; where they are sharded, as `named_parameters`."""
        if not isinstance(self._bound, BoundModule):
            return self._bound.frozen()
        return {name: p.detach() for name, p in self.objective.module.named_parameters() if not p.requires_grad}
