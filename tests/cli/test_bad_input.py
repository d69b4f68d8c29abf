"""Bad input and bad luck: one clear line on standard error, an exit status that is not 0, and nothing lost."""

from __future__ import annotations

import os
import pickle
import re
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cli.small_runs import Runs
from PIL import Image
from support import on_ranks

from fedkernels.checkpoint import CheckpointError
from fedkernels.cli import main
from fedkernels.config import load
from fedkernels.data.datasets import Digits
from fedkernels.federated import attempt
from fedkernels.federated.collectives import Collectives
from fedkernels.train import train

pytestmark = pytest.mark.usefixtures("no_report")

SAMPLES = len(Digits().load().labels)


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Writes beyond `n_bytes` of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# Configurations


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--cohrt", "3"], "cohrt: unknown key; did you mean 'cohort'?"),
        (["--algorithm.server_rl", "3"], "algorithm.server_rl: unknown key; did you mean 'server_lr'?"),
        (["--algorithm", "fedmoun"], "algorithm: unknown name 'fedmoun'; did you mean 'fedmuon'?"),
        (["--model", "lenet5", "--model.width", "0"], "model.width: 0, expected int >= 1 ("),
        (["--model", "vit", "--model.depth", "-1"], "model.depth: -1, expected int >= 1 ("),
        (["--model.hidden", "[8, 0]"], "model.hidden: [8, 0], expected"),
        (["--rounds", "many"], "rounds: 'many', expected int >= 1 ("),
        (["--lr", "-0.1"], "lr: -0.1, expected float > 0"),
        (["--lr"], "--lr: expected a value after it"),
        (["--cohort", "9"], "cohort: 9 is more than the number of clients, 8"),
        (["--local_steps", "null"], "local_steps: missing; "),
        (["--data.test_fraction", "2"], "data.test_fraction: 2, expected float > 0 and < 1 ("),
        (["--data", "{name: synthetic, seed: -1}"], "data.seed: -1, expected int >= 0 ("),
        (["--partition.alpha", "-1"], "partition.alpha: -1, expected float > 0 and < inf ("),
        (
            ["--algorithm.local.momentum", "5"],
            "algorithm.local.momentum: 5, expected float >= 0 and < 1 (",
        ),
        (
            ["--algorithm", "fedmuon", "--model.hidden", "[]"],
            "Muon needs hidden weight matrices, and this model",
        ),
        (["--partition", "natural"], "a natural partition needs a dataset with natural clients"),
        (["--model", "gpt2"], "gpt2 takes language or text of shape (length,), not image"),
        (["--device", "cuda"], "device: cuda was asked for, but torch sees no GPU"),
    ],
)
def test_what_a_configuration_cannot_say(
    runs: Runs, overrides: list[str], message: str, error_line: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runs.train("a", *overrides) == 2
    assert error_line().startswith(message)
    assert not (runs / "a").exists()


def test_a_model_whose_package_is_not_installed(
    runs: Runs, error_line: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert runs.train("a", "--model", "vit") == 2
    assert error_line() == "model: vit needs the transformers package: pip install 'fedkernels[hf]'"
    assert not (runs / "a").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: [1\nrounds: {", r"not valid YAML: .* line 2"),
        ("- lr", r"expected a mapping of keys, found list"),
    ],
)
def test_what_is_no_configuration(runs: Runs, text: str, said: str, error_line: Callable[[], str]) -> None:
    path = runs.write_config(text)
    assert runs.train("a") == 2
    assert re.match(f"{re.escape(str(path))}: {said}", error_line())


def test_no_configuration(runs: Runs, error_line: Callable[[], str]) -> None:
    assert main(["train"]) == 2
    assert error_line() == "config: missing; give --config FILE, or --resume --run_dir RUN"
    assert main(["train", "--resume", "--run_dir", str(runs / "nowhere")]) == 2
    assert str(runs / "nowhere") in error_line()
    runs.config.unlink()
    assert runs.train("a") == 2
    assert str(runs.config) in error_line()


@pytest.mark.parametrize("command", ["train", "partition"])
def test_a_client_without_a_sample(runs: Runs, command: str, error_line: Callable[[], str], tmp_path: Path) -> None:
    arguments = [command, "--config", str(runs.config), "--run_dir", str(runs / "a")]
    if command == "partition":
        arguments += ["--out", str(tmp_path / "split.png")]
    clients = SAMPLES + 62
    assert main([*arguments, "--partition", "iid", "--clients", str(clients)]) == 2
    expected = f"client {SAMPLES} is left with no sample: {SAMPLES} samples for {clients} clients, 62 of them empty"
    assert error_line() == expected


# Datasets


def cifar(folder: Path) -> None:
    for name, content in (("meta", {b"fine_label_names": [b"a", b"b"]}), ("train", {}), ("test", {})):
        images = {b"data": torch.zeros(4, 3072, dtype=torch.uint8).numpy(), b"fine_labels": [0, 1, 0, 1]}
        (folder / name).write_bytes(pickle.dumps(content or images, protocol=2))


def tiny_imagenet(folder: Path) -> None:
    (folder / "wnids.txt").write_text("n01\nn02\n")
    (folder / "val" / "images").mkdir(parents=True)
    files = [folder / "val" / "images" / f"val_{i}.JPEG" for i in range(2)]
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\nval_1.JPEG\tn02\n")
    for wnid in ("n01", "n02"):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        files += [folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG" for i in range(2)]
    for file in files:
        Image.new("RGB", (64, 64)).save(file)


def glue(folder: Path) -> None:
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text("sentence\tlabel\n" + "a fine film\t1\nthe worst of its kind\t0\n" * 4)


DATASETS: dict[str, tuple[Callable[[Path], None], str]] = {
    "cifar100": (cifar, "train"),
    "tiny_imagenet": (tiny_imagenet, "train/n02/images/n02_1.JPEG"),
    "glue": (glue, "dev.tsv"),
}


@pytest.mark.parametrize("damage", ["whole", "truncated", "missing", "no folder"])
@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_file_that_is_missing_or_truncated(
    runs: Runs, name: str, damage: str, error_line: Callable[[], str]
) -> None:
    write, part = DATASETS[name]
    folder = runs / "data"
    folder.mkdir()
    write(folder)
    file = folder / part
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-12])
    elif damage == "missing":
        file.unlink()
    elif damage == "no folder":
        shutil.rmtree(folder)
    keys = ["--data", f"{{name: {name}, path: {folder}}}", "--partition", "iid", "--clients", "2", "--cohort", "1"]
    if damage == "whole":
        split = ["partition", "--config", str(runs.config), "--run_dir", "unused", "--out", str(runs / "split.png")]
        assert main([*split, *keys]) == 0
        return
    assert runs.train("a", *keys) == 2
    # A class that lacks an image is told by its folder.
    shown = {"no folder": folder, "missing": file.parent}.get(damage, file)
    assert error_line().startswith(str(shown))
    assert not (runs / "a").exists()


# Run folders


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(runs: Runs, error_line: Callable[[], str]) -> None:
    assert runs.train("a", "--rounds", "2") == 0
    before = snapshot(runs / "a")
    assert runs.train("a", "--rounds", "4") == 2
    expected = f"run_dir: {runs / 'a'} already holds a run; continue it with --resume or choose another name"
    assert error_line() == expected
    assert snapshot(runs / "a") == before
    assert runs.train("a", "--rounds", "4", "--resume") == 0
    assert runs.train("b", "--rounds", "4") == 0
    runs.assert_same("a", "b")


@pytest.mark.parametrize("part", ["config.yaml", "metrics.jsonl", "checkpoints"])
def test_part_of_a_run_is_a_run(runs: Runs, part: str, error_line: Callable[[], str]) -> None:
    (runs / "a").mkdir()
    (runs / "a" / part).touch()
    assert runs.train("a") == 2
    assert "already holds a run" in error_line()


def test_other_files_are_no_run(runs: Runs) -> None:
    (runs / "a").mkdir()
    (runs / "a" / "notes.txt").write_text("mine")
    assert runs.train("a", "--rounds", "1") == 0
    assert (runs / "a" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_written(runs: Runs, place: str, error_line: Callable[[], str]) -> None:
    (runs / "file").write_text("not a folder")
    assert runs.train(place) == 2
    assert error_line().startswith(f"run_dir: cannot write to {runs / place}: ")
    assert (runs / "file").read_text() == "not a folder"


# A full disk


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(runs: Runs, error_line: Callable[[], str]) -> None:
    assert runs.train("a", "--rounds", "1") == 0
    before = snapshot(runs / "a" / "checkpoints")
    # Client state grows with every client that is seen for the first time, and the server's does not.
    limit = (runs / "a" / "checkpoints" / "round-000001" / "clients-0-0.safetensors").stat().st_size + 100
    with largest_file(limit):
        assert runs.train("a", "--checkpoint_every", "1", "--rounds", "6", "--resume") == 1
    message = error_line()
    assert re.match(rf"rank 0 cannot write checkpoint {runs / 'a'}/checkpoints/round-000002: .*too large", message)
    assert message.endswith("earlier checkpoints are untouched")
    assert snapshot(runs / "a" / "checkpoints") == before
    assert runs.checkpoints("a") == ["round-000001"]
    assert runs.train("a", "--checkpoint_every", "1", "--rounds", "6", "--resume") == 0
    assert runs.train("b", "--checkpoint_every", "1", "--rounds", "6") == 0
    runs.assert_same("a", "b")


# Clients that send NaN or infinity


def diverging(batch_size: int) -> list[str]:
    """One step of this size stays finite, a second one cannot."""
    keys = {
        "algorithm": "fedavg", "lr": 1e38, "clip_norm": ".inf", "cohort": 8, "local_steps": "null", "local_epochs": 1,
        "batch_size": batch_size, "checkpoint_every": 1,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in keys.items()]


@pytest.mark.parametrize("on_nonfinite", ["error", "drop_client"])
def test_clients_that_send_nan_are_named_or_dropped(
    runs: Runs, on_nonfinite: str, error_line: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(runs.config, {"run_dir": "unused"})
    sizes = config.partition.split(Digits().load().labels.numpy(), None, config.clients, config.seed).sizes
    batch_size = int(sorted(sizes)[3])
    # Those that fit in one batch take one step.
    bad = [i for i, size in enumerate(sizes) if size > batch_size]
    assert len(bad) == 4
    status = runs.train("a", *diverging(batch_size), "--rounds", "1", "--on_nonfinite", on_nonfinite)
    if on_nonfinite == "error":
        assert status == 1
        named = sorted(error_line().split("; "))
        assert named == [f"client {i} sent NaN or infinity in round 1" for i in bad]
        assert runs.rows("a") == []
    else:
        assert status == 0
        (row,) = runs.rows("a")
        assert (row["dropped"], row["cohort"]) == (4, 4)
        told = [line for line in capsys.readouterr().out.splitlines() if "NaN" in line]
        assert sorted(told) == [f"client {i} sent NaN or infinity in round 1: left out" for i in bad]
        assert all(torch.isfinite(value).all() for value in runs.weights("a").values())


@pytest.mark.parametrize("on_nonfinite", ["error", "drop_client"])
def test_a_round_without_a_finite_client_changes_nothing(
    runs: Runs, on_nonfinite: str, error_line: Callable[[], str]
) -> None:
    keys = [*diverging(SAMPLES), "--on_nonfinite", on_nonfinite]
    assert runs.train("one", *keys, "--rounds", "1") == 0
    status = runs.train("a", *keys, "--rounds", "2")
    if on_nonfinite == "error":
        assert status == 1
        assert sorted(error_line().split("; ")) == [f"client {i} sent NaN or infinity in round 2" for i in range(8)]
        assert runs.checkpoints("a") == ["round-000001"]
    else:
        assert status == 0
        assert [(row["dropped"], row["cohort"]) for row in runs.rows("a")] == [(0, 8), (8, 0)]
        assert runs.rows("a")[1]["train_loss"] is None
        assert all(torch.equal(value, runs.weights("a")[name]) for name, value in runs.weights("one").items())


# Several ranks


def test_more_ranks_than_clients_in_a_round(runs: Runs) -> None:
    launcher = runs.start_torchrun("a", "--cohort", "1")
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    told = [line for line in err.splitlines() if line.startswith("fedkernels: error: ")]
    assert told == ["fedkernels: error: 2 ranks for a cohort of 1: some would have no client; start fewer ranks"]
    # What torchrun adds says how its ranks ended; none of them shows code of ours.
    assert re.search(r"exitcode +: 2 ", err)
    assert "fedkernels/" not in err
    assert out == ""
    assert not (runs / "a").exists()


def test_ranks_that_fail_alike_speak_once(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, is_master=True)
    for key, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(key, value)
    told = []
    monkeypatch.setattr(attempt, "_met", [])
    for rank, restarts in ((1, 0), (0, 0), (0, 1), (1, 1)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        assert runs.train("a", "--lr", "-1") == 2
        told.append(capsys.readouterr().err.count("fedkernels: error: lr: -1, expected float > 0"))
    assert told == [1, 0, 1, 0]
    assert runs.train("a", "--lr", "-2") == 2
    assert "lr: -2" in capsys.readouterr().err, "other words than those of another rank"
    del store
    monkeypatch.delenv("MASTER_PORT")
    assert runs.train("a", "--lr", "-1") == 2
    assert "lr: -1" in capsys.readouterr().err


def test_ranks_that_have_met_speak_once_in_every_attempt(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever their agents count: one counts a failure, another a node that came."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, is_master=True)
    for key, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(key, value)
    told = []
    for name, restarts in (("a", 0), ("a", 1), ("b", 0), ("b", 2), ("c", 2)):
        monkeypatch.setattr(attempt, "_met", [name])
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        assert runs.train("a", "--lr", "-1") == 2
        told.append(capsys.readouterr().err.count("fedkernels: error: lr: -1, expected float > 0"))
    assert told == [1, 0, 1, 0, 1]
    del store


def _fail_on_rank_1(collectives: Collectives, config: Path, folder: Path) -> list[str]:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    told = []
    overrides: dict[str, Any] = {"run_dir": str(folder / "a"), "rounds": 1}
    if collectives.rank == 1:
        overrides |= {"data": {"name": "glue", "path": "nowhere"}}
    with pytest.raises(FileNotFoundError) as missing:
        train(load(config, overrides))
    told.append(str(missing.value))
    with largest_file(1000 if collectives.rank == 1 else 10**6), pytest.raises(CheckpointError) as full:
        train(load(config, {"run_dir": str(folder / "b"), "rounds": 1}))
    told.append(str(full.value))
    return told


def test_what_fails_on_one_rank_ends_all_with_its_words(runs: Runs) -> None:
    one, other = on_ranks(2, _fail_on_rank_1, runs.config, runs.folder)
    assert one == other
    assert one[0].startswith("nowhere: expected the file train.tsv")
    assert one[1].startswith(f"rank 1 cannot write checkpoint {runs / 'b'}/checkpoints/round-000001: ")
    assert not (runs / "a").exists()
    assert runs.checkpoints("b") == []
