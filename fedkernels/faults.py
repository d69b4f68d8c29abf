"""Faults on purpose, to test what a run does about them: nothing here is active unless `FEDKERNELS_FAULT` is set.

    FEDKERNELS_FAULT="kill rank=1 round=3 stage=reduce; nan rank=0 round=5 stage=train"

Every fault happens once in the life of a run folder: it leaves `.fault-N` there, so a run that is started again gets
past it.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

VARIABLE = "FEDKERNELS_FAULT"
Kind = Literal["raise", "kill", "term", "hang", "stop", "slow", "nan", "full", "truncate", "flip"]
Stage = Literal["move", "train", "reduce", "server", "evaluate", "checkpoint", "saved"]
HANG_S = 86400.0


class InjectedError(RuntimeError):
    """The fault `raise`."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong.

    Args:
        kind: `raise` an error; `kill` by SIGKILL; `term` by SIGTERM; `hang` for ever; `stop` the process by SIGSTOP, as
            where its machine is cut off; be `slow` for some seconds; a client sends `nan`; the disk is `full`;
            `truncate` the newest checkpoint, or `flip` a bit of it.
        rank: to whom.
        round: in which round, from 1.
        stage: on coming to `move`, `train`, `reduce`, `server`, `evaluate` or `checkpoint`, or with the latter `saved`.
        seconds: how long `slow` takes.

    Example:
        >>> parse("slow rank=1 round=3 stage=train seconds=2.5")[0].seconds
        2.5
    """

    kind: Kind
    rank: int
    round: int
    stage: Stage
    seconds: float = 1.0


def parse(text: str) -> tuple[Fault, ...]:
    """Faults in words, `KIND rank=N round=N stage=STAGE`, several with semicolons between.

    Raises:
        ValueError: an unknown kind, stage or key, or a missing or malformed value.
    """
    faults = []
    for words in (part.split() for part in text.split(";")):
        where = f"{VARIABLE}: {' '.join(words)!r}"
        if not words:
            raise ValueError(f"{VARIABLE}: {text!r}, expected KIND rank=N round=N stage=STAGE between semicolons")
        given = {key: value for key, _, value in (word.partition("=") for word in words[1:])}
        kind, stage = words[0], given.get("stage", "")
        if kind not in get_args(Kind):
            raise ValueError(f"{where}: unknown kind {kind!r}; expected one of {', '.join(get_args(Kind))}")
        if stage not in get_args(Stage):
            raise ValueError(f"{where}: unknown stage {stage!r}; expected one of {', '.join(get_args(Stage))}")
        try:
            rank, round_, seconds = int(given["rank"]), int(given["round"]), float(given.get("seconds", "1"))
        except (KeyError, ValueError):
            raise ValueError(f"{where}: expected rank=N round=N and, for slow, seconds=S") from None
        if unknown := given.keys() - {"rank", "round", "stage", "seconds"}:
            raise ValueError(f"{where}: unknown key {min(unknown)!r}")
        faults.append(Fault(kind=kind, rank=rank, round=round_, stage=stage, seconds=seconds))  # type: ignore[arg-type]
    return tuple(faults)


class Faults:
    """The faults of one rank, each of which happens once."""

    def __init__(self, faults: tuple[Fault, ...], run_dir: Path, rank: int) -> None:
        self._pending = {n: fault for n, fault in enumerate(faults) if fault.rank == rank}
        self._run_dir = run_dir

    def at(self, round: int, stage: str) -> None:
        """Let happen what is to happen here."""
        for fault in self._due(round, stage, but="nan"):
            _happen(fault, self._run_dir)

    def spoil(self, up: Mapping[str, Tensor], round: int) -> None:
        """Let the first client of an upload `[C, size]` send NaN, where that is to happen."""
        for _ in self._due(round, "train", only="nan"):
            next(iter(up.values()))[0].fill_(torch.nan)

    def _due(self, round: int, stage: str, *, only: str = "", but: str = "") -> list[Fault]:
        due = []
        for n, fault in list(self._pending.items()):
            mark = self._run_dir / f".fault-{n}"
            matches = (fault.round, fault.stage) == (round, stage) and fault.kind != but and only in ("", fault.kind)
            if matches and not mark.exists():
                del self._pending[n]
                mark.write_text(str(time.time()))  # when it happened, to compare with when it was noticed
                due.append(fault)
        return due


def from_environment(run_dir: Path) -> Faults | None:
    """The faults that the environment asks for on this rank; None, as a rule."""
    if not (text := os.environ.get(VARIABLE)):
        return None
    return Faults(parse(text), run_dir, int(os.environ.get("RANK", "0")))


def _happen(fault: Fault, run_dir: Path) -> None:
    if fault.kind in ("kill", "stop"):
        time.sleep(0.1)  # so that where this rank was has been told
    match fault.kind:
        case "raise":
            raise InjectedError(f"injected in '{fault.stage}' of round {fault.round}")
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            time.sleep(HANG_S)
        case "slow":
            time.sleep(fault.seconds)
        case "truncate" | "flip":
            damage(max((run_dir / "checkpoints").glob("round-[0-9]*")) / "server.safetensors", fault.kind)


def damage(path: Path, kind: Literal["truncate", "flip"]) -> None:
    """Take the last byte off a file, or flip a bit in its middle."""
    content = bytearray(path.read_bytes())
    if kind == "truncate":
        del content[-1]
    else:
        content[len(content) // 2] ^= 2
    path.write_bytes(content)
