"""Operations between ranks that end when it is known that a rank will not come to them, and then name it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .watch import BEAT_S, LostRankError, Watch


class Guard:
    """Turns the errors of operations between ranks into `LostRankError`, and cuts their waits short.

    Args:
        watch: knows where every rank is; without one the backend's own errors and time-outs are left as they are.
    """

    def __init__(self, watch: Watch | None = None) -> None:
        self._watch = watch

    @contextmanager
    def named(self, *, by_all: bool = True) -> Iterator[None]:
        """What fails in a collective is some other rank's fault: say whose.

        Args:
            by_all: whether all ranks of the job enter as many of these, so that who has entered fewer is late.
        """
        if self._watch is not None and by_all:
            self._watch.enter()
        try:
            yield
        except LostRankError:
            raise
        except RuntimeError as error:
            if self._watch is None:
                raise
            raise self._watch.lost(error) from error

    def arrive(self, device: torch.device) -> None:
        """Meet all ranks on the host before an operation on a GPU, which nobody could be called back from."""
        if self._watch is not None and device.type == "cuda":
            here = torch.zeros(1)
            self.finish(dist.all_reduce(here, async_op=True), here.device)

    def finish(self, work: Any, device: torch.device) -> None:
        """Wait for an operation; on the host no longer than until it is known that a rank will not come to it."""
        while self._watch is not None and device.type == "cpu" and not work.is_completed():
            with suppress(RuntimeError):  # not yet; or failed, as the last wait then says
                work.wait(timedelta(seconds=BEAT_S))
            if self._watch.verdict is not None:
                raise LostRankError(self._watch.verdict, first=self._watch.first)
        work.wait()
