"""The run folder: every file that a finished run leaves, read by the tools that will read it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from cli.small_runs import TIMED, Runs
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedkernels.cli import main
from fedkernels.config import load
from fedkernels.data.datasets import Digits
from fedkernels.run_folder import load_model
from fedkernels.train import train

FIELDS = {
    "round", "time_s", "lr", "train_loss", "test_loss", "test_accuracy", "protocol_up_bytes", "protocol_down_bytes",
    "link_bytes", "clients_per_s", "rank_idle",
}  # fmt: skip
ROUNDS = 5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A finished run called `a`, evaluated every second round; what it printed is in `printed`."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    arguments = ["--rounds", str(ROUNDS), "--eval_every", "2", "--schedule", "cosine", "--keep_checkpoints", "3"]
    printed = runs / "printed"
    # A plain file in place of a terminal.
    with printed.open("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", file)
        assert runs.train("a", *arguments) == 0
    return runs


def test_nothing_but_the_promised_files(run: Runs) -> None:
    # In a checkout with changes there is a code-HASH.diff, too.
    assert {path.name for path in (run / "a").iterdir() if path.suffix != ".diff"} == {
        "config.yaml", "metrics.jsonl", "checkpoints", "report.html", "tensorboard", "model.safetensors", "model.json",
        "partition.json", "environment.json", "launches.jsonl", "resubmit.sh",
    }  # fmt: skip


def test_the_configuration_is_resolved_and_reads_back(run: Runs) -> None:
    plain = yaml.safe_load((run / "a" / "config.yaml").read_text())
    assert plain["algorithm"] == {
        "name": "scaffold",
        "local": {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0},
        "server_lr": 1.0,
    }
    assert plain["clip_norm"] == 10.0
    overrides = {"run_dir": str(run / "a"), "rounds": ROUNDS, "eval_every": 2, "schedule": "cosine"}
    assert load(run / "a" / "config.yaml", {}) == load(run.config, overrides | {"keep_checkpoints": 3})


def test_every_row_has_the_promised_fields(run: Runs) -> None:
    rows = run.rows("a")
    assert [row["round"] for row in rows] == list(range(1, ROUNDS + 1))
    assert all(row.keys() >= FIELDS for row in rows)
    # Every second round and the last one are evaluated.
    assert [row["test_loss"] is not None for row in rows] == [False, True, False, True, True]
    assert [row["test_accuracy"] is not None for row in rows] == [False, True, False, True, True]
    times = [row["time_s"] for row in rows]
    assert times == sorted(times)
    assert times[0] > 0
    expected = [0.1 / 2 * (1 + np.cos(np.pi * r / ROUNDS)) for r in range(ROUNDS)]
    np.testing.assert_allclose([row["lr"] for row in rows], expected, rtol=1e-12, atol=0)
    # SCAFFOLD: two float32 vectors each way, for four clients; one rank needs no link.
    d = 64 * 8 + 8 + 8 * 10 + 10
    assert {(row["protocol_up_bytes"], row["protocol_down_bytes"]) for row in rows} == {(4 * 2 * d * 4,) * 2}
    assert {(row["link_bytes"], row["rank_idle"], row["dropped"]) for row in rows} == {(0, 0, 0)}


def test_tensorboard_holds_the_same_numbers(run: Runs) -> None:
    events = EventAccumulator(str(run / "a" / "tensorboard"))
    events.Reload()
    for field in FIELDS - {"round"}:
        told = [(row["round"], row[field]) for row in run.rows("a") if row[field] is not None]
        read = [(event.step, event.value) for event in events.Scalars(field)]
        np.testing.assert_allclose(read, told, rtol=1e-6, atol=1e-6)


def test_the_page_loads_nothing_from_anywhere(run: Runs) -> None:
    page = (run / "a" / "report.html").read_text()
    assert "<svg" in page
    # A link may be followed; a resource would be fetched.
    assert not re.search(r"""(?:src|srcset|data|poster)\s*=\s*["']?\s*(?:https?:)?//""", page, re.IGNORECASE)
    assert not re.search(r"<link|<script[^>]+src|@import|url\(\s*[\"']?(?:https?:)?//", page, re.IGNORECASE)


def test_the_model_is_the_last_server_x(run: Runs) -> None:
    model = load_model(run / "a")
    saved = run.weights("a")
    assert {name: tuple(value.shape) for name, value in saved.items()} == {
        "layers.0.weight": (8, 64), "layers.0.bias": (8,), "head.weight": (10, 8), "head.bias": (10,),
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name])
    x = load_file(run / "a" / "checkpoints" / f"round-{ROUNDS:06d}" / "server.safetensors")["x"]
    flat = torch.cat([value.flatten() for value in saved.values()])
    assert torch.equal(x.sort().values, flat.sort().values)
    assert not model.training


