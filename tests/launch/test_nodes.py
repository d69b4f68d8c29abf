"""`launch/torchrun.sh` on two nodes with addresses of their own, one of them cut off in mid-run."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
from cli.small_runs import Runs
from launch.machine import ROOT, require
from launch.nodes import PROGRAMS, Nodes

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("nodes")]

TORCHRUN = ROOT / "launch" / "torchrun.sh"
TIMEOUT_S = 5
# Generous, for machines that do other things: noticing takes the time-out, starting again as long as importing torch.
NOTICED_S, AGAIN_S = TIMEOUT_S + 30, 60


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
    keys = ["--rounds", "1500", "--checkpoint_every", "20", "--eval_every", "50", "--timeout_s", str(TIMEOUT_S)]
    arguments = runs.arguments("cut", *keys)[1:]
    ranks = [nodes.start(node, TORCHRUN, *nodes.rendezvous(node), *arguments) for node in range(2)]
    runs.wait_for_rounds("cut", 40)
    nodes.cut(1)
    seen: list[str] = []
    assert ranks[0].stdout is not None
    lines_until(ranks[0].stdout, r"Timed out|exitcode", seen, NOTICED_S)
    lines_until(ranks[0].stdout, r"^resumed after round \d+ of", seen, AGAIN_S)
    lines_until(ranks[0].stdout, r"^1 rank on cpu", seen, AGAIN_S)
    nodes.join(1)
    lines_until(ranks[0].stdout, r"^2 ranks on cpu", seen, 2 * AGAIN_S)
    assert runs.train("whole", *keys) == 0
    for node, process in enumerate(ranks):
        assert process.wait(120) == 0, f"node {node}"
    runs.assert_same("whole", "cut", ranks=True)


def test_a_node_that_is_lost_for_good_leaves_the_run_to_the_other(nodes: Nodes, runs: Runs) -> None:
    keys = ["--rounds", "150", "--checkpoint_every", "20", "--timeout_s", str(TIMEOUT_S)]
    arguments = runs.arguments("lost", *keys)[1:]
    ranks = [nodes.start(node, TORCHRUN, *nodes.rendezvous(node), *arguments) for node in range(2)]
    runs.wait_for_rounds("lost", 40)
    nodes.cut(1)
    said, _ = ranks[0].communicate(timeout=NOTICED_S + AGAIN_S)
    assert ranks[0].returncode == 0, said
    assert re.search(r"\nresumed after round \d+ of 150\n1 rank on cpu", said)
    assert runs.train("whole", *keys) == 0
    runs.assert_same("whole", "lost", ranks=True)
