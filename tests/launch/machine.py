"""What launch tests need of the machine they run on."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def require(*programs: str) -> None:
    """Fail, rather than skip, where the machine lacks what a test of clusters needs."""
    missing = [program for program in programs if shutil.which(program) is None]
    if os.geteuid() != 0:
        missing.append("root")
    if missing:
        pytest.fail(
            f"needs {', '.join(missing)}; on Debian and Ubuntu: apt-get install slurm-wlm munge iproute2; without "
            "clusters: bash launch/test.sh --no-cluster, or pytest -m 'not cluster'",
            pytrace=False,
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
