"""The plan of a run: what was measured here, and a line for every number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

from ..config import Config, ConfigError, make
from ..data.datasets import Dataset
from ..metrics import environment
from ..train import load_data
from .network import Network
from .planner import Costs, Planner, Prediction


def plan(
    config: Config,
    network: Network,
    ranks: int,
    clients_per_rank: int | None = None,
    measured: Path | None = None,
    out: Path | None = None,
) -> str:
    """Predict a configuration on 1, 2, 4, … and `ranks` ranks.

    Args:
        config: of the run, on one process.
        network: between ranks.
        ranks: the most.
        clients_per_rank: let the cohort grow with the ranks; None keeps it, and for more ranks than it has clients
            takes one each.
        measured: an earlier `out`, whose costs are taken instead of timing rounds here.
        out: a JSON file to write.

    Raises:
        ConfigError: ranks or clients that are no counts, ranks that do not fill nodes for a hierarchical all-reduce, or
            a `measured` file that is none.
        ValueError, FileNotFoundError: as `train.build`.
    """
    for name, value in (("ranks", ranks), ("clients_per_rank", clients_per_rank)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: {value}, expected at least 1")
    if config.sharding != "none":
        raise ConfigError(f"sharding: {config.sharding}, but a plan is of clients on one rank each; expected none")
    per_node = network.ranks_per_node
    if config.all_reduce == "hierarchical" and ranks > per_node and ranks % per_node:
        raise ConfigError(
            f"ranks: {ranks}, expected a multiple of ranks_per_node: {per_node} with all_reduce: hierarchical"
        )
    if config.drop_slowest is not None:
        raise ConfigError("drop_slowest: a plan is of rounds that wait for all clients; expected null")
    earlier = None if measured is None else _read_costs(measured)
    data, notes = _data(config)
    planner = Planner(config, data)
    costs = earlier or planner.measure()
    tried = scales(ranks)
    if config.all_reduce == "hierarchical":
        tried = [n for n in tried if n <= per_node or n % per_node == 0]
    fixed = [n for n in tried if n <= config.cohort]
    predictions = [planner.predict(n, costs, network) for n in fixed]
    if clients_per_rank is None and ranks > config.cohort:
        clients_per_rank = 1
    grown = [] if clients_per_rank is None else tried
    weak = [planner.predict(n, costs, network, clients_per_rank=clients_per_rank) for n in grown]
    memory = planner.memory_bytes(ranks)
    choice = planner.choice
    lines = [
        *notes,
        f"{planner.layout.d:,} parameters; evaluator {choice.evaluator}, {choice.clients_per_batch} client(s) at once",
        f"{'measured here' if measured is None else f'from {measured}'}: {1e3 * costs.round_s:.3g} ms a round, "
        f"{1e3 * costs.client_s:.3g} ms a client, {1e3 * costs.step_s:.3g} ms a local step",
        f"network: {network.ranks_per_node} ranks a node, {network.node_gb_s:g} GB/s inside, "
        f"{network.link_gb_s:g} GB/s across, {network.latency_us:g} µs; {config.all_reduce} all-reduce by "
        f"{planner.backend}",
        f"memory of a rank: server vectors {_bytes(memory['server'])}, at most {_bytes(memory['training'])} more while "
        f"clients train" + (f", {_bytes(memory['clients'])} kept for clients seen" if memory["clients"] else ""),
        "",
        f"cohort {config.cohort}, as configured:",
        *_table(predictions),
    ]
    if ranks > config.cohort:
        lines.append(
            f"more than {config.cohort} ranks would leave some without a client; below the cohort grows with them, as "
            "--clients_per_rank says"
        )
    if weak:
        lines += ["", f"{clients_per_rank} client(s) a rank:", *_table(weak)]
    lines.append("rounds are without evaluation and checkpoints")
    if out is not None:
        content = {
            "costs": asdict(costs),
            "network": asdict(network),
            "memory_bytes": memory,
            "predictions": [asdict(p) for p in predictions],
            "clients_per_rank": clients_per_rank,
            "predictions_grown": [asdict(p) for p in weak],
            "environment": environment(),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=1) + "\n")
        lines.append(f"plan: {out}")
    return "\n".join(lines)


def scales(ranks: int) -> list[int]:
    """1, 2, 4, … and `ranks` itself.

    Example:
        >>> scales(6)
        [1, 2, 4, 6]
    """
    return sorted({2**n for n in range(ranks.bit_length()) if 2**n <= ranks} | {ranks})


def _data(config: Config) -> tuple[Dataset, list[str]]:
    """The dataset, or where its files are not here, one of the published shapes."""
    blank: Callable[[], Dataset] | None = getattr(config.data, "blank", None)
    try:
        return load_data(config), []
    except FileNotFoundError as error:
        if blank is None:
            raise
        return blank(), [f"{error}; planned with black images of the published numbers and shapes"]


def _read_costs(path: Path) -> Costs:
    try:
        content = json.loads(path.read_text())
        return make(Costs, content["costs"])
    except (ValueError, KeyError, TypeError) as error:
        names = ", ".join(field.name for field in fields(Costs))
        raise ConfigError(f"{path}: not a plan, expected JSON with costs of {names}: {error}") from None


def _table(predictions: list[Prediction]) -> list[str]:
    columns = ["ranks", "cohort", "round", "train", "reduce", "busy", "faster", "link bytes", "bytes up", "bytes down"]
    rows = [columns]
    for p in predictions:
        per_client = p.round_s / p.cohort if p.cohort else 0.0
        first = predictions[0].round_s / predictions[0].cohort if predictions[0].cohort else 0.0
        rows.append([
            str(p.ranks), f"{p.cohort:g}", _seconds(p.round_s), _seconds(p.train_s), _seconds(p.reduce_s),
            f"{p.efficiency:.0%}", f"{first / per_client:.3g}x" if per_client else "-", _bytes(p.link_bytes),
            _bytes(p.protocol_up_bytes), _bytes(p.protocol_down_bytes),
        ])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError
