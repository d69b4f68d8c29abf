"""Operations between ranks that end when it is known that a rank will not come to them, and then name it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Literal

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
    def named(self, *, by: Literal["all", "group", "rank"] = "all") -> Iterator[None]:
        """What fails in a collective is some other rank's fault: say whose.

        Args:
            by: who enters as many of these, so that who has entered fewer is late: all ranks of the job, those of a
                client group, or each rank as many as it likes.
        """
        if by == "all" and self._watch is not None:
            self._watch.enter()
        elif by == "group":
            self.begin_group_step()
        try:
            yield
        except LostRankError:
            raise
        except RuntimeError as error:
            if self._watch is None:
                raise
            raise self._watch.lost(error) from error

    def begin_group_step(self) -> None:
        """Note that something begins that the ranks of a client group do together, and each as often."""
        if self._watch is not None:
            self._watch.enter_group_step()

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


def by_backend(error: BaseException | None) -> bool:
    """Whether an operation between ranks failed, rather than what this rank did by itself."""
    # What gloo raises is known by the path of its source alone.
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))
