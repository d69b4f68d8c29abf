"""A training run: configuration to engine, rounds to a run folder."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from . import checkpoint
from .config import Config, ConfigError, load, resolved
from .data.datasets import Dataset
from .data.partition import Partition
from .federated.batches import LocalWork
from .federated.collectives import Collectives, join, pick_device
from .federated.engine import Engine, EngineSettings
from .federated.objective import Objective
from .metrics import MetricsWriter, Progress, environment
from .rng import Purpose, stream

# Keys that may differ between a run and its continuation: they do not touch a number of the training.
FREE_KEYS = {
    "run_dir",
    "device",
    "threads",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "store_memory_bytes",
    "on_nonfinite",
}
PARTITION_SHOWN = 200

T = TypeVar("T")


@dataclass
class Outcome:
    """What `train` did: the run folder, rounds completed, and the signal that stopped it, if one did."""

    run_dir: Path
    rounds: int
    stopped_by: int | None


def build(config: Config, collectives: Collectives) -> tuple[Engine, Dataset, Partition]:
    """The engine of a configuration, with its dataset and partition.

    Raises:
        ValueError, FileNotFoundError: a dataset, partition, model or world size that does not fit the configuration.
    """
    torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    data = config.data.load()
    groups = None if data.groups is None else data.groups.numpy()
    partition = config.partition.split(data.labels.numpy(), groups, config.clients, config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream(config.seed, Purpose.MODEL).integers(2**63)))
        module = config.model.build(data.kind, data.input_shape, data.classes)
    buffers = [name for name, buffer in module.named_buffers() if name.endswith(("running_mean", "running_var"))]
    if buffers:
        raise ValueError(f"{buffers[0]}: running statistics would not be aggregated; use GroupNorm or LayerNorm")
    settings = EngineSettings(
        seed=config.seed,
        rounds=config.rounds,
        cohort=config.cohort,
        work=LocalWork(config.batch_size, config.local_steps, config.local_epochs),
        lr=config.lr,
        schedule=config.schedule,
        sampling=config.sampling,
        weighting=config.weighting,
        clip_norm=config.clip_norm,
        evaluator=config.evaluator,
        clients_per_batch=config.clients_per_batch,
        placement=config.placement,
        reduce_dtype=config.reduce_dtype,
        on_nonfinite=config.on_nonfinite,
        store_memory_bytes=config.store_memory_bytes,
    )
    objective = Objective(module, data, device, config.precision)
    engine = Engine(
        config.algorithm,
        objective,
        partition,
        settings,
        collectives,
        roles=config.model.roles(module),
        directory=config.run_dir / "client_state",
    )
    return engine, data, partition


def train(config: Config, *, resume: bool = False) -> Outcome:
    """Run a configuration to its last round, or from its newest checkpoint when resuming.

    Raises:
        ConfigError: the run folder already holds a run, or cannot be written.
        CheckpointError: no whole checkpoint to resume from, or one of another configuration.
        NonFiniteUpdateError: a client sent NaN or infinity and the configuration says `error`.
    """
    collectives = join(pick_device(config.device))
    engine, data, partition = _agree(collectives, lambda: build(config, collectives))
    leader = collectives.rank == 0
    # Only the cosine schedule depends on how many rounds there will be; other runs may be prolonged.
    free = FREE_KEYS if config.schedule == "cosine" else FREE_KEYS | {"rounds"}
    fingerprint = {key: value for key, value in resolved(config).items() if key not in free}
    checkpoints = config.run_dir / "checkpoints"
    restored = checkpoint.restore(checkpoints, engine, fingerprint) if resume else None
    _agree(collectives, lambda: _open_run(config, data, partition, resume) if leader else None)
    totals, notes = restored or ({"time_s": 0.0}, [])
    if resume and restored is None:
        notes = [f"no checkpoint in {checkpoints}: starting from round 1"]
    choice = engine.choice or engine.settle()
    writer = MetricsWriter(config.run_dir) if leader else None
    progress = Progress(config.rounds, first_round=engine.round) if leader else None
    stopped_by = None
    with _signals(engine) as received:
        try:
            if writer is not None and progress is not None:
                if resume:
                    writer.truncate_after(engine.round)
                    notes.append(f"resumed after round {engine.round} of {config.rounds}")
                for note in notes:
                    progress.note(note)
                device, ranks = engine.objective.device, collectives.world_size
                progress.note(f"{ranks} rank{'s' * (ranks > 1)} on {device.type}, {engine.layout.d:,} parameters")
                progress.note(
                    f"evaluator {choice.evaluator}, {choice.clients_per_batch} client(s) at once: {choice.why}"
                )
            while engine.round < config.rounds:
                start = time.perf_counter()
                row = engine.run_round()
                last = engine.round == config.rounds
                due = engine.round % config.eval_every == 0 or last
                row |= engine.evaluate() if due else {"test_loss": None, "test_accuracy": None}
                totals["time_s"] += time.perf_counter() - start
                if writer is not None and progress is not None:
                    row = {"round": row.pop("round"), "time_s": totals["time_s"], **row}
                    writer.write(row)
                    progress.update(row)
                    for line in engine.dropped:
                        progress.note(f"{line}: left out")
                if engine.round % config.checkpoint_every == 0 or last or engine.stop_agreed:
                    checkpoint.save(checkpoints, engine, fingerprint, totals, config.keep_checkpoints)
                if engine.stop_agreed and not last:
                    stopped_by = next(number for numbers in collectives.gather(received) for number in numbers)
                    if progress is not None:
                        name = signal.Signals(stopped_by).name
                        progress.note(f"stopped by {name} after round {engine.round}; continue with --resume")
                    break
        finally:
            if writer is not None and progress is not None:
                progress.close()
                writer.close()
        # Nobody leaves before the leader is done: launchers end all ranks when one exits as stopped.
        _agree(collectives, lambda: _finish(config, data, engine) if leader else None)
    return Outcome(config.run_dir, engine.round, stopped_by)


def load_model(run_dir: Path) -> nn.Module:
    """The trained model of a run, rebuilt from `model.json` and `model.safetensors`.

    Example:
        `model = load_model(Path("runs/digits-fedmuon")); logits = model(images)`
    """
    saved = json.loads((run_dir / "model.json").read_text())
    config = load(run_dir / "config.yaml", {})
    module = config.model.build(saved["kind"], tuple(saved["input_shape"]), saved["classes"])
    module.load_state_dict(load_file(run_dir / "model.safetensors"), strict=False)
    return module.eval()


def _open_run(config: Config, data: Dataset, partition: Partition, resume: bool) -> None:
    """Create the run folder and what describes the run before its first round."""
    run_dir = config.run_dir
    files = {
        "config.yaml": yaml.safe_dump(resolved(config), sort_keys=False),
        "environment.json": json.dumps(environment(), indent=1),
        "partition.json": json.dumps(_partition_facts(data, partition)),
    }
    try:
        if not resume and any((run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints")):
            raise ConfigError(
                f"run_dir: {run_dir} already holds a run; continue it with --resume or choose another name"
            )
        run_dir.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (run_dir / f".{name}").write_text(text)
            os.replace(run_dir / f".{name}", run_dir / name)
    except OSError as error:
        raise ConfigError(f"run_dir: cannot write to {run_dir}: {error}") from None


def _partition_facts(data: Dataset, partition: Partition) -> dict[str, Any]:
    labels = data.labels.numpy()
    classes = int(labels.max()) + 1
    shown = range(min(len(partition), PARTITION_SHOWN))
    return {
        "clients": len(partition),
        "samples": int(partition.offsets[-1]),
        "classes": classes,
        "sizes": partition.sizes[:PARTITION_SHOWN].tolist(),
        "histogram": [np.bincount(labels[partition[i]], minlength=classes).tolist() for i in shown],
    }


def _finish(config: Config, data: Dataset, engine: Engine) -> None:
    """Write the model and the report."""
    tensors = {name: value.detach().cpu().clone() for name, value in engine.named_parameters().items()}
    temporary = config.run_dir / ".model.safetensors"
    save_file(tensors, temporary)
    os.replace(temporary, config.run_dir / "model.safetensors")
    facts = {"kind": data.kind, "input_shape": data.input_shape, "classes": data.classes, "rounds": engine.round}
    (config.run_dir / "model.json").write_text(json.dumps({**facts, "model": resolved(config.model)}, indent=1))
    from .report import write_report  # matplotlib is only needed once, on one rank, at the end

    write_report([config.run_dir], config.run_dir / "report.html")


def _agree(collectives: Collectives, step: Callable[[], T]) -> T:
    """Run a step; if it fails on one rank, every rank raises the same error."""
    outcome: Any = None
    failure = None
    try:
        outcome = step()
    except (ValueError, OSError) as error:
        failure = error
    for other in collectives.gather(failure):
        if other is not None:
            raise other
    return outcome


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
