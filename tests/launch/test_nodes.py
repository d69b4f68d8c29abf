"""`launch/torchrun.sh` on two nodes with addresses of their own, one of them cut off in mid-run."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.small_runs import Runs
from launch.machine import ROOT, require
from launch.nodes import PROGRAMS, Nodes

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("nodes")]

TORCHRUN = ROOT / "launch" / "torchrun.sh"
TIMEOUT_S = 8
# Generous, for machines that do other things: noticing takes the time-out, starting again as long as importing torch.
NOTICED_S, AGAIN_S = TIMEOUT_S + 30, 60
KEYS = ["--rounds", "200", "--checkpoint_every", "20", "--timeout_s", str(TIMEOUT_S)]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    require(*PROGRAMS)
    with Nodes() as nodes:
        yield nodes


def lines_until(process_output: Iterator[str], pattern: str, seen: list[str], timeout_s: float) -> float:
    """Read a process's output up to a line that matches; the seconds that took."""
    start = time.monotonic()
    for line in process_output:
        seen.append(line)
        if re.search(pattern, line):
            took = time.monotonic() - start
            assert took < timeout_s, f"{pattern!r} took {took:.1f} s"
            return took
    raise AssertionError(f"no {pattern!r} in\n{''.join(seen)}")


def test_a_node_is_cut_off_and_comes_back(nodes: Nodes, runs: Runs) -> None:
    arguments = runs.arguments("cut", *KEYS)[1:]
    ranks = [nodes.start(node, TORCHRUN, *nodes.rendezvous(node), *arguments) for node in range(2)]
    runs.wait_for_rounds("cut", 40)
    nodes.cut(1)
    seen: list[str] = []
    assert ranks[0].stdout is not None
    lines_until(ranks[0].stdout, r"failed \(exitcode: ", seen, NOTICED_S)
    lines_until(ranks[0].stdout, r"^1 rank on cpu", seen, AGAIN_S)
    # The rank that is left must not come to its end before the other is back.
    alone = int(Path(f"/proc/{ranks[0].pid}/task/{ranks[0].pid}/children").read_text())
    os.kill(alone, signal.SIGSTOP)
    nodes.join(1)
    lines_until(ranks[0].stdout, "Detected 1 new nodes", seen, AGAIN_S)
    os.kill(alone, signal.SIGCONT)
    lines_until(ranks[0].stdout, r"^resumed after round \d+ of 200", seen, AGAIN_S)
    lines_until(ranks[0].stdout, r"^2 ranks on cpu", seen, AGAIN_S)
    assert runs.train("whole", *KEYS) == 0
    for process in ranks:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    runs.assert_same("whole", "cut", ranks=True)


def test_a_node_that_is_lost_for_good_leaves_the_run_to_the_other(nodes: Nodes, runs: Runs) -> None:
    arguments = runs.arguments("lost", *KEYS)[1:]
    ranks = [nodes.start(node, TORCHRUN, *nodes.rendezvous(node), *arguments) for node in range(2)]
    runs.wait_for_rounds("lost", 40)
    nodes.cut(1)
    said, _ = ranks[0].communicate(timeout=NOTICED_S + AGAIN_S)
    assert ranks[0].returncode == 0, said
    assert re.search(r"\nresumed after round \d+ of 200\n1 rank on cpu", said)
    assert runs.train("whole", *KEYS) == 0
    runs.assert_same("whole", "lost", ranks=True)
