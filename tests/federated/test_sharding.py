"""Client groups of several ranks compute what one rank does, and hold a shard of it each."""

from __future__ import annotations

import builtins
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_checks import (
    OFFLOAD,
    SETTINGS,
    Runs,
    adapters_in_groups,
    continue_all,
    each_group_operation,
    map_matrices_on_ranks,
    odd_engine,
    odd_model,
    refused_on_ranks,
    run_all,
    save_all,
    spoilt_on_ranks,
)
from support import CLIENTS, on_ranks
from torch import Tensor, nn

from fedkernels.algorithms import ALGORITHMS, FedAdamW
from fedkernels.config import ConfigError, load
from fedkernels.contract import Batch
from fedkernels.federated.collectives import Collectives
from fedkernels.federated.fsdp import blocks_of
from fedkernels.federated.groups import ClientGroup
from fedkernels.federated.parallel import check_shardable, share_of, size_of
from fedkernels.federated.schedule import place, sample_cohort
from fedkernels.federated.sharding import WHOLE, Cut, MatrixOwners, ShardedLayout, common, dealt
from fedkernels.federated.zero import require_deepspeed
from fedkernels.layout import Layout
from fedkernels.optim import Muon, Shampoo, Soap, Sophia

ROUNDS = 3
MUST: Runs = [("fedavg", {}), ("fedadamw", {}), ("fedmuon", {}), ("scaffold", {})]
# What else is said to work, with options that reach other code.
MORE: Runs = [
    ("fedadamw", {"algorithm": {"second_moment": "tensor"}, "clients_per_batch": 3}),
    ("fedadamw", {"algorithm": {"second_moment": "full"}, "reduce_dtype": "float32"}),
    ("fedmuon", {"algorithm": {"route": "all_matrices"}, "clients_per_batch": 2, "weighting": "samples"}),
    ("fedmuon", {"algorithm": {"share_momentum": False, "orthogonalization": "polar_express"}}),
    ("fedavg", {"algorithm": {"local": Sophia(rho=1.0, hessian_every=2), "prox_mu": 0.1}}),
    ("local_muon", {}),
    ("fedavgm", {}),
    ("fedadam", {}),
    ("fedyogi", {}),
    ("fedadagrad", {}),
    ("fedcm", {}),
    ("fedacg", {}),
    ("feddyn", {"clients_per_batch": 6}),
    ("fedavg", {"microbatch_size": 1, "clients_per_batch": 2}),
    ("fedlada", {}),
    ("fedsam", {}),
    ("mofedsam", {}),
    ("fedgamma", {"clip_norm": math.inf}),
]
Result = dict[str, Any]


def with_sharding(runs: Runs, sharding: str) -> Runs:
    return [(name, options | {"sharding": sharding}) for name, options in runs]


@pytest.fixture(scope="module")
def alone() -> Result:
    return run_all(Collectives(), [*MUST, *MORE], 1, ROUNDS)


def by_rows(tensor: Tensor, shards: int) -> list[Tensor]:
    """As FSDP2 documents it: `torch.chunk` along the first dimension; what has none is the first shard's."""
    if tensor.dim() == 0:
        return [tensor.view(1)] + [tensor.new_empty(0)] * (shards - 1)
    chunks = [chunk.flatten() for chunk in tensor.chunk(shards)]
    return chunks + [tensor.new_empty(0)] * (shards - len(chunks))


