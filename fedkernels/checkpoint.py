"""Checkpoints: atomic, checksummed, written by all ranks, readable by any number of ranks.

A checkpoint is a folder `round-000010` with `server.safetensors` (or its shards, where a client is trained by several
ranks), client state by rank and page, `manifest.json`, which names every file with its SHA-256, and `manifest.sha256`.
It is written under another name, flushed, and renamed when complete: what bears the final name is whole, and a failure
leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from .config import ConfigError
from .federated.engine import Engine
from .federated.evaluators import Choice
from .federated.sharding import Cut, common, dealt

MANIFEST, SEAL = "manifest.json", "manifest.sha256"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read, or continued from."""


def save(root: Path, engine: Engine, fingerprint: dict[str, Any], totals: dict[str, float], keep: int) -> Path:
    """Write the state after `engine.round` rounds; every rank calls it, all return or all raise.

    Args:
        root: the run's `checkpoints` folder, shared by all ranks.
        fingerprint: what a resumed run's configuration must equal.
        totals: running sums of the caller, such as elapsed time.
        keep: newest checkpoints that stay; older ones are removed after the new one is complete.

    Raises:
        CheckpointError: a rank could not write; nothing of this checkpoint stays.
    """
    final = root / f"round-{engine.round:06d}"
    partial = root / f".partial-{final.name}"
    collectives = engine.collectives

    def attempt(step: Any) -> list[Any]:
        try:
            outcome = step()
        except OSError as error:
            outcome = CheckpointError(f"rank {collectives.process_rank} cannot write checkpoint {final}: {error}")
        outcomes = collectives.gather(outcome)
        if failures := [outcome for outcome in outcomes if isinstance(outcome, CheckpointError)]:
            if collectives.leader:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError("; ".join(map(str, failures)) + "; earlier checkpoints are untouched")
        return outcomes

    def prepare() -> None:
        if collectives.leader:
            for left_over in root.glob(".partial-*"):
                shutil.rmtree(left_over)
            partial.mkdir(parents=True)

    def write() -> dict[str, str]:
        collectives.at(engine.round, "checkpoint")
        hashes = {}
        for name, tensors in _files(engine):
            hashes[name] = _write(partial / name, save_tensors(tensors))
        return hashes

    def publish() -> None:
        if not collectives.leader:
            return
        assert engine.choice is not None
        manifest = {
            "round": engine.round,
            "world_size": collectives.processes,
            "cut": asdict(engine.cut),
            "fingerprint": fingerprint,
            "totals": totals,
            "choice": asdict(engine.choice),
            "privacy": _ledger(engine),
            "sha256": {name: digest for hashes in written for name, digest in hashes.items()},
        }
        digest = _write(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
        _write(partial / SEAL, digest.encode())
        _flush(partial)
        if final.exists():  # damaged, or the run would not have come back to this round
            shutil.rmtree(final)
        os.replace(partial, final)
        _flush(root)
        complete = _complete(root)
        newest = complete.index(final) + 1
        # Those of later rounds are damaged too: a resume has passed them over.
        for other in complete[: max(0, newest - keep)] + complete[newest:]:
            shutil.rmtree(other)

    attempt(prepare)
    written = attempt(write)
    attempt(publish)
    collectives.at(engine.round, "saved")
    return final


def restore(root: Path, engine: Engine, fingerprint: dict[str, Any]) -> tuple[dict[str, float], list[str]] | None:
    """Load the newest whole checkpoint into the engine; every rank calls it.

    Returns:
        The caller's totals and a line for every damaged checkpoint that was passed over; None where there is no
        checkpoint at all.

    Raises:
        CheckpointError: every checkpoint is damaged.
        ConfigError: the configuration differs from the one that wrote it.
    """
    found = _find(root) if engine.collectives.leader else None
    manifest, path, notes = engine.collectives.gather(found)[0]
    if path is None and not notes:
        return None
    if path is None:
        raise CheckpointError("; ".join(notes) + "; no whole checkpoint is left")
    if differing := differences(manifest["fingerprint"], fingerprint):
        raise ConfigError(
            f"{path} belongs to another configuration: {'; '.join(differing)}; use the same one, or a new run_dir"
        )
    engine.collectives.agree(lambda: _load(path, sorted(manifest["sha256"]), Cut(**manifest["cut"]), engine))
    engine.round = manifest["round"]
    engine.settle(Choice(**manifest["choice"]))
    if engine.accountant is not None and engine.mechanism is not None:
        engine.accountant.rounds = manifest["privacy"]["rounds"]
        engine.mechanism.seed = manifest["privacy"]["seed"]
    return manifest["totals"], notes


def _ledger(engine: Engine) -> dict[str, Any] | None:
    """What has been released so far, and the seed of cohorts and noise, which must stay as secret as the data."""
    if engine.accountant is None or engine.mechanism is None:
        return None
    names = ("noise_multiplier", "sampling_rate", "delta", "rounds")
    return {name: getattr(engine.accountant, name) for name in names} | {"seed": engine.mechanism.seed}


def _load(path: Path, names: list[str], written: Cut, engine: Engine) -> None:
    """Server state, who owns which client, and the state of this rank's clients; of vectors this rank's shard.

    Args:
        names: of the files.
        written: how vectors were dealt out over ranks when they were written.
    """
    whole, shard = engine.layout.whole, engine.collectives.group.index % engine.cut.shards
    along = dealt(engine.algorithm, whole, written) | dealt(engine.algorithm, whole, engine.cut)
    with ExitStack() as open_files:
        files = [path / _server_file(written, number) for number in range(written.shards)]
        parts = [open_files.enter_context(safe_open(file, "pt")) for file in files]
        for name, value in engine.server.items():
            if name not in along:
                engine.server[name] = parts[0].get_tensor(name).to(value.device)
                continue
            loaded = torch.empty(value.shape, dtype=value.dtype)
            for number, part in enumerate(parts):
                for there, here in common(along[name], written, number, engine.cut, shard):
                    loaded[here] = part.get_slice(name)[there]
            engine.server[name] = loaded.to(value.device)
    kept, d = len(engine.store.names), engine.layout.d
    seen: set[int] = set()
    for name in names:
        if name.startswith("clients-"):
            group, number = divmod(int(name.split("-")[1]), written.shards)
            # Group w of the writer goes to group w here; with fewer groups they wrap around.
            owner = group % engine.collectives.world_size
            with safe_open(path / name, "pt") as page:
                clients = page.get_tensor("ids").tolist()
                engine.placement.owners.update(dict.fromkeys(clients, owner))
                if owner != engine.collectives.rank:
                    continue
                rows = page.get_tensor("rows").unflatten(1, (kept, -1))
                shared = list(common(whole.entries, written, number, engine.cut, shard))
                for client, row in zip(clients, rows, strict=True):
                    if client not in seen:
                        seen.add(client)
                        engine.store.put_row(client, torch.zeros(kept * d, dtype=row.dtype))
                    for there, here in shared:
                        engine.store.row(client).view(kept, d)[:, here] = row[:, there]


def _files(engine: Engine) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What this rank writes: name and tensors, one file in memory at a time."""
    collectives, shard = engine.collectives, engine.collectives.group.index
    if shard >= engine.cut.shards:  # a replica of the first rank of its group
        return
    if collectives.rank == 0:
        server = {name: value.contiguous().cpu() for name, value in engine.server.items()}
        yield _server_file(engine.cut, shard), server
    for page, tensors in enumerate(engine.store.pages()):
        yield f"clients-{collectives.rank * engine.cut.shards + shard}-{page}.safetensors", tensors


def _server_file(cut: Cut, shard: int) -> str:
    return "server.safetensors" if cut.shards == 1 else f"server-{shard}.safetensors"


def _find(root: Path) -> tuple[dict[str, Any] | None, Path | None, list[str]]:
    notes = []
    for path in reversed(_complete(root)):
        try:
            content = _verified(path / MANIFEST, (path / SEAL).read_text())
            manifest = json.loads(content)
            for name, digest in manifest["sha256"].items():
                _verified(path / name, digest)
        except (OSError, ValueError) as error:
            notes.append(f"checkpoint {path} is damaged ({error})")
            continue
        return manifest, path, notes
    return None, None, notes


def _verified(path: Path, digest: str) -> bytes:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{path.name} does not match its checksum")
    return content


def differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    """Nested keys whose values differ, a line each."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{where}{key}.")
        elif a != b:
            lines.append(f"{where}{key} was {a!r}, now {b!r}")
    return lines


def _complete(root: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return sorted(root.glob("round-[0-9]*"))


def _write(path: Path, content: bytes) -> str:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
