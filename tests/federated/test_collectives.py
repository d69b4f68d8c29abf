"""Collectives on gloo ranks and the aggregate's bucket, against plain sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rank_checks import block_plan, each_collective
from support import on_ranks, tiny_model, tiny_roles

from fedkernels.algorithms import FedBcgd
from fedkernels.federated.aggregate import Aggregator, protocol_bytes
from fedkernels.federated.collectives import Collectives, pick_device
from fedkernels.layout import Layout
from fedkernels.wire import Wire

WORLD = 3


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(WORLD, each_collective)


def test_ranks(ranks: list[dict[str, Any]]) -> None:
    assert [(found["rank"], found["world_size"]) for found in ranks] == [(rank, WORLD) for rank in range(WORLD)]


def test_all_reduce_sums_in_place(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        (total, in_place), link_bytes = found["all_reduce"]
        assert total.tolist() == [111.0 * i for i in range(7)]
        assert in_place
        assert link_bytes == 2 * (WORLD - 1) * 7 * 8


def test_blocks_are_summed_over_their_holders_alone(ranks: list[dict[str, Any]]) -> None:
    blocks, holders = block_plan()
    expected = np.full(20, -1.0)
    for block, at in zip(blocks, holders, strict=True):
        if at:
            expected[block] = sum(10.0**rank for rank in at) * np.arange(block.start, block.stop)
    # To the owner from every other holder, then to every other rank.
    sizes = [block.stop - block.start for block in blocks]
    moved = sum(size * (len(at) - 1 + WORLD - 1) for size, at in zip(sizes, holders, strict=True) if at)
    for found in ranks:
        sums, link_bytes = found["reduce_blocks"]
        assert np.array_equal(sums, expected)
        assert link_bytes == 4 * moved


def test_messages_arrive_in_order(ranks: list[dict[str, Any]]) -> None:
    received = [found["exchange"][0] for found in ranks]
    assert received == [[[201.0] * 3], [[0.0] * 3, [3.0] * 3], [[2.0] * 3]]
    assert [found["exchange"][1] for found in ranks] == [4 * 12] * WORLD


def test_gather_is_in_rank_order_and_not_counted(ranks: list[dict[str, Any]]) -> None:
    assert [found["gather"] for found in ranks] == [([{"rank": rank} for rank in range(WORLD)], 0)] * WORLD


def test_one_process_moves_nothing() -> None:
    collectives = Collectives()
    bucket = torch.arange(3.0)
    assert (collectives.rank, collectives.world_size) == (0, 1)
    assert torch.equal(collectives.all_reduce(bucket), torch.arange(3.0))
    collectives.reduce_blocks(bucket, [slice(0, 3)], [[0]])
    assert torch.equal(bucket, torch.arange(3.0))
    assert collectives.gather("x") == ["x"]
    assert collectives.link_bytes == 0


def layout(n_blocks: int = 3) -> Layout:
    module = tiny_model()
    return FedBcgd(blocks=n_blocks).layout(module, tiny_roles(module))


WIRES = {
    "delta": Wire(),
    "total": Wire(reduce="sum"),
    "M": Wire("matrices"),
    "loss": Wire("scalar"),
    "v": Wire(5, reduce="sum"),
    "block": Wire(only_block=True),
    "part": Wire(reduce="sum", only_block=True),
}
WEIGHTS, ASSIGNED = [2.0, 0.5, 4.0, 1.0], [2, 0, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounds", [1, 2])
def test_the_aggregate_is_the_weighted_mean(dtype: torch.dtype, rounds: int) -> None:
    lay = layout()
    like = torch.zeros(lay.d, dtype=torch.float32)
    aggregator = Aggregator(WIRES, lay, like, dtype, 7)
    sizes = {"delta": lay.d, "total": lay.d, "M": lay.d_matrix, "loss": 1, "v": 5, "block": lay.d, "part": lay.d}
    for r in range(rounds):
        aggregator.reset()
        g = torch.Generator().manual_seed(r)
        up = {name: torch.randn(4, size, generator=g) for name, size in sizes.items()}
        for part in ([0], [1, 2, 3]):
            mine = {name: rows[part] for name, rows in up.items()}
            aggregator.add(mine, [WEIGHTS[c] for c in part], [ASSIGNED[c] for c in part], part)
        aggregator.slots[3] = 5 + r
        agg = aggregator.reduce(Collectives(), [[0], [], [0]])
        assert aggregator.slots.tolist() == [0, 0, 0, 5 + r, 0, 0, 0]

        def mean(rows: list[int], values: torch.Tensor) -> torch.Tensor:
            total = sum(WEIGHTS[c] * values[c].double() for c in rows)
            return total / sum(WEIGHTS[c] for c in rows)

        blocks, parts = torch.zeros(2, lay.d, dtype=torch.float64)
        for b, senders in ((0, [1, 3]), (2, [0, 2]), (3, [0, 1, 2, 3])):
            blocks[lay.block(b)] = mean(senders, up["block"])[lay.block(b)]
            parts[lay.block(b)] = up["part"][senders].double().sum(0)[lay.block(b)]
        expected = {
            "delta": mean([0, 1, 2, 3], up["delta"]),
            "total": up["total"].double().sum(0),
            "M": mean([0, 1, 2, 3], up["M"]),
            "loss": mean([0, 1, 2, 3], up["loss"]),
            "v": up["v"].double().sum(0),
            "block": blocks,
            "part": parts,
        }
        assert set(agg) == set(expected)
        for name, value in expected.items():
            assert agg[name].dtype == torch.float32
            # Five roundings of sums below 20 in `dtype`, and one of the result to float32.
            atol = 5 * 20 * torch.finfo(dtype).eps / 2
            torch.testing.assert_close(agg[name].double(), value, rtol=2.0**-24, atol=atol)


def test_float64_sums_ignore_the_order() -> None:
    lay = layout(1)
    like = torch.zeros(lay.d)
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(50, lay.d, generator=g) * 10.0 ** torch.randint(-6, 6, (50, 1), generator=g)
    results = []
    for order in (range(50), reversed(range(50))):
        aggregator = Aggregator({"delta": Wire()}, lay, like, torch.float64, 5)
        aggregator.reset()
        for c in order:
            aggregator.add({"delta": rows[c : c + 1]}, [1.0], [None], [c])
        results.append(aggregator.reduce(Collectives(), [[0]]).delta)
    assert torch.equal(results[0], results[1])


def test_a_round_without_clients_aggregates_to_zero() -> None:
    lay = layout()
    aggregator = Aggregator(WIRES, lay, torch.zeros(lay.d), torch.float64, 5)
    aggregator.reset()
    assert not any(value.any() for value in aggregator.reduce(Collectives(), [[], [], []]).values())


def test_the_bucket_holds_of_block_wires_the_shared_block_alone() -> None:
    lay = layout()
    aggregator = Aggregator(WIRES, lay, torch.zeros(lay.d), torch.float64, 7)
    whole = 2 * lay.d + lay.d_matrix + 1 + 5
    assert aggregator.bucket.numel() == 7 + 1 + 3 + whole + 2 * (lay.block(3).stop - lay.block(3).start)


@pytest.mark.parametrize("like", ["matrices", "scalar", 5])
def test_block_wires_are_parameters(like: Any) -> None:
    lay = layout()
    with pytest.raises(ValueError, match=f"wire 'part' is sent by block, so it must be like params, not {like!r}"):
        Aggregator({"part": Wire(like, only_block=True)}, lay, torch.zeros(lay.d), torch.float64, 5)


@pytest.mark.parametrize("wires", [("a",), ("a", "b", "c")])
@pytest.mark.parametrize("shared", [(), None])
def test_a_block_of_all_wires_is_one_message(wires: tuple[str, ...], shared: Any) -> None:
    """Whatever the number of wires, with and without a shared block; one nobody trained is not asked for."""
    module = tiny_model()
    lay = FedBcgd(blocks=20, shared=shared).layout(module, tiny_roles(module))
    asked: list[Any] = []

    class Recorder(Collectives):
        def reduce_blocks(self, sums: torch.Tensor, blocks: Any, holders: Any) -> None:
            asked.append((blocks, holders))
            for block, ranks in zip(blocks, holders, strict=True):
                assert sums[block].any() == bool(ranks)

    aggregator = Aggregator({name: Wire(only_block=True) for name in wires}, lay, torch.zeros(lay.d), torch.float64, 5)
    up = {name: torch.full((2, lay.d), 1.0 + i) for i, name in enumerate(wires)}
    aggregator.add(up, [2.0, 3.0], [7, 0], [0, 1])
    holders = [[0] if b in (0, 7) else [] for b in range(20)]
    agg = aggregator.reduce(Recorder(), holders)
    [(blocks, given)] = asked
    assert given == holders
    assert [(block.stop - block.start) for block in blocks] == [
        len(wires) * (lay.block(b).stop - lay.block(b).start) for b in range(20)
    ]
    for i, name in enumerate(wires):
        expected = torch.zeros(lay.d)
        for b in (0, 7, 20):
            expected[lay.block(b)] = 1.0 + i
        assert torch.equal(agg[name], expected)


def test_protocol_bytes_of_every_kind_of_wire() -> None:
    lay = layout()
    server = {"x": torch.zeros(lay.d), "c": torch.zeros(9), "unsent": torch.zeros(100)}
    sizes = [lay.block(b).stop - lay.block(b).start for b in range(4)]
    up, down = protocol_bytes(("x", "c"), server, WIRES, lay, [2, 0, 2], 4)
    whole = 2 * lay.d + lay.d_matrix + 1 + 5
    assert up == 4 * (3 * whole + 2 * (2 * sizes[2] + sizes[0] + 3 * sizes[3]))
    assert down == 4 * 3 * (lay.d + 9)
    assert protocol_bytes(("x",), server, WIRES, lay, [], 4) == (0, 0)


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="cuda was asked for, but torch sees no GPU"):
        pick_device("cuda")


def test_more_local_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="local rank 2 has no GPU: 2 GPUs on this node"):
        pick_device("cuda")
