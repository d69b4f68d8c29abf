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
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist

METRICS_FILE = "metrics.jsonl"
ENVIRONMENT_FILE = "environment.json"


def format_bytes(n_bytes: float) -> str:
    """Bytes in decimal units.

    Example:
        >>> format_bytes(1_234_567)
        '1.2 MB'
    """
    if abs(n_bytes) < 999.5:
        return f"{n_bytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        n_bytes /= 1000
        if abs(n_bytes) < 999.95:
            return f"{n_bytes:.1f} {unit}"
    return f"{n_bytes / 1000:.1f} TB"


def format_seconds(time_s: float) -> str:
    """A duration as a clock shows it; tenths where a clock would show next to nothing.

    Example:
        >>> format_seconds(4.21), format_seconds(41), format_seconds(3723)
        ('4.2 s', '0:41', '1:02:03')
    """
    if time_s < 9.95:
        return f"{time_s:.1f} s"
    minutes, seconds = divmod(round(time_s), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_rate(per_s: float) -> str:
    """Two figures for slow rates, whole numbers for fast ones."""
    return f"{per_s:.0f}" if per_s >= 10 else f"{per_s:.2g}"


def format_loss(loss: float) -> str:
    """Four decimals, or powers of ten for a loss that has exploded; at most seven characters while positive."""
    return f"{loss:.4f}" if abs(loss) < 99.99995 else f"{loss:.2g}"


class MetricsWriter:
    """Appends one strict-JSON line per round to `metrics.jsonl`, and the same scalars to TensorBoard.

    The folder also gets `environment.json`. Only one rank of a job may own a writer. In a folder that holds an earlier
    attempt, call `truncate_after` before the first `write`.

    Args:
        run_dir: the run folder, made where it is missing.
        tensorboard: None writes TensorBoard events where the package is installed, True insists on it.

    Raises:
        ValueError: `tensorboard=True` without the package.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool | None) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._summary_writer = _summary_writer_class(tensorboard)
        self._summary: Any = None
        self._purge_step: int | None = None
        self._fd = self._open()
        (self.path.parent / ENVIRONMENT_FILE).write_text(json.dumps(environment(), indent=2) + "\n")

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append the row of one round; NaN and infinities become null, tensors and arrays plain numbers."""
        plain = _strict(row)
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
        ValueError: a line other than the last is not a JSON object with a round.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        if (path.parent / "config.yaml").is_file():
            return []
        raise FileNotFoundError(f"{run_dir} is not a run folder: it has neither {METRICS_FILE} nor config.yaml")
    rows = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, parse_constant=lambda _: None)
            if not isinstance(row["round"], int):
                raise ValueError(f"round {row['round']!r} is not an integer")
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not a metrics row, got {line[:80]!r}") from error
        rows.append(row)
    return rows


class Progress:
    """One live line with an ETA on a terminal, aligned plain lines elsewhere.

    Plain lines come for every evaluated round, otherwise at most one per two seconds, and for the last round.

    Args:
        total_rounds: the round the run ends with.
        first_round: rounds already done, on a resume.
        file: where to write; standard output when None.

    Example:
        >>> with Progress(100) as progress:
        ...     progress.update({"round": 1, "train_loss": 2.3, "test_accuracy": 0.1, "clients_per_s": 83})
        round   1/100  loss  2.3000  acc  10.0%     83 clients/s  up        -  ETA 0:11
    """

    def __init__(self, total_rounds: int, *, first_round: int = 0, file: TextIO | None = None) -> None:
        self.total_rounds = total_rounds
        self._file = file or sys.stdout
        self._started = (first_round, time.monotonic())
        self._first_update: tuple[int, float] | None = None
        self._shown_s = -math.inf
        self._accuracy: float | None = None
        self._pending: str | None = None
        self._bar: Any = None
        if self._file.isatty():
            self._bar = self._start_bar(first_round)

    def _start_bar(self, first_round: int) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[tail]}", markup=False))
        # No refresh thread: it would live on in forked data loaders, and a round is the finest news there is.
        bar = Bar(*columns, console=Console(file=self._file), auto_refresh=False, expand=True)
        bar.add_task(self._head(first_round), total=self.total_rounds, completed=first_round, tail="")
        bar.start()
        return bar

    def _head(self, round: int) -> str:
        return f"round {round:>{len(str(self.total_rounds))}}/{self.total_rounds}"

    def _eta_s(self, round: int, now_s: float) -> float:
        # The first round pays for compilation and warm-up, so it counts only while there is no other.
        since = self._first_update if self._first_update and self._first_update[0] < round else self._started
        return (now_s - since[1]) / max(1, round - since[0]) * max(0, self.total_rounds - round)

    def update(self, row: Mapping[str, Any]) -> None:
        """Show the row of one round."""
        round, now_s = row["round"], time.monotonic()
        evaluated = _finite(row.get("test_accuracy"))
        if evaluated is not None:
            self._accuracy = evaluated
        eta = f"ETA {format_seconds(self._eta_s(round, now_s))}"
        self._first_update = self._first_update or (round, now_s)
        loss, rate, up_bytes = (_finite(row.get(key)) for key in ("train_loss", "clients_per_s", "protocol_up_bytes"))
        shown_accuracy = evaluated if self._bar is None else self._accuracy
        numbers = (
            f"loss {'-' if loss is None else format_loss(loss):>7}  "
            f"acc {'-' if shown_accuracy is None else f'{shown_accuracy:.1%}':>6}  "
            f"{'-' if rate is None else format_rate(rate):>5} clients/s"
        )
        last = round >= self.total_rounds
        if self._bar is not None:
            self._bar.update(0, completed=round, description=self._head(round), tail=f"{numbers}  {eta}")
            if last or now_s - self._shown_s >= 0.1:
                self._bar.refresh()
                self._shown_s = now_s
            return
        up = "-" if up_bytes is None else format_bytes(up_bytes)
        self._pending = f"{self._head(round)}  {numbers}  up {up:>8}  {eta}"
        if last or evaluated is not None or now_s - self._shown_s >= 2:
            self._print_pending()
            self._shown_s = now_s

    def _print_pending(self) -> None:
        if self._pending is not None:
            print(self._pending, file=self._file, flush=True)
            self._pending = None

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
        self._print_pending()

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
        "git_revision": _git_revision(Path(__file__).resolve().parent.parent),
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


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _strict(value: Any) -> Any:
    """Plain JSON values, with null for what strict JSON cannot say."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def _summary_writer_class(tensorboard: bool | None) -> Any:
    if tensorboard is False:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        if tensorboard:
            raise ValueError("tensorboard: true, but the tensorboard package is not installed") from error
        return None
    return SummaryWriter


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision(root: Path) -> str | None:
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