def by_elements(tensor: Tensor, shards: int) -> list[Tensor]:
    """As ZeRO does: padded to a multiple of the shards, and cut."""
    size = -(-tensor.numel() // shards)
    return [tensor.flatten()[n * size : (n + 1) * size] for n in range(shards)]


CUTS = {"row": by_rows, "element": by_elements}


def cut_by_hand(unit: str, shards: int, layout: Layout, vector: Tensor, matrices: bool = False) -> list[Tensor]:
    """The shards of a flat vector, from the shapes of the parameters alone."""
    entries = [e for e in layout.entries if not matrices or e in layout.matrix_entries]
    parts = vector.split([math.prod(entry.shape) for entry in entries])
    pieces = [CUTS[unit](part.view(entry.shape), shards) for part, entry in zip(parts, entries, strict=True)]
    return [torch.cat(list(pieces_of_shard)) for pieces_of_shard in zip(*pieces, strict=True)]


def check_equal(
    ranks: Sequence[Result],
    alone: Result,
    runs: Runs,
    unit: str | None,
    shards: int,
    tolerances: Mapping[str, float] | None = None,
) -> None:
    """Every rank holds its shard of what one rank computed, and tells the same of each round."""
    for n, (name, options) in enumerate(runs):
        expected, tolerance = alone[str(n)], 1e-12 if tolerances is None else tolerances[name]
        engine = odd_engine(name, Collectives(), torch.float64, **options)
        layout, sizes = engine.layout, {layout_size: key for key, layout_size in _sizes(engine.layout).items()}
        for rank in ranks:
            state = rank[str(n)]["state"]
            for key, value in state.items():
                whole = torch.from_numpy(expected["state"][key])
                if unit is not None and (key.startswith("client") or whole.numel() in sizes):
                    matrices = not key.startswith("client") and sizes[whole.numel()] == "d_matrix"
                    whole = cut_by_hand(unit, shards, layout, whole, matrices)[rank["shard"]]
                np.testing.assert_allclose(
                    value, whole.numpy(), rtol=tolerance, atol=tolerance, err_msg=f"{name} {options} {key}"
                )
            same = ("round", "lr", "cohort", "dropped", "protocol_up_bytes", "protocol_down_bytes")
            for row, other in zip(rank[str(n)]["rows"], expected["rows"], strict=True):
                assert [row[key] for key in same] == [other[key] for key in same], name
                assert row["train_loss"] == pytest.approx(other["train_loss"], rel=max(tolerance, 1e-12))
            for tests, other in zip(rank[str(n)]["tests"], expected["tests"], strict=True):
                assert tests == pytest.approx(other, rel=max(tolerance, 1e-12)), name
        kept = [{key for key in rank[str(n)]["state"] if key.startswith("client")} for rank in ranks]
        assert set().union(*kept) == {key for key in expected["state"] if key.startswith("client")}
        model = ranks[0][str(n)]["model"]
        assert model.keys() == expected["model"].keys()
        for key, value in expected["model"].items():
            assert model[key].shape == value.shape
            np.testing.assert_allclose(model[key], value, rtol=tolerance, atol=tolerance, err_msg=f"{name} {key}")


def _sizes(layout: Layout) -> dict[str, int]:
    sizes = {"d": layout.d, "d_matrix": layout.d_matrix}
    # What tells whole vectors from shards below.
    assert layout.curvature_blocks("hessian").size not in sizes.values()
    return {key: size for key, size in sizes.items() if size}


@pytest.mark.parametrize(("sharding", "unit"), [("ddp", None), ("fsdp2", "row")])
def test_groups_of_two_are_one_rank(sharding: str, unit: str | None, alone: Result) -> None:
    runs = [*MUST, *MORE]
    check_equal(on_ranks(2, run_all, with_sharding(runs, sharding), 2, ROUNDS), alone, runs, unit, 2)


@pytest.mark.parametrize(("sharding", "unit"), [("ddp", None), ("fsdp2", "row")])
def test_two_groups_of_two_are_one_rank(sharding: str, unit: str | None, alone: Result) -> None:
    ranks = on_ranks(4, run_all, with_sharding(MUST, sharding), 2, ROUNDS)
    assert [(rank["group"], rank["shard"]) for rank in ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    check_equal(ranks, alone, MUST, unit, 2)
    for n, (name, _) in enumerate(MUST):
        for rank in ranks:
            rows = rank[str(n)]["rows"]
            assert [row["link_bytes"] for row in rows] == link_bytes(name, unit, 2, 2, len(rows)), name


def test_one_group_of_three_is_one_rank(alone: Result) -> None:
    """More ranks than a parameter has rows, and than some mini-batches have samples."""
    check_equal(on_ranks(3, run_all, with_sharding(MUST, "fsdp2"), 3, ROUNDS), alone, MUST, "row", 3)


def test_zero_is_one_rank_up_to_the_rounding_of_float32() -> None:
    """DeepSpeed takes float32 alone."""
    # FedACG starts elsewhere than at the model that was evaluated last.
    runs: Runs = [*MUST, ("fedacg", {}), ("fedavg", OFFLOAD)]
    plain: Runs = [*MUST, ("fedacg", {}), ("fedavg", {})]
    one = run_all(Collectives(), plain, 1, ROUNDS, torch.float32)
    ranks = on_ranks(4, run_all, with_sharding(runs, "deepspeed"), 2, ROUNDS, torch.float32)
    # Five quintic steps stretch what is left of a small singular value by 3.4445⁵; nine local steps of η = 0.05 sum it.
    muon = 3.4445**5 * torch.finfo(torch.float32).eps / 2 * 0.05 * 9
    check_equal(
        ranks,
        one,
        plain,
        "element",
        2,
        dict.fromkeys(("fedavg", "fedadamw", "scaffold", "fedacg"), 2e-6) | {"fedmuon": muon},
    )
    for rank in ranks:
        rows = rank["3"]["rows"]
        assert [row["link_bytes"] for row in rows] == link_bytes("scaffold", "element", 2, 2, len(rows), 4)


def link_bytes(name: str, unit: str | None, shards: int, groups: int, rounds: int, itemsize: int = 8) -> list[int]:
    """Of every shard a ring over groups, and the state of clients that moved."""
    module, roles = odd_model(scalar=itemsize == 8)
    layout = ALGORITHMS[name]().layout(module, roles)
    engine = odd_engine(name, Collectives(), torch.float64)
    x = torch.arange(layout.d)
    vectors, matrices = [x] * shards, [x[: layout.d_matrix]] * shards
    if unit is not None:
        vectors = cut_by_hand(unit, shards, layout, x)
        matrices = cut_by_hand(unit, shards, layout, x[: layout.d_matrix], matrices=True)
    more = {"fedavg": 0, "fedadamw": layout.curvature_blocks("hessian").size}
    owners: dict[int, int] = {}
    out = []
    for r in range(rounds):
        ids = sample_cohort("uniform", 0, r, CLIENTS, SETTINGS["cohort"]).tolist()
        placed = place(ids, engine.batches.steps(ids).tolist(), owners, [1.0] * groups)
        now = {ids[p]: group for group, positions in enumerate(placed) for p in positions}
        moved = sum(owners.get(i, group) != group for i, group in now.items()) if name == "scaffold" else 0
        owners |= now if name == "scaffold" else {}
        total = 0
        for vector, part in zip(vectors, matrices, strict=True):
            own = {"scaffold": len(vector), "fedmuon": len(part)}.get(name, more.get(name, 0))
            bucket = 7 + 2 * groups + 1 + len(vector) + own
            total += 2 * (groups - 1) * bucket * 8 + moved * len(vector) * itemsize
        out.append(total)
    return out


def test_cuts() -> None:
    for shape, shards, unit in itertools.product([(), (1,), (5,), (7, 3), (2, 3, 4)], [1, 2, 3, 5], ["row", "element"]):
        values = torch.arange(math.prod(shape)).view(shape)
        expected = CUTS[unit](values, shards)
        for shard in range(shards):
            low, high = Cut(unit, shards).run(shape, shard)
            assert torch.equal(values.flatten()[low:high], expected[shard]), (shape, shards, unit, shard)


def sharded(layout: Layout, cut: Cut) -> list[ShardedLayout]:
    return [ShardedLayout(layout, cut, ClientGroup(shard, cut.shards)) for shard in range(cut.shards)]


@pytest.fixture(scope="module")
def layout() -> Layout:
    module, roles = odd_model()
    return FedAdamW().layout(module, roles)


@pytest.mark.parametrize("unit", ["row", "element"])
@pytest.mark.parametrize("shards", [2, 3, 8])
def test_shards_of_a_vector(unit: Any, shards: int, layout: Layout) -> None:
    x = torch.randn(layout.d, dtype=torch.float64)
    expected = cut_by_hand(unit, shards, layout, x)
    views = layout.views(x)
    for shard, part in zip(sharded(layout, Cut(unit, shards)), expected, strict=True):
        assert torch.equal(shard.flatten(views), part)
        assert (shard.d, shard.whole) == (len(part), layout)
        matrices = torch.cat([shard.views(part)[entry.name] for entry in layout.matrix_entries])
        assert torch.equal(shard.matrices(part), matrices)
        others = [shard.views(part)[e.name] for e in layout.entries if e not in layout.matrix_entries]
        assert torch.equal(shard.vectors(part), torch.cat(others))


@pytest.mark.parametrize(("old", "new"), [*itertools.product([WHOLE, Cut("row", 2), Cut("element", 3)], repeat=2)])
def test_what_shards_have_in_common(old: Cut, new: Cut, layout: Layout) -> None:
    """Every coordinate of a shard lies in one shard of another cut, at the place that both name."""
    x = torch.arange(layout.d)
    before, after = (cut_by_hand(cut.unit, cut.shards, layout, x) for cut in (old, new))
    for shard, expected in enumerate(after):
        found = torch.full_like(expected, -1)
        for source, values in enumerate(before):
            for there, here in common(layout.entries, old, source, new, shard):
                assert (found[here] == -1).all()
                found[here] = values[there]
        assert torch.equal(found, expected)
    if old == new == WHOLE:
        assert list(common(layout.entries, old, 0, new, 0)) == [(slice(0, layout.d), slice(0, layout.d))]


@pytest.mark.parametrize("rule", ["hessian", "tensor"])
@pytest.mark.parametrize(("unit", "shards"), [("row", 2), ("row", 4), ("element", 2), ("element", 5)])
def test_curvature_blocks(rule: Any, unit: Any, shards: int, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial means of all shards add up to the means, and every shard gets its part of the expansion."""
    monkeypatch.setattr(ClientGroup, "sum", lambda self, values: values)
    v = torch.rand(3, layout.d, dtype=torch.float64)
    parts = [torch.stack(rows) for rows in zip(*(cut_by_hand(unit, shards, layout, row) for row in v), strict=True)]
    blocks = [shard.curvature_blocks(rule) for shard in sharded(layout, Cut(unit, shards))]
    whole = layout.curvature_blocks(rule)
    assert {block.size for block in blocks} == {whole.size}
    means = sum(block.mean(part) for block, part in zip(blocks, parts, strict=True))
    torch.testing.assert_close(means, whole.mean(v), rtol=1e-13, atol=1e-13)
    expanded = cut_by_hand(unit, shards, layout, whole.expand(whole.mean(v)[0]))
    for block, part in zip(blocks, expanded, strict=True):
        assert torch.equal(block.expand(whole.mean(v)[0]), part)


def test_matrices_meet_at_owners() -> None:
    """Of two ranks, and of two clients at once: every matrix is seen whole and once, and its parts come back scaled."""
    ranks = on_ranks(2, map_matrices_on_ranks)
    module, roles = odd_model()
    layout = Layout.of(module, roles, route="all_matrices")
    seen = sorted(tuple(shape) for rank in ranks for shape in rank["seen"])
    assert seen == sorted((2, slab.rows, slab.cols) for slab in layout.slabs for _ in range(slab.count))
    matrices = layout.matrices(torch.arange(2.0 * layout.d, dtype=torch.float64).view(2, -1))
    expected = torch.empty_like(matrices)
    for slab in layout.slabs:
        run = slice(slab.matrix_start, slab.matrix_stop)
        whole = matrices[:, run].view(2, slab.count, slab.rows, slab.cols)
        expected[:, run] = (slab.scale * whole.cumsum(-1).cumsum(-2)).flatten(1)
    for shard, rank in enumerate(ranks):
        part = torch.stack([cut_by_hand("row", 2, layout, row, matrices=True)[shard] for row in expected])
        np.testing.assert_allclose(rank["mapped"], part.numpy(), rtol=1e-14)


def test_owners_share_the_cost() -> None:
    shapes = {f"{n}.weight": (64, 64 + n) for n in range(12)}
    layout = Layout.of(nn.ModuleList(nn.Linear(b, a, bias=False) for a, b in shapes.values()))
    owned = []
    for shard in range(4):
        part = MatrixOwners(layout, Cut("row", 4), ClientGroup(shard, 4), 0, 0)
        owned.append(sum(run.stop - run.start for _, run, _ in part._slabs))
    assert sum(owned) == layout.d_matrix
    assert max(owned) - min(owned) < 64 * 64


def test_group_operations() -> None:
    """Four ranks in groups of two: sums and swaps stay inside; reductions, moves and bytes are those of a shard."""
    ranks = on_ranks(4, each_group_operation)
    for rank, out in enumerate(ranks):
        group, shard = divmod(rank, 2)
        assert (out["rank"], out["world_size"], out["processes"], out["leader"]) == (group, 2, 4, rank == 0)
        assert out["sum"] == [10.0 ** (2 * group) + 10.0 ** (2 * group + 1)]
        # Rank i sends j + 1 times 10 i + j to place j of its group.
        assert out["swap"] == [[10.0 * (2 * group + i) + shard] * (shard + 1) for i in range(2)]
        whole = [[10.0 * rank], [10.0 * (rank + 1)] * 2]
        assert out["collect"] == (whole if shard == 0 else None)
        assert out["all_reduce"] == ([10.0**shard + 10.0 ** (2 + shard)] * 3, 2 * 3 * 8)
        assert out["exchange"] == ([[float(shard)] * 2] if group else [[100.0 + 2 + shard] * 2], 2 * 16)
        assert out["reduce_blocks"] == (
            [10.0**shard + 10.0 ** (2 + shard)] * 2 + [10.0 ** (2 + shard)],
            (2 + 2 + 1) * 8,
        )
        assert out["gather"] == [0, 1, 2, 3]
        assert "groups of 3 ranks are not to be made of 4" in out["uneven"]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_shares_of_a_mini_batch(size: int) -> None:
    """Means over the ranks' samples times their shares are the mean over the mini-batch; padding counts for nothing."""
    losses = torch.rand(3, 4, dtype=torch.float64)
    weights = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.float64)
    for given in (None, weights):
        batch = Batch(losses, torch.zeros(3, 4, dtype=torch.long), given, None)
        total = torch.zeros(3, dtype=torch.float64)
        for index in range(size):
            part, count = share_of(batch, ClientGroup(index, size))
            counted = torch.ones_like(part.inputs) if part.weights is None else part.weights
            assert (counted.sum(1) > 0).all()
            total += count / size_of(batch) * (part.inputs * counted).sum(1) / counted.sum(1)
        expected = losses.mean(1) if given is None else (losses * given).sum(1) / given.sum(1)
        torch.testing.assert_close(total, expected, rtol=1e-15, atol=1e-15)


def test_blocks_are_list_members_that_share_nothing() -> None:
    module, _ = odd_model()
    assert blocks_of(module) == [module.blocks[1], module.blocks[0]]  # the third is tied to what is around it
    nested = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]), nn.Tanh()])
    assert blocks_of(nested) == [nested[0][0], nested[0]]