def test_the_model_needs_its_own_two_files_only(run: Runs, tmp_path: Path) -> None:
    for name in ("model.json", "model.safetensors"):
        shutil.copy(run / "a" / name, tmp_path)
    assert torch.equal(load_model(tmp_path).head.weight, run.weights("a")["head.weight"])


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_a_model_of_other_parameters_is_refused(run: Runs, tmp_path: Path, change: str) -> None:
    shutil.copy(run / "a" / "model.json", tmp_path)
    weights = run.weights("a")
    weights["other"] = weights.pop("head.bias") if change == "missing" else torch.zeros(2)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="differ in other" + (", head.bias" if change == "missing" else "")):
        load_model(tmp_path)


def test_a_model_of_another_shape_or_cut_short_is_refused(run: Runs, tmp_path: Path) -> None:
    shutil.copy(run / "a" / "model.json", tmp_path)
    save_file(run.weights("a") | {"head.bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"size mismatch for head\.bias"):
        load_model(tmp_path)
    content = (run / "a" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        load_model(tmp_path)


def test_others_may_read_the_model(run: Runs) -> None:
    assert (run / "a" / "model.safetensors").stat().st_mode == (run / "a" / "config.yaml").stat().st_mode


def test_the_model_scores_what_the_last_row_says(run: Runs) -> None:
    data, model = Digits().load(), load_model(run / "a").double()
    pixels = data.test_inputs.double() / 255
    mean, std = torch.tensor(data.mean).double(), torch.tensor(data.std).double()
    with torch.no_grad():
        logits = model((pixels - mean[:, None, None]) / std[:, None, None])
    last = run.rows("a")[-1]
    assert last["test_loss"] == pytest.approx(F.cross_entropy(logits, data.test_targets).item(), rel=1e-5, abs=0)
    assert last["test_accuracy"] == (logits.argmax(1) == data.test_targets).double().mean().item()


def test_the_partition_is_written_down(run: Runs) -> None:
    facts = json.loads((run / "a" / "partition.json").read_text())
    config, data = load(run / "a" / "config.yaml", {}), Digits().load()
    partition = config.partition.split(data.labels.numpy(), None, config.clients, config.seed)
    assert facts["clients"] == config.clients
    assert facts["samples"] == len(data.labels) == sum(map(sum, facts["histogram"]))
    for client, histogram in enumerate(facts["histogram"]):
        labels = data.labels[torch.from_numpy(partition[client])]
        assert histogram == torch.bincount(labels, minlength=10).tolist()


def test_the_environment_is_written_down(run: Runs) -> None:
    environment = json.loads((run / "a" / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["world_size"] == 1
    assert os.uname().nodename not in json.dumps(environment).split()


def test_checkpoints_come_when_due_and_at_the_end(run: Runs) -> None:
    assert run.checkpoints("a") == ["round-000002", "round-000004", "round-000005"]


def test_without_a_terminal_progress_is_plain_lines(run: Runs) -> None:
    text = (run / "printed").read_text()
    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert lines[0] == "1 rank on cpu, 610 parameters"
    assert lines[1].startswith("evaluator loop, 1 client(s) at once")
    shown = [int(match[1]) for line in lines if (match := re.match(rf"round +(\d+)/{ROUNDS} ", line))]
    assert {2, 4, 5} <= set(shown) <= set(range(1, ROUNDS + 1))
    assert lines[-1] == f"report: {run / 'a' / 'report.html'}"


@pytest.mark.usefixtures("no_report")
def test_only_the_newest_checkpoints_stay(runs: Runs) -> None:
    assert runs.train("a", "--checkpoint_every", "1", "--keep_checkpoints", "1") == 0
    assert runs.checkpoints("a") == ["round-000004"]


@pytest.mark.usefixtures("no_report")
def test_the_same_seed_gives_the_same_run_and_another_seed_another(runs: Runs) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert runs.train(name, "--rounds", "2", "--seed", seed) == 0
    runs.assert_same("a", "b")
    assert not torch.equal(runs.weights("a")["head.weight"], runs.weights("c")["head.weight"])


@pytest.mark.usefixtures("no_report")
def test_train_without_a_file_takes_all_keys_from_the_command_line(runs: Runs) -> None:
    keys = {
        "algorithm": "fedavg", "model": "{name: mlp, hidden: [4]}", "data": "digits", "partition": "iid",
        "run_dir": str(runs / "a"), "rounds": 1, "clients": 4, "cohort": 2, "local_epochs": 1, "batch_size": 50,
        "lr": 0.1, "device": "cpu",
    }  # fmt: skip
    assert main(["train", *(f"--{key}={value}" for key, value in keys.items())]) == 0
    assert runs.rows("a")[-1]["round"] == 1


@pytest.mark.usefixtures("no_report")
def test_train_can_be_called_from_a_program(runs: Runs, tmp_path: Path) -> None:
    outcome = train(load(runs.config, {"run_dir": str(tmp_path / "a"), "rounds": 2}))
    assert (outcome.run_dir, outcome.rounds, outcome.stopped_by) == (tmp_path / "a", 2, None)
    assert runs.train("b", "--rounds", "2") == 0
    runs.assert_same("a", "b")
    assert runs.rows("a")[0].keys() > TIMED
