"""Where every rank is, told through the store of the job, so that one that dies or hangs is named by the others.

A thread writes this rank's place soon after it changes and once a second, and reads the next rank's and the verdict:
why the job cannot go on, which whoever knows it first writes down for all. None of it is a collective, and the thread
that trains waits for none of it; a job of W ranks costs its store 2W small messages a second, and up to 50 W where
rounds are short. Signs of life are counted by who reads them, so no two clocks are compared.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

BEAT_S = 1.0  # between two signs of life
PAUSE_S = 0.02  # at least, between two messages: short rounds change their place more often
SILENT_S = 30.0  # without one a rank, or the store, counts as lost
CONFIRM_S = 4.0  # the same after a connection broke, when it is known that some rank is lost
GRACE_S = 10.0  # a rank that has not ended so long after the verdict is ended
VERDICT = "verdict"


class LostRankError(RuntimeError):
    """Other ranks failed, died, or did not come to a collective in time.

    Attributes:
        first: whether this rank was the first to say so.
    """

    def __init__(self, why: str, *, first: bool = True) -> None:
        super().__init__(why)
        self.first = first


@dataclass(frozen=True)
class Place:
    """Where a rank is: in a stage of a round, after it has entered so many collectives.

    Args:
        group_steps: what it has begun together with its client group, in and between collectives of all.
        beat: grows with every sign of life.
        over: whether it knows that the job cannot go on.
    """

    host: str
    round: int = 0
    stage: str = "start"
    collectives: int = 0
    group_steps: int = 0
    beat: int = 0
    over: bool = False

    def __str__(self) -> str:
        return f"'{self.stage}'" + (f" of round {self.round}" if self.round else "")

    @property
    def progress(self) -> tuple[int, int]:
        """How far it has come, in the order that all ranks of its client group share."""
        return self.collectives, self.group_steps


class Watch:
    """This rank's entry in the table of places, and what the table says of the others.

    Args:
        store: a client of the job's store of its own; nothing here blocks who trains when the store does not answer.
        timeout_s: longest that ranks wait for each other at the start.
        agent: whether torchrun's agent holds the store, rather than the first rank.
        group_size: consecutive ranks that form a client group.

    Attributes:
        verdict: why the job cannot go on, the same words on every rank; None while it can.
        first: whether this rank was the first to say so.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout_s: float,
        *,
        agent: bool = False,
        group_size: int = 1,
    ) -> None:
        self.rank, self.world_size, self.timeout_s, self.group_size = rank, world_size, timeout_s, group_size
        self.verdict: str | None = None
        self.first = False
        self._store, self._agent = store, agent
        self._place = Place(socket.gethostname())
        self._beats = 0
        self._entered_at = time.monotonic()
        self._table: dict[int, Place] = {}
        self._seen: dict[int, float] = {}  # when, on this rank's clock, the last sign of life of each was first seen
        self._everyone = False  # whether all places are asked for, rather than the next rank's
        self._claim: str | None = None
        self._changed, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._live, name="watch", daemon=True)
        store.set_timeout(timedelta(seconds=CONFIRM_S))

    def start(self) -> None:
        """Wait until every rank has come this far, then give signs of life.

        Raises:
            LostRankError: some did not within the time-out.
        """
        if self.rank == 0:
            self._store.set(VERDICT, "")
        self._tell()
        deadline = time.monotonic() + self.timeout_s
        while absent := [r for r in range(self.world_size) if not self._store.check([str(r), VERDICT])]:
            if self._store.check([VERDICT]) and (told := self._store.get(VERDICT).decode()):
                raise LostRankError(told.partition(" ")[2], first=False)
            if time.monotonic() > deadline:
                why = f"{say_ranks(absent)} did not start within {self.timeout_s:g} s"
                self._claim_verdict(why)
                time.sleep(BEAT_S)  # for the others to read it, should the store end with this process
                raise LostRankError(self.verdict or why, first=self.first)
            time.sleep(0.05)
        self._thread.start()

    def leave(self, error: BaseException | None) -> None:
        """Give no more signs of life; with an error that others do not know of, tell them first."""
        if error is not None:
            if not isinstance(error, LostRankError):
                text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
                self._give_up(f"rank {self.rank} (host {self._place.host}) failed in {self._place}: {text}")
            if self.rank == 0 and not self._agent:  # and they can read why only as long as it is there
                self._everyone = True
                self._wait_until(self._all_know, BEAT_S + CONFIRM_S)
        self._closed.set()
        self._changed.set()
        self._thread.join(BEAT_S)

    def at(self, round: int, stage: str) -> None:
        """Note that this rank comes to a stage."""
        self._place = replace(self._place, round=round, stage=stage)
        self._changed.set()

    def enter(self) -> None:
        """Note that this rank enters a collective of all."""
        self._entered_at = time.monotonic()
        self._place = replace(self._place, collectives=self._place.collectives + 1)
        self._changed.set()

    def enter_group_step(self) -> None:
        """Note that this rank begins what its client group does together."""
        self._entered_at = time.monotonic()
        # There are several in every local step: the next sign of life tells.
        self._place = replace(self._place, group_steps=self._place.group_steps + 1)

    def lost(self, error: BaseException) -> LostRankError:
        """What to raise for a collective that failed here: the verdict, or else the ranks that are silent, or are late.

        Takes `CONFIRM_S` where nobody has said anything yet.
        """
        mine, waited_s = self._place, time.monotonic() - self._entered_at
        self._everyone = True
        self._changed.set()
        self._wait_until(lambda: self.verdict is not None, BEAT_S + CONFIRM_S)
        if self.verdict is None:
            if silent := self._silent(self._table, CONFIRM_S):
                self._give_up(f"{say_ranks(silent)} died or cannot be reached: {self._whereabouts(silent)}")
            elif late := self._late(range(self.world_size), (mine.collectives, 0)):
                where = self._whereabouts(late)
                self._give_up(f"{say_ranks(late)} did not reach {mine} within {waited_s:.0f} s: {where}")
            elif late := self._late(self._group_of(self.rank), mine.progress):
                what = f"did not join the others of the client group in {mine} within {waited_s:.0f} s"
                self._give_up(f"{say_ranks(late)} {what}: {self._whereabouts(late)}")
            else:
                text = " ".join(str(error).split())
                self._give_up(f"a collective failed on rank {self.rank} (host {mine.host}) in {mine}: {text}")
        assert self.verdict is not None
        return LostRankError(self.verdict, first=self.first)

    def _give_up(self, why: str) -> None:
        """Tell all ranks why the job cannot go on, unless one has already told a reason."""
        self._claim = why
        self._changed.set()
        self._wait_until(lambda: self.verdict is not None, CONFIRM_S)
        if self.verdict is None:
            self.verdict, self.first = why, True

    def _wait_until(self, condition: Callable[[], bool], limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while not condition() and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)

    def _all_know(self) -> bool:
        unaware = [rank for rank, place in self._table.items() if not place.over and rank != self.rank]
        return len(self._table) == self.world_size and unaware == self._silent(unaware, CONFIRM_S)

    def _silent(self, ranks: Iterable[int], limit_s: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank in ranks if rank != self.rank and now - self._seen.get(rank, now) >= limit_s]

    def _late(self, ranks: Iterable[int], progress: tuple[int, int]) -> list[int]:
        """Who has not come so far, and least far of all: others, too, may wait for them."""
        come = {rank: place.progress for rank, place in self._table.items()}
        least = {rank: min(come[other] for other in self._group_of(rank) if other in come) for rank in come}
        late = [rank for rank in ranks if rank in come and come[rank] < progress and come[rank] == least[rank]]
        # Groups train on their own: between them collectives count alone.
        fewest = min((come[rank][0] for rank in late), default=0)
        return [rank for rank in late if come[rank][0] == fewest]

    def _group_of(self, rank: int) -> range:
        first = rank - rank % self.group_size
        return range(first, first + self.group_size)

    def _whereabouts(self, ranks: Sequence[int]) -> str:
        found = ((rank, self._table[rank]) for rank in ranks)
        return "; ".join(f"rank {rank} (host {place.host}) was last seen in {place}" for rank, place in found)

    # From here on only the thread, once it has started, which alone uses the store.

    def _live(self) -> None:
        looked = answered = time.monotonic()
        over_since, gone = None, False
        while not self._closed.wait(PAUSE_S):
            self._changed.wait(BEAT_S / 4 if self._everyone else BEAT_S)
            self._changed.clear()
            now = time.monotonic()
            try:
                if not gone:
                    self._tell()
                    if now - looked >= BEAT_S or self._everyone:
                        self._look()
                        looked = now
                    if self._claim is not None and self.verdict is None:
                        self._claim_verdict(self._claim)
                    answered = now
            except RuntimeError as error:
                gone = isinstance(error, dist.DistNetworkError)
            if self.verdict is None and (gone or now - answered >= SILENT_S):
                self.verdict = self._claim or self._without_store()
                self.first = True
            over_since = now if over_since is None and self.verdict is not None else over_since
            if over_since is not None and now - over_since >= GRACE_S and not self._closed.is_set():
                line = f"rank {self.rank} hangs in {self._place} and ends, since the job was given up: {self.verdict}"
                print(f"fedkernels: error: {line}", file=sys.stderr, flush=True)
                os._exit(1)

    def _tell(self) -> None:
        self._beats += 1
        place = replace(self._place, beat=self._beats, over=self.verdict is not None)
        self._store.set(str(self.rank), json.dumps(asdict(place)))

    def _claim_verdict(self, why: str) -> None:
        by, self.verdict = self._store.compare_set(VERDICT, "", f"{self.rank} {why}").decode().split(" ", 1)
        self.first = by == str(self.rank)

    def _look(self) -> None:
        following = (self.rank + 1) % self.world_size
        # A ring is enough: of several that are silent, one follows a rank that is not, and that one asks for all.
        everyone = self._everyone or self._silent([following], SILENT_S / 2)
        ranks = range(self.world_size) if everyone else [following]
        verdict, *places = self._store.multi_get([VERDICT, *map(str, ranks)])
        self.verdict = self.verdict or verdict.decode().partition(" ")[2] or None
        now = time.monotonic()
        for rank, text in zip(ranks, places, strict=True):
            place = Place(**json.loads(text))
            if rank not in self._table or place.beat != self._table[rank].beat:
                self._seen[rank] = now
            self._table[rank] = place
        if self.verdict is None and self._silent([following], SILENT_S):
            silent = self._silent(self._table, CONFIRM_S)
            self._claim = f"{say_ranks(silent)} died or cannot be reached: {self._whereabouts(silent)}"

    def _without_store(self) -> str:
        holder = "torchrun's agent on the first node" if self._agent else "rank 0"
        here = f"rank {self.rank} (host {self._place.host}) was in {self._place}"
        return f"{holder}, which held the store of the job, died or cannot be reached: {here}"


def say_ranks(ranks: Sequence[Any]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
