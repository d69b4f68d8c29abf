"""What ranks exchange: one bucket and one collective a round, block slices among their holders, client state moves.

Every method does nothing on one rank, and every byte it puts on a link is added to `link_bytes`, summed over ranks:
an all-reduce of n bytes, a ring or hierarchical, moves 2(W−1)n in all, a broadcast (W−1)n, a point-to-point message n.

Every collective ends within the time-out of the process group, and where it fails, the ranks at fault are named.

Where a client is trained by a group of ranks, this is what groups exchange: each shard with the same shard of the other
groups, so that no rank ever holds a whole vector for it. `rank` and `world_size` then count groups, and `link_bytes`
what this shard moved.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

from ..faults import Faults
from .attempt import meet
from .groups import ClientGroup
from .guard import Guard, by_backend
from .hierarchy import AllReduce, Hierarchy, levels, node_name
from .watch import LostRankError, Watch

T = TypeVar("T")


class Collectives:
    """The process group as the engine uses it; a single process when `torch.distributed` is not initialised.

    Args:
        watch: names the ranks at fault; without one, what fails raises the backend's own error.
        faults: that are to happen to this rank, in tests.
        shard_size: ranks that train one client together; consecutive ranks form a group, so that one lies in a node.
        timeout: of what a group, or a shard of all groups, exchanges; None for the backend's own.
        all_reduce: `flat` leaves it to the backend; `hierarchical` sums in every node, then across nodes, which are
            found out by host name and by torchrun's agent, and is flat on one node or with one rank on each.

    Raises:
        LostRankError: by every collective, where another rank fails, dies, or does not come to it in time.
        ValueError: the ranks do not make whole groups, or are not spread evenly for a hierarchical all-reduce.

    Attributes:
        rank, world_size: of groups; of ranks where groups are single ranks.
        group: the ranks of this rank's group.
        across: the ranks with this shard in all groups; None for all ranks.
        hierarchy: the ranks in this node and across nodes; None where an all-reduce is flat.
        process_rank, processes: of ranks.
        leader: whether this is the first rank of all.
    """

    def __init__(
        self,
        watch: Watch | None = None,
        faults: Faults | None = None,
        *,
        shard_size: int = 1,
        timeout: timedelta | None = None,
        all_reduce: AllReduce = "flat",
    ) -> None:
        self.on = dist.is_available() and dist.is_initialized()
        self.process_rank = dist.get_rank() if self.on else 0
        self.processes = dist.get_world_size() if self.on else 1
        if self.processes % shard_size:
            raise ValueError(
                f"shard_size: groups of {shard_size} ranks are not to be made of {self.processes}; start a multiple"
            )
        self.rank, shard = divmod(self.process_rank, shard_size)
        self.world_size = self.processes // shard_size
        self.leader = self.process_rank == 0
        self._guard = Guard(watch)
        self.group = ClientGroup()
        self.across: dist.ProcessGroup | None = None
        if shard_size > 1:
            # Every rank takes part in making every group.
            ranks = range(self.processes)
            groups = [dist.new_group(list(ranks[g : g + shard_size]), timeout) for g in ranks[::shard_size]]
            self.across = [dist.new_group(list(ranks[j::shard_size]), timeout) for j in range(shard_size)][shard]
            self.group = ClientGroup(shard, shard_size, groups[self.rank], self._guard)
        self.hierarchy: Hierarchy | None = None
        if all_reduce == "hierarchical":
            inside, across = levels(self.gather(node_name()), shard_size)
            if len(inside[0]) > 1 and len(across[0]) > 1:
                self.hierarchy = Hierarchy(inside, across, self.process_rank, timeout, self._guard)
        self.link_bytes = 0
        self.watch, self.faults = watch, faults
        self._counts: Any = PrefixStore("counts", _get_default_store() if self.processes > 1 else HashStore())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Leave the job, telling the others with what this rank fails, if it does."""
        if self.watch is None:
            return
        if self.group.size > 1 and error is not None and by_backend(error):
            # What a sharded module exchanges while it computes is guarded by nobody else.
            lost = self.watch.lost(error)
            self.watch.leave(lost)
            raise lost from error
        self.watch.leave(error)

    def at(self, round: int, stage: str) -> None:
        """Say where this rank is: it comes to a stage of a round."""
        if self.watch is not None:
            self.watch.at(round, stage)
        if self.faults is not None:
            self.faults.at(round, stage)

    def _peer(self, group: int) -> int:
        """The rank that holds this shard in another group."""
        return group * self.group.size + self.group.index

    def all_reduce(self, bucket: Tensor) -> Tensor:
        """Sum the flat `bucket` over ranks, in place."""
        if self.world_size > 1:
            if self.hierarchy is not None:
                self.hierarchy.sum(bucket)
            else:
                with self._guard.named():
                    self._guard.arrive(bucket.device)
                    self._guard.finish(dist.all_reduce(bucket, group=self.across, async_op=True), bucket.device)
            self.link_bytes += 2 * (self.world_size - 1) * bucket.numel() * bucket.element_size()
        return bucket

    def reduce_blocks(self, sums: Tensor, blocks: Sequence[slice], holders: Sequence[Sequence[int]]) -> None:
        """Sum each block of `sums [d]` over the ranks that hold it, then give the result to all ranks, in place.

        A block's owner is one of its holders, chosen so that every rank owns about as much. The other holders send it
        their slice, it adds them in rank order, and broadcasts; blocks travel side by side. A block nobody holds stays
        as it is.

        Args:
            blocks: the slice of each block.
            holders: the ranks that have a partial sum of each block, ascending; the same on every rank.
        """
        if self.world_size == 1:
            return
        owned = [0] * self.world_size
        owners: list[int | None] = []
        for block, ranks in zip(blocks, holders, strict=True):
            owner = min(ranks, key=lambda rank: (owned[rank], rank)) if ranks else None
            owners.append(owner)
            if owner is not None:
                owned[owner] += block.stop - block.start
        operations: list[dist.P2POp] = []
        received: list[tuple[slice, Tensor]] = []
        for b, (block, ranks, owner) in enumerate(zip(blocks, holders, owners, strict=True)):
            for rank in ranks:
                if rank == owner:
                    continue
                self.link_bytes += (block.stop - block.start) * sums.element_size()
                if self.rank == rank and owner is not None:
                    operations.append(dist.P2POp(dist.isend, sums[block], self._peer(owner), tag=b))
                elif self.rank == owner:
                    part = torch.empty_like(sums[block])
                    operations.append(dist.P2POp(dist.irecv, part, self._peer(rank), tag=b))
                    received.append((block, part))
        with self._guard.named():
            self._guard.arrive(sums.device)
            self._wait(operations)
            for block, part in received:
                sums[block] += part
            broadcasts: list[Any] = []
            for block, owner in zip(blocks, owners, strict=True):
                if owner is not None:
                    source = self._peer(owner)
                    broadcasts.append(dist.broadcast(sums[block], src=source, group=self.across, async_op=True))
                    self.link_bytes += (self.world_size - 1) * (block.stop - block.start) * sums.element_size()
            for broadcast in broadcasts:
                self._guard.finish(broadcast, sums.device)

    def exchange(
        self,
        moves: Sequence[tuple[int, int]],
        message_bytes: int,
        outgoing: Sequence[Tensor],
        incoming: Sequence[Tensor],
    ) -> None:
        """Send client states point to point.

        Args:
            moves: `(source, target)` of every message, the same list on every rank.
            message_bytes: size of one message.
            outgoing: this rank's messages in list order.
            incoming: buffers for the messages to this rank, in list order.
        """
        sending, receiving, operations = iter(outgoing), iter(incoming), []
        for source, target in moves:
            if self.rank == source:
                operations.append(dist.P2POp(dist.isend, next(sending), self._peer(target)))
            elif self.rank == target:
                operations.append(dist.P2POp(dist.irecv, next(receiving), self._peer(source)))
        with self._guard.named():
            self._wait(operations)
        self.link_bytes += len(moves) * message_bytes

    @staticmethod
    def _wait(operations: list[dist.P2POp]) -> None:
        if operations:
            for request in dist.batch_isend_irecv(operations):
                request.wait()

    def agree(self, step: Callable[[], T]) -> T:
        """Run a step; where it fails on one rank, every rank raises that error, so that none waits for the others."""
        outcome: Any = None
        failure: Exception | None = None
        try:
            outcome = step()
        except Exception as error:
            failure = error
        for other in self.gather(failure):
            if other is not None:
                raise other
        return outcome

    def count(self, what: str, more: int) -> int:
        """Add to a number that all ranks share, without waiting for any of them; returns what it is now.

        Raises:
            LostRankError: the store of the job cannot be reached.
        """
        with self._guard.named(by="rank"):
            return int(self._counts.add(what, more))

    def forget(self, what: str) -> None:
        """Drop a shared number.

        Raises:
            LostRankError: as `count`.
        """
        with self._guard.named(by="rank"):
            self._counts.delete_key(what)

    def gather(self, value: Any) -> list[Any]:
        """A small picklable value of every rank of every group, in rank order; for agreement, never for payloads."""
        if self.processes == 1:
            return [value]
        values: list[Any] = [None] * self.processes
        with self._guard.named():
            dist.all_gather_object(values, value)
        return values


