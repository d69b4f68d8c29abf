"""Where every rank is, told through the store of the job, so that one that dies or hangs is named by the others.

A rank writes its place, `(round, stage, collectives entered)`, when it changes and once a second from a thread of its
own, which also looks at the next rank's. None of it is a collective: a write waits for no answer, and a job of W ranks
costs its store 2W small messages a second. Beats are counted by who reads them, so no two clocks are compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

# Between two signs of life; without any for as long as SILENT_S a rank counts as dead, or after a connection broke, when
# somebody is, CONFIRM_S. One that hangs is ended GRACE_S after the others have given up.
BEAT_S, SILENT_S, CONFIRM_S, GRACE_S = 1.0, 30.0, 5.0, 10.0
VERDICT = "verdict"


class LostRankError(RuntimeError):
    """Other ranks failed, died, or did not come to a collective in time."""


@dataclass(frozen=True)
class Place:
    """Where a rank is: in a stage of a round, after it has entered so many collectives."""

    host: str
    round: int = 0
    stage: str = "start"
    collectives: int = 0
    beat: int = 0

    def __str__(self) -> str:
        return f"'{self.stage}'" + (f" of round {self.round}" if self.round else "")


class Watch:
    """This rank's entry in the table of places, and what the table says of the others.

    Args:
        store: a client of the job's store that nothing else waits on.
        timeout_s: longest a collective takes, for messages.

    Attributes:
        place: where this rank is.
        verdict: why the job cannot go on, the same words on every rank; None while it can.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_s: float) -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.place = Place(socket.gethostname())
        self.verdict: str | None = None
        self._store = store
        self._lock = threading.Lock()
        self._closed = threading.Event()
        # Since when, on this rank's clock, each rank stands at its last beat that was seen.
        self._seen: dict[int, tuple[int, float]] = {}
        self._reached = time.monotonic()
        store.set_timeout(timedelta(seconds=CONFIRM_S))
        if rank == 0:  # a restart with other ranks finds the store of the attempt before
            store.delete_key(VERDICT)
        self._post({})

    def wait_for_all(self) -> None:
        """Return when every rank has started.

        Raises:
            LostRankError: some did not within the time-out.
        """
        deadline = time.monotonic() + self.timeout_s
        while absent := [rank for rank in range(self.world_size) if not self._store.check([str(rank)])]:
            if time.monotonic() > deadline:
                raise LostRankError(f"{_ranks(absent)} did not start within {self.timeout_s:g} s")
            time.sleep(0.05)

    def start(self) -> None:
        """Begin to give signs of life."""
        threading.Thread(target=self._beat, name="watch", daemon=True).start()

    def close(self) -> None:
        """Give no more signs of life; a second call does nothing."""
        self._closed.set()

    def at(self, round: int, stage: str) -> None:
        """Note that this rank comes to a stage."""
        self._post({"round": round, "stage": stage})

    def enter(self) -> None:
        """Note that this rank enters a collective."""
        self._reached = time.monotonic()
        self._post({"collectives": self.place.collectives + 1})

    def give_up(self, why: str) -> str:
        """Tell all ranks why the job cannot go on; the reason that was told first counts, and is returned."""
        try:
            told = self._store.compare_set(VERDICT, "", why).decode()
        except RuntimeError:  # the store has gone with the rank that held it
            told = why
        self.verdict = self.verdict or told
        return self.verdict

    def failed(self, error: BaseException) -> None:
        """Tell all ranks that this one fails, and with what."""
        text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        self.give_up(f"rank {self.rank} (host {self.place.host}) failed in {self.place}: {text}")

    def diagnose(self, error: BaseException) -> str:
        """Why a collective failed here: a verdict of others, else the ranks that are silent, else those that are late.

        Takes `CONFIRM_S` where nobody has said anything yet.
        """
        mine, now = self.place, time.monotonic()
        waited_s = now - self._reached
        places: dict[int, Place] = {}
        while self.verdict is None and time.monotonic() < now + CONFIRM_S + BEAT_S:
            places = self._look(range(self.world_size))
            time.sleep(BEAT_S / 4)
        if self.verdict is not None:
            return self.verdict
        if not places:
            return self.give_up(f"the store of the job is gone, and with it the rank or agent that held it ({error})")
        if silent := self._silent(places, CONFIRM_S):
            return self.give_up(_dead(silent, places))
        if late := [rank for rank, place in places.items() if place.collectives < mine.collectives]:
            seen = "; ".join(f"rank {rank} (host {places[rank].host}) was last seen in {places[rank]}" for rank in late)
            return self.give_up(f"{_ranks(late)} did not reach {mine} within {waited_s:.0f} s: {seen}")
        return self.give_up(f"a collective failed on rank {self.rank} (host {mine.host}) in {mine}: {error}")

    def _post(self, changes: Mapping[str, Any]) -> None:
        with self._lock:
            self.place = replace(self.place, **changes)
            # Where the store does not answer, the beat and the next collective find out.
            with contextlib.suppress(RuntimeError):
                self._store.set(str(self.rank), json.dumps(asdict(self.place)))

    def _places(self, ranks: Sequence[int]) -> dict[int, Place]:
        """The table's entries of some ranks; nothing where the store does not answer."""
        try:
            found = self._store.multi_get([str(rank) for rank in ranks])
        except RuntimeError:
            return {}
        return {rank: Place(**json.loads(text)) for rank, text in zip(ranks, found, strict=True)}

    def _look(self, ranks: Sequence[int]) -> dict[int, Place]:
        """Read the verdict, and of some ranks whether they have given a sign of life."""
        try:
            if self.verdict is None and self._store.check([VERDICT]):
                self.verdict = self._store.get(VERDICT).decode()
        except RuntimeError:
            return {}
        places = self._places(ranks)
        now = time.monotonic()
        for rank, place in places.items():
            if self._seen.get(rank, (-1, 0.0))[0] != place.beat:
                self._seen[rank] = place.beat, now
        return places

    def _silent(self, ranks: Iterable[int], limit_s: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank in ranks if rank != self.rank and now - self._seen.get(rank, (0, now))[1] >= limit_s]

    def _beat(self) -> None:
        following = (self.rank + 1) % self.world_size
        answered, given_up = time.monotonic(), None
        while not self._closed.wait(BEAT_S):
            self._post({"beat": self.place.beat + 1})
            # A ring is enough: of several that are silent, one follows a rank that is not, and that one asks for all.
            suspicious = self._silent([following], SILENT_S / 2)
            places = self._look(range(self.world_size) if suspicious else [following])
            now = time.monotonic()
            answered = now if places else answered
            if now - answered >= SILENT_S:
                self.verdict = self.verdict or f"the store of the job did not answer for {SILENT_S:g} s"
            if self.verdict is None and self._silent([following], SILENT_S):
                self.give_up(_dead(self._silent(places, CONFIRM_S), places))
            if self.verdict is not None:
                given_up = given_up or now
                if now - given_up >= GRACE_S and not self._closed.is_set():
                    line = f"rank {self.rank} hangs in {self.place} and ends, since the job was given up: {self.verdict}"
                    print(f"fedkernels: error: {line}", file=sys.stderr, flush=True)
                    os._exit(1)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _dead(ranks: Sequence[int], places: Mapping[int, Place]) -> str:
    where = "; ".join(f"rank {rank} (host {places[rank].host}) was last seen in {places[rank]}" for rank in ranks)
    return f"{_ranks(ranks)} died or cannot be reached: {where}"