def test_vectors_that_are_dealt_out(layout: Layout) -> None:
    module, roles = odd_model()
    assert dealt(FedAdamW(), layout, WHOLE) == {}
    found = dealt(FedAdamW(), layout, Cut("row", 2))
    assert found == {"x": layout.entries, "G": layout.entries}  # v̄ has one value a block, t is one
    muon = ALGORITHMS["fedmuon"]()
    layout = muon.layout(module, roles)
    assert dealt(muon, layout, Cut("element", 3))["M_bar"] == layout.matrix_entries


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_ranks_of_a_group_agree(sharding: str) -> None:
    """A client whose samples are NaN on one rank alone drops out on all, and a stop that one asks for stops all."""
    ranks = on_ranks(4, spoilt_on_ranks, sharding)
    for rank in ranks:
        assert rank["dropped"] == ranks[0]["dropped"]
        assert rank["dropped"].count("sent NaN") == 1
        assert rank["stops"] == [False, True]
        assert rank["rows"] == ranks[0]["rows"]


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_adapters_of_transformers(sharding: str) -> None:
    """Only adapters and heads are dealt out by the layout; the frozen base comes back whole as well.

    Norms of Llama compute in float32 whatever the model's dtype, and ddp scales a part of a mini-batch after the
    backward pass, not before it: nine steps at η = 0.05 along directions of order one then differ by some units of
    float32.
    """
    alone = adapters_in_groups(Collectives(), 1, "none")
    first, second = on_ranks(2, adapters_in_groups, 2, sharding)
    assert first.keys() == alone.keys()
    for name, expected in alone.items():
        in_float32 = sharding == "ddp" and name.startswith("llama")
        tolerance = 9 * 0.05 * 4 * float(np.finfo(np.float32).eps) if in_float32 else 1e-12
        for kind in ("trained", "frozen"):
            assert first[name][kind].keys() == expected[kind].keys()
            for key, value in expected[kind].items():
                np.testing.assert_allclose(first[name][kind][key], value, rtol=1e-12, atol=tolerance, err_msg=key)
        told = ("train_loss", "test_loss", "test_accuracy", "protocol_up_bytes")
        for row, other in zip(second[name]["rows"], expected["rows"], strict=True):
            assert [row[key] for key in told] == pytest.approx([other[key] for key in told], rel=tolerance)
        shards = first[name]["d"] + second[name]["d"]
        assert shards == expected["d"] * (2 if sharding == "ddp" else 1)


