"""When a round closes while clients still train: once enough have reported, or at its deadline."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from .collectives import Collectives

POLL_S = 0.05  # between two looks of one of up to 100 ranks at how many have reported, which are messages


@dataclass(frozen=True, kw_only=True)
class DropSlowest:
    """More clients are sampled than are needed, and those that report last are left out.

    A round of cohort S samples `⌈(1 + o) S⌉` clients and closes once S have reported, or at its deadline with those
    that have. Ranks train the clients with least work first, and the others' work is thrown away, so a cohort leans
    towards clients with little data. Which clients count depends on time: runs do not repeat bit by bit.

    Args:
        over_sampling: o, clients sampled beyond the cohort, as a share of it.
        deadline_s: after which a round closes, from where its training begins; null for none.

    Example:
        >>> DropSlowest(over_sampling=0.3).sampled(10)
        13

    Reference: Bonawitz et al., Towards federated learning at scale: system design, 2019 (arXiv 1902.01046), section 9.
    """

    over_sampling: Annotated[float, Field(ge=0, lt=math.inf)] = 0.3
    deadline_s: Annotated[float, Field(gt=0, lt=math.inf)] | None = None

    def sampled(self, cohort: int) -> int:
        """Clients to sample for a cohort."""
        # Of 1.3 · 10 the product is above 13.
        return math.ceil(round(cohort * (1 + self.over_sampling), 9))


class RoundClosedError(Exception):
    """The round has closed, and what a client still computes for it is late."""


class Closing:
    """Whether the round of this rank, and of all others, has closed; it never does where no policy is given.

    Args:
        policy: None to wait for all clients.
        enough: reports that close a round.
    """

    def __init__(self, policy: DropSlowest | None, enough: int, collectives: Collectives, device: torch.device) -> None:
        self._policy, self._enough = policy, enough
        self._poll_s = POLL_S * max(1.0, collectives.processes / 100)
        self._collectives, self._device = collectives, device
        self._key = ""
        self._ends_at = self._polled_at = math.inf
        self._reported = 0

    def open(self, r: int) -> None:
        """Begin round `r`."""
        self._key, self._reported, self._polled_at = f"reported/{r}", 0, -math.inf
        deadline_s = None if self._policy is None else self._policy.deadline_s
        self._ends_at = math.inf if deadline_s is None else time.monotonic() + deadline_s

    def report(self, clients: int) -> None:
        """Count clients that were heard."""
        if self._policy is not None and self._collectives.group.index == 0:
            self._reported = self._collectives.count(self._key, clients)

    def closed(self) -> bool:
        """Whether the round is over; the same answer on all ranks of a client group, which all have to ask."""
        if self._policy is None:
            return False
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what was only launched has not been trained
        now = time.monotonic()
        if now - self._polled_at >= self._poll_s:
            self._reported, self._polled_at = self._collectives.count(self._key, 0), now
        over = torch.tensor(float(self._reported >= self._enough or now >= self._ends_at), device=self._device)
        return bool(self._collectives.group.sum(over) > 0)

    def check(self) -> None:
        """Raise where the round is over.

        Raises:
            RoundClosedError: it is.
        """
        if self.closed():
            raise RoundClosedError

    def forget(self) -> None:
        """Drop the count of the round, once all ranks are past it."""
        if self._policy is not None and self._collectives.leader:
            self._collectives.forget(self._key)
