"""The metrics file against strict JSON and kills, TensorBoard against its own reader, progress by a set clock."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedkernels import metrics
from fedkernels.formats import format_bytes, format_loss, format_rate, format_seconds
from fedkernels.metrics import MetricsWriter, Progress, environment, read_metrics


def strict_lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not strict JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def write_rows(run_dir: Path, rounds: range, scale: float = 1.0) -> None:
    writer = MetricsWriter(run_dir, tensorboard=False)
    for r in rounds:
        writer.write({"round": r, "train_loss": scale * r})
    writer.close()


def test_a_row_is_one_line_of_strict_json_as_soon_as_it_is_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "new" / "run", tensorboard=False)
    row = {
        "round": 1, "nan": math.nan, "inf": -math.inf, "tensor": torch.tensor(0.5), "vector": np.array([1.0, np.nan]),
        "nested": {"client": (1, math.nan)}, "none": None, "text": "a\nb",
    }  # fmt: skip
    plain = {
        "round": 1, "nan": None, "inf": None, "tensor": 0.5, "vector": [1.0, None],
        "nested": {"client": [1, None]}, "none": None, "text": "a\nb",
    }  # fmt: skip
    writer.write(row)
    assert strict_lines(writer.path) == [plain]
    writer.write({"round": 2})
    assert strict_lines(writer.path) == [plain, {"round": 2}] == read_metrics(writer.path.parent)
    writer.close()
    writer.close()


def test_a_kill_between_system_calls_never_splits_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    sizes: list[bytes] = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: sizes.append(bytes(data)) or real(fd, data))
    for r in (1, 2):
        writer.write({"round": r, "values": list(range(5000))})
    writer.close()
    assert [chunk.count(b"\n") for chunk in sizes] == [1, 1]
    assert b"".join(sizes) == (tmp_path / "metrics.jsonl").read_bytes()


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:5]))
    with pytest.raises(OSError, match=r"metrics\.jsonl: wrote 5 of 13 bytes of round 1"):
        writer.write({"round": 1})
    writer.close()
    assert read_metrics(tmp_path) == []


def test_a_torn_last_line_is_left_out_wherever_it_was_cut(tmp_path: Path) -> None:
    write_rows(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    rows = strict_lines(path)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert read_metrics(tmp_path) == rows[: whole[:cut].count(b"\n")]


@pytest.mark.parametrize(
    "damage", [b"{oops", b"[1]", b"3", b"null", b'{"train_loss": 1}', b'{"round": "2"}', b"\xff\xfe", b""]
)
@pytest.mark.parametrize("line", [1, 2, 3])
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes, line: int) -> None:
    write_rows(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[line - 1] = damage
    path.write_bytes(b"\n".join([*lines, b""]))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line {line}: not a metrics row"):
        read_metrics(tmp_path)


def test_a_folder_without_metrics(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(folder))} is not a run folder"):
            read_metrics(folder)
    (tmp_path / "config.yaml").write_text("rounds: 3\n")
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("kept", [0, 1, 3, 5, 9])
def test_a_resume_drops_later_rounds_and_a_torn_line(tmp_path: Path, kept: int) -> None:
    write_rows(tmp_path, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"round": 6, "train')
    writer = MetricsWriter(tmp_path, tensorboard=False)
    expected = [{"round": r, "train_loss": float(r)} for r in range(1, min(kept, 5) + 1)]
    assert writer.truncate_after(kept) == expected
    assert strict_lines(writer.path) == expected
    writer.write({"round": kept + 1, "train_loss": -1.0})
    writer.close()
    assert strict_lines(writer.path) == [*expected, {"round": kept + 1, "train_loss": -1.0}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_an_interrupted_truncation_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    write_rows(tmp_path, range(1, 6))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    writer = MetricsWriter(tmp_path, tensorboard=False)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, stage, fail)
    with pytest.raises(OSError, match="disk full"):
        writer.truncate_after(2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_tensorboard_shows_each_round_once_after_a_resume(tmp_path: Path) -> None:
    for attempt, (first, last) in enumerate([(1, 5), (3, 6)]):
        writer = MetricsWriter(tmp_path)
        if attempt:
            writer.truncate_after(first - 1)
        for r in range(first, last):
            writer.write({
                "round": r, "train_loss": 10.0 * attempt + r, "test_accuracy": None if r % 2 else r / 8,
                "nan": math.nan, "flag": True, "name": "x",
            })  # fmt: skip
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"train_loss", "test_accuracy"}
    loss, accuracy = ([(e.step, e.value) for e in events.Scalars(tag)] for tag in ("train_loss", "test_accuracy"))
    assert loss == [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 15.0)]
    assert accuracy == [(2, 0.25), (4, 0.5)]


def test_tensorboard_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    writer = MetricsWriter(tmp_path)
    writer.write({"round": 1, "train_loss": 1.0})
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(times_s: dict[int, float], total: int, first: int = 0, start_s: float = 100.0, **row: Any) -> list[str]:
    """The plain lines of a run whose rounds end at the given times."""
    file, clock = io.StringIO(), iter([start_s, *times_s.values()])
    with Progress(total, first_round=first, file=file, clock=clock.__next__) as progress:
        for r in times_s:
            progress.update({"round": r, "test_accuracy": 0.5} | row)
    return file.getvalue().splitlines()


def seconds(text: str) -> float:
    """`1:02:03` or `4.2 s` as seconds."""
    if text.endswith(" s"):
        return float(text[:-2])
    return sum(int(part) * 60**i for i, part in enumerate(reversed(text.split(":"))))


@pytest.mark.parametrize(("total", "first", "start_s"), [(9, 0, 0.0), (40, 0, 7e5), (12, 3, 50.0)])
def test_eta_is_the_mean_round_without_the_first_times_what_is_left(total: int, first: int, start_s: float) -> None:
    durations = [30.0, 2.0, 5.0, 4.0]
    ends = {first + i + 1: start_s + sum(durations[: i + 1]) for i in range(4)}
    lines = shown(ends, total, first, start_s)
    left = [total - r for r in ends]
    means = [30.0, 2.0, (2.0 + 5.0) / 2, (2.0 + 5.0 + 4.0) / 3]
    for line, mean, n in zip(lines, means, left, strict=True):
        assert seconds(line.split("ETA ")[1]) == pytest.approx(mean * n, abs=0.5 if mean * n >= 10 else 0.05)


def test_the_last_round_tells_how_long_it_took() -> None:
    lines = shown({1: 130.0, 2: 180.0}, total=2)
    assert "ETA 0:30" in lines[0]
    assert lines[1].endswith("took 1:20")


def test_plain_lines_are_aligned_and_say_what_the_row_says() -> None:
    row = {"train_loss": 1.23456, "clients_per_s": 8.25, "protocol_up_bytes": 2_500_000}
    assert shown({9: 101.0, 10: 102.0}, total=100, first=8, **row)[1].startswith(
        "round  10/100  loss  1.2346  acc  50.0%    8.2 clients/s  up   2.5 MB  ETA "
    )
    unknown = {"train_loss": math.nan, "test_accuracy": None, "clients_per_s": math.inf}
    assert "loss       -  acc      -      - clients/s  up        -  " in shown({1: 101.0}, total=9, **unknown)[0]


def test_plain_lines_are_thinned_between_evaluations() -> None:
    file, times_s = io.StringIO(), [0.5 * i for i in range(12)]
    with Progress(20, file=file, clock=iter(times_s).__next__) as progress:
        for r in range(1, 12):
            progress.update({"round": r, "test_accuracy": 0.1 if r == 3 else None})
        progress.note("a note")
    heads = re.findall(r"round +(\d+)/20|(a note)", file.getvalue())
    # The first at 0.5 s, the evaluated one at 1.5 s, then two seconds apart.
    assert [a or b for a, b in heads] == ["1", "3", "7", "11", "a note"]


def test_a_round_held_back_is_shown_when_the_run_stops() -> None:
    lines = shown({1: 100.1, 2: 100.2, 3: 100.3}, total=9, test_accuracy=None)
    assert [line.split("/")[0].split()[-1] for line in lines] == ["1", "3"]


def test_a_terminal_has_one_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    file = Terminal()
    with Progress(3, file=file, clock=iter([0.0, 1.0, 2.0, 3.0]).__next__) as progress:
        progress.note("[bold] 2 ranks")
        for r, accuracy in ((1, 0.25), (2, None), (3, 0.75)):
            progress.update({"round": r, "train_loss": 1.0, "test_accuracy": accuracy})
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    frames = [frame.strip() for frame in re.split(r"[\r\n]+", text) if frame.strip()]
    assert "[bold] 2 ranks" in frames
    assert re.fullmatch(r"round 2/3 .* acc  25\.0% .* ETA 1\.0 s", next(f for f in frames if "round 2/3" in f))
    assert re.fullmatch(r"round 3/3 .* acc  75\.0% .* took 3\.0 s", frames[-1])
    assert max(map(len, frames)) <= 100
    assert file.getvalue().count("\n") == 2  # the note, and the end
    assert file.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is back


@pytest.mark.parametrize("unit", [1.0, 60.0, 3600.0, 86400.0])
def test_durations_read_back_within_their_rounding(unit: float) -> None:
    for time_s in unit * np.random.default_rng(0).uniform(0.9, 60, 300):
        text = format_seconds(time_s)
        if " d " in text:
            days, clock = text.split(" d ")
            hours, minutes = map(int, clock.split(":"))
            assert 0 <= hours < 24
            assert 0 <= time_s - (int(days) * 86400 + hours * 3600 + minutes * 60) + 0.5 < 61
        else:
            assert seconds(text) == pytest.approx(time_s, abs=0.5 if ":" in text else 0.05)
            assert all(int(part) < 60 for part in text.split(":")[1:])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_bytes(0), "0 B"),
        (format_bytes(999), "999 B"),
        (format_bytes(1000), "1.0 kB"),
        (format_bytes(999_949), "999.9 kB"),
        (format_bytes(999_951), "1.0 MB"),
        (format_bytes(2.5e9), "2.5 GB"),
        (format_bytes(3.2e15), "3200.0 TB"),
        (format_seconds(9.96), "0:10"),
        (format_seconds(59.7), "1:00"),
        (format_seconds(3599.7), "1:00:00"),
        (format_seconds(86399.7), "1 d 00:00"),
        (format_rate(0.123), "0.12"),
        (format_rate(9.96), "10"),
        (format_rate(1234.4), "1234"),
        (format_loss(2.30258), "2.3026"),
        (format_loss(123456.0), "1.2e+05"),
    ],
)
def test_units_carry_over(text: str, expected: str) -> None:
    assert text == expected


def test_the_environment_names_the_revision_it_runs_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "fedkernels"
    package.mkdir()
    monkeypatch.setattr(metrics, "__file__", str(package / "metrics.py"))
    assert environment()["git_revision"] is None
    (package / "metrics.py").write_text("1\n")
    for arguments in (("init", "-q"), ("add", "."), ("commit", "-qm", "first")):
        git(*arguments)
    assert environment()["git_revision"] == git("rev-parse", "HEAD")
    (package / "metrics.py").write_text("2\n")
    assert environment()["git_revision"] == git("rev-parse", "HEAD") + "-dirty"
    facts = json.loads(json.dumps(environment()))
    assert facts["torch"] == torch.__version__
    assert facts["world_size"] == 1


def test_metrics_of_the_task_are_shown_beside_accuracy() -> None:
    score = shown({1: 101.0}, total=9, test_matthews=-0.0617, test_f1=None)[0]
    assert "acc  50.0%  mcc -0.062  f1      -      - clients/s" in score
    assert "acc  50.0%  ppl  173.2      - clients/s" in shown({1: 101.0}, total=9, test_perplexity=173.24)[0]