SAVED: Runs = [("scaffold", {}), ("fedmuon", {}), ("fedadamw", {})]


@pytest.mark.parametrize(
    ("before", "after"),
    [((4, 2, "fsdp2"), (1, 1, "none")), ((1, 1, "none"), (4, 2, "fsdp2")), ((3, 3, "fsdp2"), (2, 2, "ddp"))],
)
def test_another_number_of_shards_continues(before: Any, after: Any, tmp_path: Path) -> None:
    one = run_all(Collectives(), SAVED, 1, 4)

    def on(ranks: int, function: Any, *arguments: Any) -> list[Result]:
        return [function(Collectives(), *arguments)] if ranks == 1 else on_ranks(ranks, function, *arguments)

    on(before[0], save_all, with_sharding(SAVED, before[2]), before[1], 2, tmp_path)
    ranks = on(after[0], continue_all, with_sharding(SAVED, after[2]), after[1], 2, tmp_path)
    for n in range(len(SAVED)):
        one[str(n)] |= {key: one[str(n)][key][2:] for key in ("rows", "tests")}
    check_equal(ranks, one, SAVED, "row" if after[2] == "fsdp2" else None, after[1])


CONFIG: dict[str, Any] = {
    "algorithm": "fedavg", "model": "mlp", "data": "digits", "partition": "iid", "clients": 4, "cohort": 2,
    "local_steps": 1, "batch_size": 8, "lr": 0.1, "rounds": 1, "run_dir": "unused",
}  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"shard_size": 2}, "shard_size: 2 ranks to a client need sharding: ddp, fsdp2 or deepspeed"),
        ({"sharding": "fsdp2"}, "shard_size: 1, but sharding: fsdp2 needs groups of 2"),
        ({"sharding": "fsdp2", "shard_size": 0}, "shard_size: 0, expected int >= 1"),
        ({"sharding": "fsdp"}, "sharding: 'fsdp', expected none | ddp | fsdp2 | deepspeed"),
        ({"deepspeed.offload": "cpu"}, "deepspeed: has no effect with sharding: none"),
        (
            {"sharding": "deepspeed", "shard_size": 2, "deepspeed.offload": "disk"},
            "deepspeed.offload: 'disk', expected none | cpu",
        ),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(None, CONFIG | keys)
    assert message in str(error.value)


