"""Runs in a temporary folder, and a SLURM cluster to submit them to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.small_runs import Runs
from launch.machine import require
from launch.slurm import PROGRAMS, Cluster


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    # Launch scripts take the environment that runs the tests, and find the package beside them.
    monkeypatch.setenv("VENV", sys.prefix)
    monkeypatch.delenv("FEDKERNELS_LAUNCHER", raising=False)
    runs = Runs(tmp_path)
    yield runs
    runs.end()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require(*PROGRAMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VENV", sys.prefix)
        with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
            yield cluster
