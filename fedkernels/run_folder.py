"""What a run leaves in its folder beside metrics and checkpoints: what it was, and the model it ended with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .checkpoint import differences
from .config import Config, ConfigError, choice, load, resolved
from .data.datasets import Dataset
from .data.partition import Partition
from .data.tokens import Tokens
from .launch_record import record_launch
from .metrics import environment
from .models import MODELS, Pretrained

PARTITION_SHOWN = 200
# Keys that may differ between a run and its continuation: a change of them is no other experiment.
FREE_KEYS = {
    "run_dir",
    "device",
    "threads",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "store_memory_bytes",
    "timeout_s",
    "all_reduce",
    "overlap",
    "on_nonfinite",
    "sharding",
    "shard_size",
    "deepspeed",
}

# Keys that a continuation keeps, although the numbers do not depend on them.
HOW_KEYS = {"evaluator", "clients_per_batch", "microbatch_size", "placement", "kernels"}


def fingerprint(config: Config) -> dict[str, Any]:
    """The keys in which a continuation must equal the run."""
    # Only the cosine schedule depends on how many rounds there will be; other runs may be prolonged.
    free = FREE_KEYS if config.schedule == "cosine" else FREE_KEYS | {"rounds"}
    return {key: value for key, value in resolved(config).items() if key not in free}


def run_number(config: Config) -> int:
    """64 bits that runs share only where they compute the same, however they compute it."""
    what = {key: value for key, value in fingerprint(config).items() if key not in HOW_KEYS}
    return int.from_bytes(hashlib.sha256(json.dumps(what, sort_keys=True).encode()).digest()[:8])


def check_unused(run_dir: Path) -> None:
    """Refuse a folder that holds a run.

    Raises:
        ConfigError: it does, or it cannot be looked into.
    """
    try:
        used = any((run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints"))
    except OSError as error:
        raise ConfigError(f"run_dir: cannot look into {run_dir}: {error}") from None
    if used:
        raise ConfigError(f"run_dir: {run_dir} already holds a run; continue it with --resume or choose another name")


def open_run(config: Config, data: Dataset, partition: Partition) -> None:
    """Create the folder, or check that the run in it is this one, and write what the run is.

    Args:
        partition: training samples of each client, summed up in `partition.json`.

    Raises:
        ConfigError: the folder holds another run, or cannot be written.
    """
    run_dir = config.run_dir
    files = {
        "config.yaml": yaml.safe_dump(resolved(config), sort_keys=False),
        "environment.json": json.dumps(environment(), indent=1),
        "partition.json": json.dumps(_partition_facts(data, partition)),
    }
    try:
        if (run_dir / "config.yaml").exists():
            before = fingerprint(load(run_dir / "config.yaml", {}))
            if changed := differences(before, fingerprint(config)):
                raise ConfigError(f"run_dir: {run_dir} holds another run: {'; '.join(changed)}; choose another name")
        run_dir.mkdir(parents=True, exist_ok=True)
        record_launch(run_dir)  # before what makes the folder a run: who dies in between must find itself there
        for name, text in files.items():
            _replace(run_dir / name, text)
    except OSError as error:
        raise ConfigError(f"run_dir: cannot write to {run_dir}: {error}") from None


def save_model(
    config: Config, data: Dataset, trained: dict[str, Tensor], frozen: dict[str, Tensor], rounds: int
) -> None:
    """Write the model as `model.safetensors` and, in `model.json`, how to build it.

    Args:
        trained: the trainable parameters by name.
        frozen: the others, but for those that can be read again from the directory that the model came from.
    """
    tensors = {name: value.detach().cpu().clone() for name, value in (frozen | trained).items()}
    temporary = config.run_dir / ".model.safetensors"
    temporary.write_bytes(save(tensors))
    os.replace(temporary, config.run_dir / "model.safetensors")
    facts = {
        "model": resolved(config)["model"],
        "kind": data.kind,
        "input_shape": data.input_shape,
        "classes": data.classes,
        "tokens": dataclasses.asdict(data.tokens),
        "rounds": rounds,
    }
    _replace(config.run_dir / "model.json", json.dumps(facts, indent=1))


def load_model(folder: Path) -> nn.Module:
    """The trained model of a run, rebuilt from `model.json` and `model.safetensors` alone.

    A model that came from a directory needs that one too.

    Raises:
        FileNotFoundError: a file or the directory is not there.
        ValueError: their parameters do not fit together, or a file is damaged.

    Example:
        `model = load_model(Path("runs/digits-fedmuon")); logits = model(images)`
    """
    facts = json.loads((folder / "model.json").read_text())
    config = choice(MODELS, facts["model"], "model")
    tokens = Tokens(**facts["tokens"])
    module: nn.Module = config.build(facts["kind"], tuple(facts["input_shape"]), facts["classes"], tokens)
    try:
        missing, unknown = module.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder / 'model.safetensors'}: {error}") from None
    # A tied parameter goes by several names in a state dict, and is saved under its first.
    needed = [name for name, p in module.named_parameters() if p.requires_grad or not isinstance(config, Pretrained)]
    if absent := unknown + [name for name in needed if name in missing]:
        raise ValueError(f"{folder}: model.json and model.safetensors differ in {', '.join(absent)}")
    return module.eval()


def _partition_facts(data: Dataset, partition: Partition) -> dict[str, Any]:
    labels = data.labels.numpy()
    classes = int(labels.max()) + 1
    shown = range(min(len(partition), PARTITION_SHOWN))
    return {
        "clients": len(partition),
        "samples": int(partition.offsets[-1]),
        "histogram": [np.bincount(labels[partition[i]], minlength=classes).tolist() for i in shown],
    }


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)