def test_what_needs_whole_vectors_is_refused() -> None:
    able = {name for name, algorithm in ALGORITHMS.items() if algorithm.shardable}
    assert {"fedavg", "fedadamw", "fedmuon", "scaffold"} <= able
    assert able >= {name for name, _ in MORE}
    for name in ("fedpac", "fedsmoo", "fedbcgd", "dp_fedavg"):
        with pytest.raises(
            ValueError, match=f"sharding: fsdp2 is not for {ALGORITHMS[name].__name__}.*it is for.*fedavg"
        ):
            check_shardable("fsdp2", ALGORITHMS[name](), {})
    for optimizer in (Soap(), Shampoo()):
        with pytest.raises(
            ValueError, match=f"{type(optimizer).__name__}, which needs vectors whole; it is for sgd, adamw, muon"
        ):
            check_shardable("deepspeed", ALGORITHMS["fedavg"](local=optimizer), {})
    check_shardable("deepspeed", ALGORITHMS["fedavg"](local=Muon()), {})


def test_settings_that_need_whole_vectors_are_refused() -> None:
    found = on_ranks(2, refused_on_ranks)[1]
    assert found == {
        "evaluator": "evaluator: 'batched'; sharding: fsdp2 computes one client after another; expected auto or loop",
        "codec": "sharding: fsdp2 sends floats, and wire 'delta' has the codec Int8; use ddp",
        "low rank": "sharding: fsdp2 sends floats, and wire 'M' has the codec LowRank; use ddp",
        "cohort": "cohort is 0, expected 1 to the number of clients, 12",
        "scalar": "sharding: deepspeed takes no parameter without a dimension, as scale is; use fsdp2",
        "double": "sharding: deepspeed takes float32 parameters, and scale is torch.float64",
        "noise": "privacy.noise: 'secure' would differ among the ranks of a client group; use seeded noise",
    }


def test_deepspeed_is_asked_for_only_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "deepspeed":
            raise ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"needs the deepspeed package: DS_BUILD_OPS=0 pip install"):
        require_deepspeed(torch.device("cpu"))
