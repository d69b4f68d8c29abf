"""Work that goes on behind the back of who trains: one thread, jobs in order, at most one of them unfinished."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Literal, Self, TypeVar

import torch

T = TypeVar("T")
Overlap = Literal["auto", "always", "never"]


def spare_core(threads: int) -> bool:
    """Whether this node has more cores than its ranks have threads, as launchers tell how many ranks there are."""
    # torchrun's, DeepSpeed's; where ranks were started by hand, all may be here.
    told = (os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"))
    ranks = int(next((count for count in told if count), "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores > threads * ranks


class Behind(Generic[T]):
    """Runs jobs one after another while its caller goes on; a caller that is two jobs ahead waits.

    Their order is that of the calls, so what they add up has the bits of a plain loop. On a GPU they launch on the
    caller's stream: what is hidden there is the waiting of the host.

    Args:
        on: run them on a thread; otherwise at once, in the call.

    Example:
        >>> with Behind[int](torch.device("cpu"), on=True) as behind:
        ...     for n in range(3):
        ...         behind(lambda n=n: n * n)
        >>> behind.results
        [0, 1, 4]
    """

    def __init__(self, device: torch.device, *, on: bool) -> None:
        self.results: list[T] = []
        self._device = device
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, "behind", self._begin, (torch.get_num_threads(),)) if on else None
        self._last: Future[T] | None = None

    def _begin(self, threads: int) -> None:
        # All three belong to a thread.
        torch.set_num_threads(threads)
        if self._stream is not None:
            torch.cuda.set_device(self._device)
            torch.cuda.set_stream(self._stream)

    def __call__(self, job: Callable[[], T]) -> None:
        """Begin a job once the one before it is done, whose error is raised here."""
        if self._pool is None:
            self.results.append(job())
            return
        self._finish()
        self._last = self._pool.submit(job)

    def _finish(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            self.results.append(last.result())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the last job; its error is raised unless another is on its way."""
        try:
            if error is None:
                self._finish()
        finally:
            if self._pool is not None:
                self._pool.shutdown()
