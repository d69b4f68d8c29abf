"""The ranks of one attempt at a job find each other in a store that may remember earlier attempts."""

from __future__ import annotations

import hashlib
import json
import time
import uuid

from torch.distributed import Store  # type: ignore[attr-defined]

from .watch import BEAT_S, LostRankError, say_ranks

_met: list[str] = []


def current() -> str | None:
    """The name of the attempt that this process belongs to; None before it has met the others."""
    return _met[-1] if _met else None


def meet(store: Store, rank: int, world_size: int, timeout_s: float) -> str:
    """A name that all ranks of this attempt know, and none of an earlier one.

    Launchers keep their store when they start ranks again, and their agents count restarts each for itself. So every
    rank leaves a token of its own. The first rank publishes a roster of all tokens, anew whenever one has changed; the
    others confirm a roster that has theirs, and once all have, its name holds. Who belongs to an earlier attempt
    confirms nothing.

    Args:
        store: of the job, with nothing else under its keys.
        timeout_s: longest to wait for the others.

    Raises:
        LostRankError: some did not come in time; by all that did, of which the lowest is the first to say so.
    """
    token = uuid.uuid4().hex
    store.set(f"token/{rank}", token)
    deadline = time.monotonic() + timeout_s
    name = ""
    while True:
        if rank == 0:
            keys = [f"token/{r}" for r in range(world_size)]
            if all(store.check([key]) for key in keys):
                tokens = [store.get(key).decode() for key in keys]
                if (found := hashlib.sha256("".join(tokens).encode()).hexdigest()[:16]) != name:
                    name = found
                    store.set("roster", json.dumps([name, tokens]))
        elif store.check(["roster"]):
            found, tokens = json.loads(store.get("roster"))
            name = found if tokens[rank : rank + 1] == [token] and len(tokens) == world_size else ""
        if name:
            store.set(f"{name}/{rank}", "")
            if rank == 0 and not _without(store, f"{name}/", world_size):
                store.set(f"{name}/all", "")
            if store.check([f"{name}/all"]):
                _met.append(name)
                return name
        if store.check(["late"]):
            text, told, here = json.loads(store.get("late"))
            if token in told:
                raise LostRankError(text, first=rank == here)
        if time.monotonic() > deadline:
            # Without a roster that has this rank's token, it is the first rank that has not looked yet.
            absent = _without(store, "token/", world_size) or (_without(store, f"{name}/", world_size) if name else [0])
            here = min(r for r in range(world_size) if r not in absent or r == rank)
            text = f"{say_ranks(absent)} did not start within {timeout_s:g} s"
            keys = [f"token/{r}" for r in range(world_size)]
            store.set("late", json.dumps([text, [store.get(key).decode() for key in keys if store.check([key])], here]))
            time.sleep(BEAT_S)  # for the others to read it, should the store end with this process
            raise LostRankError(text, first=rank == here)
        time.sleep(0.02)


def _without(store: Store, prefix: str, world_size: int) -> list[int]:
    """The ranks without a key of this prefix."""
    return [r for r in range(world_size) if not store.check([f"{prefix}{r}"])]
