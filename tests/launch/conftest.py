"""What the launch tests need of the machine, and runs in a temporary folder."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.small_runs import Runs
from launch.slurm import PROGRAMS, Cluster

ROOT = Path(__file__).parents[2]


def require(*programs: str) -> None:
    """Fail, rather than skip, where the machine lacks what a test of clusters needs."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        pytest.fail(
            f"needs root and {', '.join(missing) or 'nothing else'}; on Debian and Ubuntu: apt-get install slurm-wlm "
            "munge iproute2; without them: bash launch/test.sh --no-cluster, or pytest -m 'not cluster'",
            pytrace=False,
        )


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
