"""A training run: configuration to engine, rounds to a run folder."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, faults
from .config import Config
from .data.datasets import Dataset
from .data.partition import Partition
from .data.text import Glue, Topics
from .data.tokens import has_tokenizer
from .federated.batches import LocalWork
from .federated.codecs import codec_notes
from .federated.collectives import Collectives, join, pick_device
from .federated.engine import Engine
from .federated.objective import Objective
from .federated.settings import EngineSettings
from .formats import format_epsilon
from .launch_record import begun_by_this_job
from .metrics import MetricsWriter, Progress, read_metrics
from .models import Pretrained
from .rng import Purpose, stream
from .run_folder import check_unused, fingerprint, open_run, run_number, save_model


@dataclass
class Outcome:
    """What `train` did: the run folder, rounds completed, and the signal that stopped it, if one did."""

    run_dir: Path
    rounds: int
    stopped_by: int | None


def load_data(config: Config) -> Dataset:
    """The dataset, where it is text and names no tokenizer in the tokens of the directory its model comes from."""
    data, model = config.data, config.model
    if isinstance(data, Glue | Topics) and data.tokenizer is None:
        path = model.path if isinstance(model, Pretrained) and has_tokenizer(model.path) else None
        return replace(data, tokenizer=path).load()
    return data.load()


def split(config: Config, data: Dataset) -> Partition:
    """Training samples of each client."""
    groups = None if data.groups is None else data.groups.numpy()
    return config.partition.split(data.labels.numpy(), groups, config.clients, config.seed)


def build(config: Config, collectives: Collectives, data: Dataset | None = None) -> tuple[Engine, Dataset, Partition]:
    """The engine of a configuration, with its dataset and partition.

    Args:
        data: the dataset, where it has been read or stands for another; None reads the configuration's.

    Raises:
        ValueError, FileNotFoundError: a dataset, partition, model or world size that does not fit the configuration.
    """
    torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    data = data or load_data(config)
    partition = split(config, data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream(config.seed, Purpose.MODEL).integers(2**63)))
        module = config.model.build(data.kind, data.input_shape, data.classes, data.tokens)
    buffers = [name for name, buffer in module.named_buffers() if name.endswith(("running_mean", "running_var"))]
    if buffers:
        raise ValueError(f"{buffers[0]}: running statistics would not be aggregated; use GroupNorm or LayerNorm")
    work = LocalWork(config.batch_size, config.local_steps, config.local_epochs)
    common = {f.name: getattr(config, f.name) for f in fields(EngineSettings) if f.name != "work"}
    engine = Engine(
        config.algorithm,
        Objective(module, data, device, config.precision, to_shard=config.sharding in ("fsdp2", "deepspeed")),
        partition,
        EngineSettings(work=work, **common),
        collectives,
        roles=config.model.roles(module),
        directory=config.run_dir / "client_state",
        run=run_number(config),
    )
    return engine, data, partition


def train(config: Config, *, resume: bool = False) -> Outcome:
    """Run a configuration to its last round, or from its newest checkpoint when resuming.

    Args:
        resume: continue the run in `run_dir`; where it has no checkpoint yet, start it from the first round. Ranks that
            torchrun starts again do so by themselves.

    Raises:
        ConfigError: the run folder already holds a run, or another one on resume, or cannot be written.
        CheckpointError: no whole checkpoint to resume from, or one of another configuration.
        NonFiniteUpdateError: a client sent NaN or infinity and the configuration says `error`.
        DeadlineError: the last rounds all closed at their deadline before any client had reported.
        OSError: the metrics cannot be written; the state up to that round is in a checkpoint.
        LostRankError: another rank failed, died, or did not come to a collective within `timeout_s`.
    """
    device = pick_device(config.device)
    with join(
        device,
        config.timeout_s,
        faults.from_environment(config.run_dir),
        shard_size=config.shard_size,
        all_reduce=config.all_reduce,
    ) as collectives:
        return _train(config, device, collectives, resume)


def _train(config: Config, device: torch.device, collectives: Collectives, resume: bool) -> Outcome:
    leader = collectives.leader
    again = collectives.agree(lambda: leader and begun_by_this_job(config.run_dir))
    resume = any(collectives.gather(resume or again))
    collectives.agree(lambda: check_unused(config.run_dir) if leader and not resume else None)
    engine, data, partition = collectives.agree(lambda: build(config, collectives))
    checkpoints = config.run_dir / "checkpoints"
    identity = fingerprint(config)
    restored = checkpoint.restore(checkpoints, engine, identity) if resume else None
    choice = engine.choice or engine.settle()
    collectives.agree(lambda: open_run(config, data, partition) if leader else None)
    totals, notes = restored or ({"time_s": 0.0}, [])
    if resume and restored is None:
        notes = [f"no checkpoint in {checkpoints}: starting from round 1"]
    elif resume:
        notes.append(f"resumed after round {engine.round} of {config.rounds}")
    ranks = f"{collectives.processes} rank{'s' * (collectives.processes > 1)}"
    if collectives.group.size > 1:
        ranks += f" in groups of {collectives.group.size} by {config.sharding}"
    notes.append(f"{ranks} on {device.type}, {engine.layout.whole.d:,} parameters")
    if config.all_reduce == "hierarchical":
        how, levels = "flat: there is one node, or one rank on each", collectives.hierarchy
        if levels is not None:
            how = f"in {levels.nodes} nodes of {levels.ranks}, then across"
        notes.append(f"all-reduce {how}")
    notes.append(f"evaluator {choice.evaluator}, {choice.clients_per_batch} client(s) at once: {choice.why}")
    notes += codec_notes(engine.wires, engine.layout)
    if engine.mechanism is not None:
        lost = _count_lost_rounds(engine, config.run_dir)
        notes += lost
        if restored is None or lost:
            # Before anything is released: a run that dies goes on with its seed and its ledger.
            checkpoint.save(checkpoints, engine, identity, totals, config.keep_checkpoints)
    # Every rank works it out, but only as alike as their processors round.
    rounds = collectives.gather(engine.last_round())[0]
    notes += _privacy_notes(engine, rounds)
    log = collectives.agree(lambda: _Log(config, engine, rounds, notes) if leader else None)
    stopped_by = None
    with _signals(engine) as received:
        try:
            while engine.round < rounds and not engine.stop_agreed:
                start = time.perf_counter()
                first = not engine.kernels.chosen
                row = engine.run_round()
                last = engine.round == rounds
                due = engine.round % config.eval_every == 0 or last
                row |= engine.evaluate() if due else dict.fromkeys(engine.objective.score_names)
                totals["time_s"] += time.perf_counter() - start
                if log is not None:
                    if first:
                        log.progress.note(engine.kernels.summary())
                    log.write({"round": engine.round, "time_s": totals["time_s"], **row})
                if engine.round % config.checkpoint_every == 0 or last or engine.stop_agreed:
                    checkpoint.save(checkpoints, engine, identity, totals, config.keep_checkpoints)
            collectives.agree(lambda: log.check() if log is not None else None)
            if engine.round < rounds:
                stopped_by = next(number for numbers in collectives.gather(received) for number in numbers)
                if log is not None:
                    name = signal.Signals(stopped_by).name
                    log.progress.note(f"stopped by {name} after round {engine.round}; continue with --resume")
            elif rounds < config.rounds and log is not None and config.privacy is not None:
                target = f"ε = {config.privacy.target_epsilon:g}"
                log.progress.note(f"ended after round {rounds} of {config.rounds}: another would exceed {target}")
        finally:
            if log is not None:
                log.close()
        collectives.at(engine.round, "report")
        # Nobody leaves before the leader is done: launchers end all ranks when one exits as stopped.
        trained, frozen = ({}, {}) if collectives.rank else (engine.named_parameters(), _frozen(config, engine))
        collectives.agree(lambda: _finish(config, data, trained, frozen, engine.round) if leader else None)
    return Outcome(config.run_dir, engine.round, stopped_by)


class _Log:
    """The leader's metrics file and progress line.

    A full disk must end all ranks together: `write` asks for a stop at the next round, and `check` then raises.
    """

    def __init__(self, config: Config, engine: Engine, rounds: int, notes: list[str]) -> None:
        self._engine, self._config = engine, config
        self._writer = MetricsWriter(config.run_dir)
        self._writer.truncate_after(engine.round)
        self._failure: OSError | None = None
        self.progress = Progress(rounds, first_round=engine.round)
        for note in notes:
            self.progress.note(note)

    def write(self, row: dict[str, Any]) -> None:
        try:
            self._writer.write(row)
        except OSError as error:
            self._failure = self._failure or error
            self._engine.stop_requested = True
        self.progress.update(row)
        for line in self._engine.dropped:
            self.progress.note(f"{line}: left out")
        if self._engine.late and row["cohort"] < self._config.cohort:  # with a cohort heard it closed for that
            late = ", ".join(map(str, self._engine.late))
            self.progress.note(f"round {row['round']} closed at its deadline without clients {late}")

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        self.progress.close()
        self._writer.close()


def _count_lost_rounds(engine: Engine, run_dir: Path) -> list[str]:
    """Count rounds that came after the checkpoint: with secure noise they are released again, and not alike."""
    rows = engine.collectives.agree(lambda: read_metrics(run_dir) if engine.collectives.leader else [])
    last = engine.collectives.gather(rows[-1]["round"] if rows else 0)[0]
    if engine.mechanism is None or engine.accountant is None or not engine.mechanism.secure or last <= engine.round:
        return []
    engine.accountant.rounds += last - engine.round
    return [f"privacy: rounds {engine.round + 1} to {last} are run again with other noise; ε counts them twice"]


def _privacy_notes(engine: Engine, rounds: int) -> list[str]:
    privacy, accountant = engine.settings.privacy, engine.accountant
    if privacy is None or accountant is None:
        return []
    epsilon = accountant.epsilon(accountant.rounds + rounds - engine.round, privacy.accountant)
    notes = [
        f"privacy: ε = {format_epsilon(epsilon)} at δ = {privacy.delta:g} after round {rounds}, "
        f"by {privacy.accountant.upper()}, with σ = {privacy.noise_multiplier:g} and q = {accountant.sampling_rate:g}"
    ]
    if privacy.delta >= 1 / engine.population:
        notes.append(
            f"privacy.delta: {privacy.delta:g} is not below 1/{engine.population}, one over the number of clients: "
            "to publish some client's data whole would satisfy it"
        )
    return notes


def _frozen(config: Config, engine: Engine) -> dict[str, Tensor]:
    """The parameters that are not trained, where they cannot be read again from the directory the model came from."""
    return {} if isinstance(config.model, Pretrained) else engine.frozen_parameters()


def _finish(config: Config, data: Dataset, trained: dict[str, Tensor], frozen: dict[str, Tensor], rounds: int) -> None:
    save_model(config, data, trained, frozen, rounds)
    from .report import write_report  # matplotlib is only needed once, on one rank, at the end

    write_report([config.run_dir], config.run_dir / "report.html")


@contextmanager
def _signals(engine: Engine) -> Iterator[list[int]]:
    """Collect SIGTERM, SIGINT and SIGUSR1, which ask for a stop; a second SIGINT interrupts at once."""
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)
        engine.stop_requested = True

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    watched = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    previous = {number: signal.signal(number, on_signal) for number in watched}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
