"""SIGTERM, SIGINT and SIGUSR1: stop at a round boundary on all ranks, with a checkpoint, ready to resume."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.small_runs import Runs
from support import on_ranks

from fedkernels.config import load
from fedkernels.federated.collectives import Collectives
from fedkernels.federated.engine import Engine
from fedkernels.train import train

pytestmark = pytest.mark.usefixtures("no_report")

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
# Longer than any test waits, and without a checkpoint of its own.
NO_EVALUATION = ["--eval_every", "100000"]
ENDLESS = ["--rounds", "100000", "--checkpoint_every", "100000", *NO_EVALUATION]


def call_before(patch: pytest.MonkeyPatch, name: str, r: int, action: Callable[[], object]) -> None:
    """Do something when an engine that has finished `r` rounds comes to its function `name`."""
    original = getattr(Engine, name)

    def call(engine: Engine, *arguments: object) -> object:
        if engine.round == r:
            action()
        return original(engine, *arguments)

    patch.setattr(Engine, name, call)


def stopped_after(runs: Runs, name: str) -> int:
    """The round of the only checkpoint, which must be that of the last row."""
    last = runs.rows(name)[-1]["round"]
    assert runs.checkpoints(name) == [f"round-{last:06d}"]
    return int(last)


def assert_resumes(runs: Runs, name: str, *keys: str, ranks: bool = False) -> None:
    """The stopped run and two more rounds equal an uninterrupted run."""
    keys = (*keys, "--rounds", str(stopped_after(runs, name) + 2))
    assert runs.train(name, *keys, "--resume") == 0
    assert runs.train("whole", *keys) == 0
    runs.assert_same("whole", name, ranks=ranks)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_from_outside_stops_at_a_round_boundary(runs: Runs, number: signal.Signals) -> None:
    (process,) = runs.start("stopped", *ENDLESS)
    runs.wait_for_rounds("stopped", 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err == ""
    last = stopped_after(runs, "stopped")
    assert f"stopped by {number.name} after round {last}; continue with --resume\n" in out
    assert_resumes(runs, "stopped", *NO_EVALUATION)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_between_rounds_stops_after_the_next_one(runs: Runs, number: signal.Signals) -> None:
    keys = ["--schedule", "cosine", "--checkpoint_every", "100"]
    with pytest.MonkeyPatch.context() as patch:
        call_before(patch, "evaluate", 1, lambda: signal.raise_signal(number))
        assert runs.train("stopped", *keys) == 128 + number
    assert stopped_after(runs, "stopped") == 2
    assert runs.train("stopped", *keys, "--resume") == 0
    assert runs.train("whole", *keys) == 0
    runs.assert_same("whole", "stopped")


def test_a_signal_while_the_server_updates_is_not_lost(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    call_before(monkeypatch, "_update_server", 0, lambda: signal.raise_signal(signal.SIGTERM))
    assert runs.train("stopped", *ENDLESS) == 128 + signal.SIGTERM
    assert stopped_after(runs, "stopped") <= 2


def test_a_signal_in_the_last_round_lets_the_run_finish(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    call_before(monkeypatch, "evaluate", 3, lambda: signal.raise_signal(signal.SIGTERM))
    assert runs.train("done") == 0
    assert [row["round"] for row in runs.rows("done")] == [1, 2, 3, 4]


def test_a_second_interrupt_leaves_at_once(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    call_before(monkeypatch, "run_round", 3, twice)
    assert runs.train("left") == 130
    assert [row["round"] for row in runs.rows("left")] == [1, 2, 3]


def test_handlers_are_put_back(runs: Runs) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    assert runs.train("a", "--rounds", "1") == 0
    assert [signal.getsignal(number) for number in SIGNALS] == before


def _signal_on_rank_1(collectives: Collectives, config: Path, run_dir: Path) -> tuple[int, int | None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedkernels.report.write_report", lambda run_dirs, out: out)
        if collectives.rank == 1:
            call_before(patch, "evaluate", 1, lambda: signal.raise_signal(signal.SIGUSR1))
        outcome = train(load(config, {"run_dir": str(run_dir)}))
    return outcome.rounds, outcome.stopped_by


def test_all_ranks_stop_after_the_same_round_for_the_same_signal(runs: Runs) -> None:
    outcomes = on_ranks(2, _signal_on_rank_1, runs.config, runs / "stopped")
    assert outcomes == [(2, signal.SIGUSR1)] * 2
    assert_resumes(runs, "stopped", ranks=True)


def test_sigterm_to_one_rank_under_torchrun(runs: Runs) -> None:
    launcher = runs.start_torchrun("stopped", *ENDLESS)
    runs.wait_for_rounds("stopped", 2)
    ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGTERM)
    out, err = launcher.communicate(timeout=60)
    assert out.count("stopped by SIGTERM after round ") == 1
    assert (runs / "stopped" / "report.html").exists()
    assert f"exitcode  : {128 + signal.SIGTERM} " in err
    assert "fedkernels/" not in err
    assert_resumes(runs, "stopped", *NO_EVALUATION, ranks=True)
