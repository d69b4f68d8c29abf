"""Runs in a temporary folder, and the one line that a command that fails must print."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli.small_runs import Runs


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    runs = Runs(tmp_path)
    yield runs
    runs.end()


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawing of the report, which takes longer than these runs."""
    monkeypatch.setattr("fedkernels.report.write_report", lambda run_dirs, out: out)


@pytest.fixture
def error_line(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What the one line on standard error says."""

    def read() -> str:
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("fedkernels: error: ")
        return lines[0].removeprefix("fedkernels: error: ")

    return read
