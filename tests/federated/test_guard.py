"""Waits for operations between ranks, with operations that are made up."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch

from fedkernels.federated.guard import Guard
from fedkernels.federated.watch import LostRankError

CPU = torch.device("cpu")


class FakeWatch:
    """Knows of no loss, or of one."""

    def __init__(self, verdict: str | None = None) -> None:
        self.verdict, self.first = verdict, False

    def enter(self) -> None:
        pass

    def lost(self, error: BaseException) -> LostRankError:
        return LostRankError(f"lost by {error}")


class FakeWork:
    """Runs into its first time-outs, and completes right after the last of them, well or not."""

    def __init__(self, timeouts: int, failure: str | None = None) -> None:
        self._timeouts, self._failure = timeouts, failure

    def is_completed(self) -> bool:
        return self._timeouts == 0

    def wait(self, timeout: timedelta | None = None) -> None:
        if self._timeouts:
            assert timeout is not None, "a wait that nothing ends"
            self._timeouts -= 1
            raise RuntimeError("timed out")
        if self._failure:
            raise RuntimeError(self._failure)


def finish(work: Any, verdict: str | None = None) -> None:
    guard = Guard(FakeWatch(verdict))  # type: ignore[arg-type]
    with guard.named():
        guard.finish(work, CPU)


@pytest.mark.parametrize("timeouts", [0, 1, 3])
def test_what_completes_while_its_wait_gives_up_is_no_loss(timeouts: int) -> None:
    finish(FakeWork(timeouts))


def test_a_failure_is_named() -> None:
    with pytest.raises(LostRankError, match="lost by connection reset"):
        finish(FakeWork(2, "connection reset"))


def test_a_verdict_ends_the_wait() -> None:
    with pytest.raises(LostRankError, match="rank 1 died"):
        finish(FakeWork(1000), "rank 1 died")


def test_without_a_watch_the_error_is_the_backend_s_own() -> None:
    with pytest.raises(RuntimeError, match="connection reset"), Guard().named():
        Guard().finish(FakeWork(0, "connection reset"), CPU)
