"""The plan against what engines on real ranks count and take."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rank_checks import planned_rounds
from support import on_ranks

from fedkernels.cli import main
from fedkernels.config import load
from fedkernels.federated.collectives import Collectives
from fedkernels.planning.memory import TensorPeak
from fedkernels.planning.network import Network
from fedkernels.planning.planner import DRAWN_ROUNDS, Costs, Planner
from fedkernels.planning.table import plan, scales
from fedkernels.train import build

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
COSTS = Costs(round_s=0.5, client_s=0.25, step_s=0.125)
SMALL = {"model": "mlp", "cohort": 6, "local_steps": 2, "evaluator": "loop", "run_dir": "unused"}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("name", "reduction"),
    [("fedavg", "fast"), ("scaffold", "fast"), ("fedmuon", "exact"), ("fedbcgd", "fast"), ("fedbcgd", "exact")],
)
def test_bytes_are_those_that_ranks_count(name: str, reduction: str, ranks: int) -> None:
    """Bucket, blocks among their holders, and client state that moves: over as many rounds as the plan draws."""
    overrides = {**SMALL, "rounds": DRAWN_ROUNDS, "reduction": reduction}
    counted = on_ranks(ranks, planned_rounds, str(CONFIGS / "digits" / f"{name}.yaml"), overrides)[0]
    config = load(CONFIGS / "digits" / f"{name}.yaml", overrides)
    predicted = Planner(config, config.data.load()).predict(ranks, COSTS, Network())
    for key in ("link_bytes", "protocol_up_bytes", "protocol_down_bytes"):
        assert getattr(predicted, key) == pytest.approx(sum(row[key] for row in counted) / len(counted), rel=1e-12)


def test_private_rounds_send_a_norm_for_every_client() -> None:
    """Their cohorts are secret, so that the bytes besides are compared."""
    overrides = {**SMALL, "rounds": 3, "privacy.target_epsilon": None}
    path = CONFIGS / "digits/dp_fedavg.yaml"
    counted = on_ranks(2, planned_rounds, str(path), overrides)[0]
    config = load(path, overrides)
    predicted = Planner(config, config.data.load()).predict(2, COSTS, Network())
    besides = {row["link_bytes"] - 2 * 8 * row["cohort"] for row in counted}
    assert besides == {round(predicted.link_bytes - 2 * 8 * predicted.cohort)}


def test_a_round_is_the_slowest_rank_and_the_reduction() -> None:
    """Six equal clients of two steps on four ranks: two ranks train two of them."""
    config = load(CONFIGS / "digits/fedavg.yaml", {**SMALL, "partition": "iid"})
    network = Network(ranks_per_node=1, link_gb_s=1e-3, latency_us=0.0)
    planner = Planner(config, config.data.load())
    one, four = (planner.predict(ranks, COSTS, network) for ranks in (1, 4))
    assert one.train_s == pytest.approx(6 * (0.25 + 2 * 0.125))
    assert one.round_s == pytest.approx(0.5 + one.train_s)
    assert four.train_s == pytest.approx(2 * (0.25 + 2 * 0.125))
    bucket = four.link_bytes / 6  # a ring of four moves 2 (4 − 1) buckets
    assert four.reduce_s == pytest.approx(2 * 3 / 4 * bucket / 1e6)
    assert four.efficiency == pytest.approx(one.train_s / (4 * four.round_s))
    grown = planner.predict(100, COSTS, network, clients_per_rank=3)
    assert grown.cohort == 300
    assert grown.train_s == pytest.approx(3 * (0.25 + 2 * 0.125))
    with pytest.raises(ValueError, match="7 ranks for a cohort of 6"):
        planner.predict(7, COSTS, network)


@pytest.mark.parametrize(
    ("ranks", "expected"), [(1, 0.0), (4, 1.5 / 50), (32, 1.75 / 50 + 1.5 / 10), (64, 1.75 / 50 + 1.75 / 10)]
)
def test_nccl_s_all_reduce_is_a_ring_inside_and_across(ranks: int, expected: float) -> None:
    network = Network(ranks_per_node=8, node_gb_s=50, link_gb_s=10, latency_us=0)
    assert network.all_reduce_s(1e9, ranks, backend="nccl") == pytest.approx(expected)


def test_many_ranks_of_nccl_reduce_small_buckets_by_a_tree() -> None:
    network = Network(ranks_per_node=1, latency_us=10)
    assert network.all_reduce_s(0, 1024, backend="nccl") == pytest.approx(2 * 10 * 10e-6)
    assert network.all_reduce_s(0, 1024) == pytest.approx(2 * 1023 * 10e-6)


LEVELS = Network(ranks_per_node=8, node_gb_s=50, link_gb_s=10, latency_us=100)


@pytest.mark.parametrize(("ranks", "gb_s"), [(1, 50), (4, 50), (8, 50), (16, 10), (64, 10)])
def test_gloo_s_flat_all_reduce_is_a_ring_as_slow_as_its_slowest_link(ranks: int, gb_s: float) -> None:
    expected = 2 * (ranks - 1) * (100e-6 + 1e9 / ranks / (1e9 * gb_s))
    assert LEVELS.all_reduce_s(1e9, ranks) == pytest.approx(expected)
    slow_inside = replace(LEVELS, node_gb_s=5)
    assert slow_inside.all_reduce_s(1e9, ranks) == pytest.approx(2 * (ranks - 1) * (100e-6 + 1 / ranks / 5))


@pytest.mark.parametrize("n_bytes", [1e4, 1e9])
@pytest.mark.parametrize("nodes", [2, 8, 128])
def test_a_hierarchical_all_reduce_is_two_exchanges_and_a_ring_of_nodes(nodes: int, n_bytes: float) -> None:
    """By NCCL a tree of nodes, where that is faster."""
    inside = 2 * (100e-6 + 7 / 8 * n_bytes / 50e9)
    ring = 2 * (nodes - 1) * (100e-6 + n_bytes / nodes / 10e9)
    tree = 2 * (nodes - 1).bit_length() * (100e-6 + n_bytes / 10e9)
    assert LEVELS.all_reduce_s(n_bytes, 8 * nodes, "hierarchical") == pytest.approx(inside + ring)
    found = LEVELS.all_reduce_s(n_bytes, 8 * nodes, "hierarchical", "nccl")
    assert found == pytest.approx(inside + min(ring, tree))


@pytest.mark.parametrize(("ranks_per_node", "ranks"), [(8, 8), (8, 3), (1, 4)])
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_with_one_level_it_is_flat(ranks_per_node: int, ranks: int, backend: Any) -> None:
    network = replace(LEVELS, ranks_per_node=ranks_per_node)
    assert network.all_reduce_s(1e9, ranks, "hierarchical", backend) == network.all_reduce_s(
        1e9, ranks, "flat", backend
    )


@pytest.mark.parametrize("all_reduce", ["flat", "hierarchical"])
def test_the_plan_follows_the_setting(all_reduce: Any) -> None:
    config = load(CONFIGS / "digits/fedavg.yaml", {**SMALL, "all_reduce": all_reduce})
    network = Network(ranks_per_node=2, node_gb_s=1e-2, link_gb_s=1e-3, latency_us=1000)
    four = Planner(config, config.data.load()).predict(4, COSTS, network)
    assert four.reduce_s == pytest.approx(network.all_reduce_s(four.link_bytes / 6, 4, all_reduce))


def test_what_is_measured_predicts_what_is_measured() -> None:
    """Costs that explain made-up rounds exactly are found again."""
    config = load(CONFIGS / "digits/fedavg.yaml", SMALL)
    planner = Planner(config, config.data.load())
    costs = planner.measure(budget_s=0.5)
    assert min(costs.round_s, costs.client_s, costs.step_s) >= 0
    assert costs.round_s + costs.client_s + costs.step_s > 0
    assert planner.memory_bytes(1)["server"] == 4 * planner.layout.d


def test_memory_is_that_of_a_round_of_several_batches() -> None:
    """And where uploads are taken in meanwhile, of one more: d numbers of float32."""
    overrides = {**SMALL, "clients_per_batch": 1, "cohort": 4}
    peaks = {}
    for overlap in ("never", "auto"):
        config = load(CONFIGS / "digits/fedavg.yaml", overrides | {"overlap": overlap})
        planner = Planner(config, config.data.load())
        peaks[overlap] = planner.memory_bytes(1)["training"]
    engine, _, _ = build(replace(config, overlap="never", local_steps=1, evaluator="loop"), Collectives())
    with TensorPeak() as memory:
        engine.run_round()
    assert memory.peak_bytes == pytest.approx(peaks["never"], rel=0.02)
    assert peaks["auto"] - peaks["never"] == 4 * planner.layout.d


def test_memory_of_kept_state_is_shared_out() -> None:
    config = load(CONFIGS / "digits/scaffold.yaml", SMALL)
    planner = Planner(config, config.data.load())
    kept = [planner.memory_bytes(ranks)["clients"] for ranks in (1, 4)]
    assert kept == [4 * planner.layout.d * -(-config.clients // ranks) for ranks in (1, 4)]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dataset that is not here is planned by its published shapes, and an earlier plan's costs are taken."""
    (tmp_path / "p.json").write_text(json.dumps({"costs": {"round_s": 0.1, "client_s": 0.0, "step_s": 0.02}}))
    out = tmp_path / "folder" / "plan.json"
    arguments = ["--model", "lenet5", "--local_steps", "1", "--measured", str(tmp_path / "p.json"), "--out", str(out)]
    config = ["--config", str(CONFIGS / "cifar100/fedmuon.yaml")]
    assert main(["plan", *config, "--ranks", "1024", "--clients_per_rank", "2", *arguments]) == 0
    said = capsys.readouterr().out
    assert "published numbers" in said
    assert "more than 10 ranks would leave some without a client" in said
    assert "flat all-reduce by " in said
    assert "2 client(s) a rank:" in said
    plan = json.loads(out.read_text())
    assert [row["ranks"] for row in plan["predictions"]] == [1, 2, 4, 8]
    assert plan["predictions_grown"][-1]["cohort"] == 2048
    assert main(["plan", *config, "--ranks", "32", *arguments]) == 0
    assert "1 client(s) a rank:" in capsys.readouterr().out
    assert [row["cohort"] for row in json.loads(out.read_text())["predictions_grown"]] == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0"], "ranks: 0, expected at least 1"),
        (["--ranks", "4", "--sharding", "ddp", "--shard_size", "2"], "sharding: ddp"),
        (["--ranks", "4", "--link_gb_s", "-1"], "link_gb_s: -1"),
        (["--ranks", "12", "--all_reduce", "hierarchical"], "ranks: 12, expected a multiple of ranks_per_node: 8"),
        (["--ranks", "4", "--measured", "README.md"], "README.md: not a plan"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", str(CONFIGS / "digits/fedavg.yaml"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_nodes_are_filled_for_sums_in_levels(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"costs": {"round_s": 0.1, "client_s": 0.0, "step_s": 0.02}}))
    config = load(CONFIGS / "digits/fedavg.yaml", {**SMALL, "all_reduce": "hierarchical"})
    out = tmp_path / "plan.json"
    plan(config, Network(ranks_per_node=3), 6, 1, tmp_path / "p.json", out)
    for key in ("predictions", "predictions_grown"):
        assert [row["ranks"] for row in json.loads(out.read_text())[key]] == [1, 2, 6]


def test_scales() -> None:
    assert scales(1) == [1]
    assert scales(8) == [1, 2, 4, 8]
    assert scales(1000)[-2:] == [512, 1000]


def test_costs_scale() -> None:
    assert replace(COSTS, client_s=0.0).batch_s([1, 4]) == 2 * 4 * 0.125