def join(
    device: torch.device,
    timeout_s: float = 600.0,
    faults: Faults | None = None,
    *,
    shard_size: int = 1,
    all_reduce: AllReduce = "flat",
) -> Collectives:
    """Join the process group that torchrun announces in the environment, or stay a single process.

    Args:
        timeout_s: longest a rank waits for the others, at the start and in every collective.
        faults: that are to happen to this rank, in tests.
        shard_size: ranks that train one client together.
        all_reduce: as `Collectives`.

    Raises:
        LostRankError: a rank did not start in time.
        ValueError: the ranks do not make whole groups, or are not spread evenly for a hierarchical all-reduce.
    """
    if "WORLD_SIZE" not in os.environ or not dist.is_available():
        return Collectives(faults=faults, shard_size=shard_size, all_reduce=all_reduce)
    if dist.is_initialized():
        return Collectives(faults=faults, shard_size=shard_size, all_reduce=all_reduce)
    rank, world_size, timeout = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(seconds=timeout_s)
    # torchrun's agent holds the store, and keeps it when it starts the ranks anew; without one the first rank does.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store: Any = TCPStore(address, port, world_size, rank == 0 and not agent, timeout, wait_for_workers=False)
        prefix = f"fedkernels/{meet(PrefixStore('fedkernels', store), rank, world_size, timeout_s)}"
        table = PrefixStore(f"{prefix}/watch", store.clone())
        watch = Watch(table, rank, world_size, timeout_s, agent=agent, group_size=shard_size)
        watch.start()
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise LostRankError(f"rank {rank} does not reach the job's store at {address}:{port}: {error}") from error
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    group = PrefixStore(f"{prefix}/group", store)
    dist.init_process_group(backend, timeout=timeout, store=group, rank=rank, world_size=world_size)
    collectives = Collectives(watch, faults, shard_size=shard_size, timeout=timeout, all_reduce=all_reduce)
    # NCCL wants all ranks of a process group in its first operation, and a move of client state has two of them.
    if device.type == "cuda":
        dist.all_reduce(torch.zeros(1, device=device))
    collectives.all_reduce(torch.zeros(1, device=device))
    collectives.link_bytes = 0
    return collectives


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` to this rank's device.

    Raises:
        ValueError: CUDA asked for where there is none, or more local ranks than GPUs.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees no GPU; use device: cpu or auto")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= gpus:
        raise ValueError(f"local rank {local_rank} has no GPU: {gpus} GPUs on this node; start at most that many ranks")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
