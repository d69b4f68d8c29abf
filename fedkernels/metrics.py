"""What a run writes down and shows while it trains: metrics, TensorBoard, the progress line, the environment."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from .formats import (
    format_bytes,
    format_epsilon,
    format_loss,
    format_number,
    format_rate,
    format_score,
    format_seconds,
    format_share,
)

METRICS_FILE = "metrics.jsonl"
# What only some tasks are scored by, as the progress line names and shows it.
_METRICS: dict[str, tuple[str, Callable[[float], str]]] = {
    "test_matthews": ("mcc", format_score),
    "test_f1": ("f1", format_score),
    "test_perplexity": ("ppl", format_number),
}


class MetricsWriter:
    """Appends one strict-JSON line per round to `metrics.jsonl`, and the same scalars to TensorBoard.

    Only one rank of a job may own a writer. In a folder that holds an earlier attempt, call `truncate_after` before the
    first `write`.

    Args:
        run_dir: the run folder, made where it is missing.
        tensorboard: write TensorBoard events too, where the package is installed.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool = True) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._summary_writer = _summary_writer_class() if tensorboard else None
        self._summary: Any = None
        self._purge_step: int | None = None
        self._fd = self._open()

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append the row of one round; NaN and infinities become null, tensors and arrays plain numbers."""
        plain = strict(row)
        line = _line(plain)
        # One write of the whole line: a kill leaves at most a torn last line, which readers tolerate.
        if (written := os.write(self._fd, line)) != len(line):
            raise OSError(f"{self.path}: wrote {written} of {len(line)} bytes of round {plain['round']}")
        if self._summary_writer is None:
            return
        if self._summary is None:
            folder = str(self.path.parent / "tensorboard")
            self._summary = self._summary_writer(folder, purge_step=self._purge_step)
        for key, value in plain.items():
            if key != "round" and is_number(value):
                self._summary.add_scalar(key, value, plain["round"])

    def truncate_after(self, round: int) -> list[dict[str, Any]]:
        """Drop the rows of later rounds and a torn last line, for a resume from `round`; returns what is kept."""
        kept = [row for row in read_metrics(self.path.parent) if row["round"] <= round]
        partial = self.path.with_suffix(".jsonl.partial")
        with partial.open("wb") as file:
            file.writelines(_line(row) for row in kept)
            file.flush()
            os.fsync(file.fileno())
        os.close(self._fd)
        os.replace(partial, self.path)
        self._fd = self._open()
        self._close_summary()
        self._purge_step = round + 1
        return kept

    def _close_summary(self) -> None:
        if self._summary is not None:
            self._summary.close()
            self._summary = None

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._close_summary()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run, without a last line that a kill has torn.

    Raises:
        FileNotFoundError: the folder is not a run.
        ValueError: a line is not a JSON object with a round.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        if (path.parent / "config.yaml").is_file():
            return []
        raise FileNotFoundError(f"{run_dir} is not a run folder: it has neither {METRICS_FILE} nor config.yaml")
    # A row is whole once its newline is there.
    *lines, _torn = path.read_bytes().split(b"\n")
    return [_read_row(path, number, line) for number, line in enumerate(lines, start=1)]


def _read_row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=lambda _: None)
    except ValueError:
        row = None
    if isinstance(row, dict) and isinstance(row.get("round"), int):
        return row
    raise ValueError(f"{path}, line {number}: not a metrics row, got {line[:80]!r}")


class Progress:
    """One live line with an ETA on a terminal, aligned plain lines elsewhere.

    Plain lines come for every evaluated round, otherwise at most one per two seconds, and for the last round.

    Args:
        total_rounds: the round the run ends with.
        first_round: rounds already done, on a resume.
        file: where to write; standard output when None.
        clock: seconds from any origin.

    Example:
        >>> with Progress(100, clock=iter([0.0, 0.5]).__next__) as progress:
        ...     progress.update({"round": 1, "train_loss": 2.3, "test_accuracy": 0.1, "clients_per_s": 20})
        round   1/100  loss  2.3000  acc  10.0%     20 clients/s  up        -  ETA 0:50
    """

    def __init__(
        self,
        total_rounds: int,
        *,
        first_round: int = 0,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_rounds = total_rounds
        self._file = file or sys.stdout
        self._clock = clock
        self._started = (first_round, clock())
        self._first_update: tuple[int, float] | None = None
        self._shown_s = -math.inf
        self._evaluation = self._evaluated({})
        self._held_back: str | None = None
        self._bar = self._start_bar(first_round) if self._file.isatty() else None

    def _start_bar(self, first_round: int) -> Bar:
        columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[tail]}", markup=False))
        # No refresh thread: it would live on in forked data loaders, and a round is the finest news there is.
        bar = Bar(*columns, console=Console(file=self._file), auto_refresh=False, expand=True)
        bar.add_task(self._head(first_round), total=self.total_rounds, completed=first_round, tail="")
        bar.start()
        return bar

    def _head(self, round: int) -> str:
        return f"round {round:>{len(str(self.total_rounds))}}/{self.total_rounds}"

    def _remaining(self, round: int, now_s: float) -> str:
        if round >= self.total_rounds:
            return f"took {format_seconds(now_s - self._started[1])}"
        # The first round pays for compilation and warm-up, so it counts only while there is no other.
        since_round, since_s = self._first_update or self._started
        return f"ETA {format_seconds((now_s - since_s) / (round - since_round) * (self.total_rounds - round))}"

    def _evaluated(self, row: Mapping[str, Any]) -> str:
        """Accuracy, and the metrics that the task of the row has."""
        texts = [f"acc {_text(row.get('test_accuracy'), format_share):>6}"]
        texts += [f"{name} {_text(row[key], form):>6}" for key, (name, form) in _METRICS.items() if key in row]
        return "  ".join(texts)

    def update(self, row: Mapping[str, Any]) -> None:
        """Show the row of one round."""
        round, now_s = row["round"], self._clock()
        remaining = self._remaining(round, now_s)
        self._first_update = self._first_update or (round, now_s)
        evaluated = row.get("test_accuracy")
        # The live line keeps the newest evaluation in view, a plain line tells of its own round.
        if evaluated is not None or not self._bar:
            self._evaluation = self._evaluated(row)
        numbers = (
            f"loss {_text(row.get('train_loss'), format_loss):>7}  {self._evaluation}  "
            f"{_text(row.get('clients_per_s'), format_rate):>5} clients/s"
        )
        if "epsilon" in row:
            numbers += f"  ε {_text(row['epsilon'], format_epsilon):>5}"
        if row.get("late"):
            numbers += f"  late {row['late']}"
        last = round >= self.total_rounds
        if self._bar is not None:
            self._bar.update(TaskID(0), completed=round, description=self._head(round), tail=f"{numbers}  {remaining}")
            if last or now_s - self._shown_s >= 0.1:
                self._bar.refresh()
                self._shown_s = now_s
            return
        up = _text(row.get("protocol_up_bytes"), format_bytes)
        self._held_back = f"{self._head(round)}  {numbers}  up {up:>8}  {remaining}"
        if last or evaluated is not None or now_s - self._shown_s >= 2:
            self._print_held_back()
            self._shown_s = now_s

    def _print_held_back(self) -> None:
        if self._held_back is not None:
            print(self._held_back, file=self._file, flush=True)
            self._held_back = None

    def note(self, text: str) -> None:
        """Print a line of text above the live line."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        """Show the last round if it was held back, and leave the terminal as it was; a second call does nothing."""
        if self._bar is not None:
            self._bar.stop()
        self._print_held_back()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def environment() -> dict[str, Any]:
    """What a result may depend on besides its configuration; nothing that identifies the machine or its user."""
    distributed = dist.is_available() and dist.is_initialized()
    return {
        "fedkernels": _version("fedkernels"),
        "git_revision": git_revision(Path(__file__).resolve().parent.parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "world_size": dist.get_world_size() if distributed else 1,
        "backend": dist.get_backend() if distributed else None,
    }


def is_number(value: object) -> bool:
    """Whether a metric can be plotted: an int or float, not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: float | None, form: Callable[[float], str]) -> str:
    return form(value) if value is not None and math.isfinite(value) else "-"


def strict(value: Any) -> Any:
    """Plain JSON values, with null for what strict JSON cannot say."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def _summary_writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_revision(root: Path) -> str | None:
    """The revision of the checkout at `root`, marked where files differ from it; None outside a checkout."""
    # An installed package may lie inside the checkout of some other project, whose revision would mislead.
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())
