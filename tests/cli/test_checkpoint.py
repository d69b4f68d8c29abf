"""Checkpoints: whole or absent, checked before use, and a resumed run equal to the last bit to an uninterrupted one."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from cli.small_runs import PRIVATE, Runs
from safetensors.torch import load_file

from fedkernels import checkpoint
from fedkernels.algorithms import ALGORITHMS
from fedkernels.cli import main
from fedkernels.federated.engine import Engine
from fedkernels.metrics import MetricsWriter

pytestmark = pytest.mark.usefixtures("no_report")


@contextmanager
def dying(owner: object, name: str, when: Callable[..., bool]) -> Iterator[None]:
    """End the run, with nothing tidied up, at the first call of a function that `when` says."""
    original = getattr(owner, name)

    def call(*arguments: object) -> object:
        if when(*arguments):
            raise KeyboardInterrupt
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield


def dying_in_round(r: int) -> object:
    return dying(Engine, "run_round", lambda engine: engine.round + 1 == r)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Finished runs `four` and `five`, of as many rounds, with checkpoints after every second one."""
    runs = Runs(tmp_path_factory.mktemp("made"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedkernels.report.write_report", lambda run_dirs, out: out)
        assert runs.train("four") == 0
        assert runs.train("five", "--rounds", "5") == 0
    return runs


@pytest.fixture
def copied(made: Runs, runs: Runs) -> Runs:
    """Copies of `four` and `five` that a test may change."""
    for name in ("four", "five"):
        shutil.copytree(made / name, runs / name)
    return runs


def newest(runs: Runs, name: str = "four") -> Path:
    return runs / name / "checkpoints" / runs.checkpoints(name)[-1]


# What is written


def test_every_file_is_named_with_its_checksum(made: Runs) -> None:
    assert made.checkpoints("four") == ["round-000002", "round-000004"]
    for round in (2, 4):
        folder = made / "four" / "checkpoints" / f"round-{round:06d}"
        content = (folder / "manifest.json").read_bytes()
        manifest = json.loads(content)
        assert manifest["round"] == round
        files = {path.name for path in folder.iterdir()}
        assert files == set(manifest["sha256"]) | {"manifest.json", "manifest.sha256"}
        for name, digest in manifest["sha256"].items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        assert hashlib.sha256(content).hexdigest() == (folder / "manifest.sha256").read_text()


def test_server_and_client_state_are_those_of_the_algorithm(made: Runs) -> None:
    folder = newest(made)
    d = sum(value.numel() for value in made.weights("four").values())
    server = load_file(folder / "server.safetensors")
    assert {name: tuple(value.shape) for name, value in server.items()} == {"x": (d,), "c": (d,)}
    clients = load_file(folder / "clients-0-0.safetensors")
    # SCAFFOLD's server variate is the mean of all clients' variates, those never asked being zero.
    mean = clients["rows"].double().sum(0) / 8
    torch.testing.assert_close(server["c"].double(), mean, rtol=1e-4, atol=1e-6)
    assert len(set(clients["ids"].tolist())) == len(clients["ids"]) <= 8


# Resuming


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_that_died_continues_to_the_last_bit(runs: Runs, algorithm: str, schedule: str) -> None:
    keys = ["--algorithm", algorithm, "--schedule", schedule, "--rounds", "5", "--model.hidden", "[8, 8, 8]"]
    keys += PRIVATE if algorithm.startswith("dp_") else []
    assert runs.train("whole", *keys) == 0
    with dying_in_round(4):
        assert runs.train("died", *keys) == 130
    assert runs.checkpoints("died")[-1] == "round-000002"
    assert [row["round"] for row in runs.rows("died")] == [1, 2, 3]
    assert runs.train("died", *keys, "--resume") == 0
    runs.assert_same("whole", "died")


@pytest.mark.parametrize(
    ("algorithm", "codec"),
    [
        ("fedavg", "topk"),
        ("fedbcgd", "{name: int8, error_feedback: true}"),
        ("scaffold", "{name: topk, fraction: 0.3}"),
        ("{name: fedmuon, momentum_rank: 0.5}", "int8"),
    ],
)
def test_what_error_feedback_keeps_survives(runs: Runs, algorithm: str, codec: str) -> None:
    keys = ["--algorithm", algorithm, "--codec", codec, "--rounds", "5", "--model.hidden", "[8, 8, 8]"]
    assert runs.train("whole", *keys) == 0
    with dying_in_round(4):
        assert runs.train("died", *keys) == 130
    assert runs.train("died", *keys, "--resume") == 0
    runs.assert_same("whole", "died")


def test_time_goes_on_where_the_checkpoint_left_it(copied: Runs) -> None:
    before = copied.rows("four")[-1]["time_s"]
    assert copied.train("four", "--rounds", "5", "--resume") == 0
    last = copied.rows("four")[-1]
    assert last["time_s"] > before + last["round_s"] * 0.99


def test_resume_finds_the_configuration_in_the_run_folder(copied: Runs) -> None:
    assert main(["train", "--resume", "--run_dir", str(copied / "four"), "--rounds=5"]) == 0
    copied.assert_same("four", "five")
    assert yaml.safe_load((copied / "four" / "config.yaml").read_text())["rounds"] == 5


def test_resume_of_a_finished_run_changes_nothing(runs: Runs) -> None:
    assert runs.train("a") == 0
    before = snapshot(runs / "a")
    assert runs.train("a", "--resume") == 0
    assert snapshot(runs / "a") == before


def test_resume_without_a_checkpoint_starts_over(copied: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    with dying_in_round(2):
        assert copied.train("died") == 130
    assert len(copied.rows("died")) == 1
    capsys.readouterr()
    assert copied.train("died", "--resume") == 0
    assert capsys.readouterr().out.startswith(f"no checkpoint in {copied / 'died' / 'checkpoints'}: starting from")
    copied.assert_same("four", "died")


def test_resume_in_the_folder_of_another_run_is_refused(copied: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copied / "four" / "checkpoints")
    before = snapshot(copied / "four")
    assert copied.train("four", "--resume", "--lr", "0.2", "--device=cpu") == 2
    assert "holds another run: lr was 0.1, now 0.2; choose another name" in capsys.readouterr().err
    assert snapshot(copied / "four") == before


def test_what_a_kill_left_half_written_is_removed(copied: Runs) -> None:
    part = copied / "four" / "checkpoints" / ".partial-round-000003"
    part.mkdir()
    (part / "clients-0-0.safetensors").write_bytes(b"half")
    assert copied.train("four", "--rounds", "5", "--resume") == 0
    assert not part.exists()


@pytest.mark.parametrize("at", [2, 4])
def test_metrics_that_cannot_be_written_end_the_run_after_a_checkpoint(
    runs: Runs, at: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = MetricsWriter.write

    def full_disk(writer: MetricsWriter, row: dict[str, float]) -> None:
        if row["round"] >= at:
            raise OSError(28, "No space left on device", "metrics.jsonl")
        write(writer, row)

    monkeypatch.setattr(MetricsWriter, "write", full_disk)
    assert runs.train("a", "--checkpoint_every", "100") == 1
    assert "No space left on device: 'metrics.jsonl'" in capsys.readouterr().err
    assert runs.checkpoints("a") == [f"round-{min(at + 1, 4):06d}"]


def test_a_torn_row_is_dropped(copied: Runs) -> None:
    with (copied / "four" / "metrics.jsonl").open("a") as file:
        file.write('{"round": 5, "time_s": 0.1')
    assert copied.train("four", "--rounds", "5", "--resume") == 0
    copied.assert_same("four", "five")


def test_kill_9_in_the_middle_of_a_run(runs: Runs) -> None:
    (process,) = runs.start("killed", "--rounds", "100000")
    runs.wait_for_rounds("killed", 5)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    rounds = str((runs / "killed" / "metrics.jsonl").read_bytes().count(b"\n") + 2)
    assert runs.train("killed", "--rounds", rounds, "--resume") == 0
    assert runs.train("whole", "--rounds", rounds) == 0
    runs.assert_same("whole", "killed")


def test_another_number_of_ranks(runs: Runs) -> None:
    def state_files() -> set[str]:
        return {path.name for path in newest(runs, "moved").glob("clients-*")}

    assert runs.train("whole", "--rounds", "6") == 0
    assert runs.train("moved", "--rounds", "2") == 0
    assert state_files() == {"clients-0-0.safetensors"}
    ranks = runs.start("moved", "--rounds", "4", "--resume", ranks=2)
    assert [process.wait(60) for process in ranks] == [0, 0]
    assert state_files() == {"clients-0-0.safetensors", "clients-1-0.safetensors"}
    assert runs.train("moved", "--rounds", "6", "--resume") == 0
    runs.assert_same("whole", "moved", ranks=True)


def test_client_state_in_mapped_pages_survives(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["--rounds", "5", "--clients", "12"]
    assert runs.train("memory", *keys) == 0
    monkeypatch.setattr("fedkernels.federated.store.PAGE_BYTES", 3 * 610 * 4)
    mapped = [*keys, "--store_memory_bytes", "0"]
    with dying_in_round(4):
        assert runs.train("mapped", *mapped) == 130
    assert (runs / "mapped" / "client_state" / "rank0").is_dir()
    pages = sorted(newest(runs, "mapped").glob("clients-*"))
    assert len(pages) >= 2
    assert all(len(load_file(page)["ids"]) <= 3 for page in pages)
    assert runs.train("mapped", *mapped, "--resume") == 0
    assert (runs / "mapped" / "model.safetensors").read_bytes() == (runs / "memory" / "model.safetensors").read_bytes()

    def states(name: str) -> dict[int, torch.Tensor]:
        files = [load_file(page) for page in newest(runs, name).glob("clients-*")]
        return {i: row for file in files for i, row in zip(file["ids"].tolist(), file["rows"], strict=True)}

    one, other = states("memory"), states("mapped")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[client], other[client]) for client in one)
    assert list((runs / "mapped" / "client_state").rglob("page-*")) == []


# Damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    # A flipped bit that leaves a manifest readable is the harder case: round 4 becomes round 6.
    at = content.find(b'"round": 4') + 9 if path.name == "manifest.json" else len(content) // 2
    content[at] ^= 2
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, truncate, empty, Path.unlink])
@pytest.mark.parametrize("file", ["server.safetensors", "clients-0-0.safetensors", "manifest.json", "manifest.sha256"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(
    copied: Runs, file: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(newest(copied) / file)
    assert copied.train("four", "--rounds", "5", "--resume") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"checkpoint {copied / 'four' / 'checkpoints' / 'round-000004'} is damaged (")
    assert file in lines[0] or file == "manifest.sha256"
    assert lines[1] == "resumed after round 2 of 5"
    copied.assert_same("four", "five")


def test_a_later_damaged_checkpoint_does_not_outlive_the_next_good_one(copied: Runs) -> None:
    flip(newest(copied) / "server.safetensors")
    assert copied.train("four", "--rounds", "3", "--keep_checkpoints", "1", "--resume") == 0
    assert copied.checkpoints("four") == ["round-000003"]
    assert copied.train("four", "--rounds", "5", "--resume") == 0
    copied.assert_same("four", "five")


def test_with_all_checkpoints_damaged_nothing_is_trained(copied: Runs, error_line: Callable[[], str]) -> None:
    for name in copied.checkpoints("four"):
        flip(copied / "four" / "checkpoints" / name / "server.safetensors")
    before = snapshot(copied / "four")
    assert copied.train("four", "--rounds", "5", "--resume") == 1
    message = error_line()
    for name in copied.checkpoints("four"):
        assert f"{name} is damaged (server.safetensors does not match its checksum)" in message
    assert message.endswith("no whole checkpoint is left")
    assert snapshot(copied / "four") == before


@pytest.mark.parametrize("write", range(4))
def test_death_while_writing_leaves_the_checkpoint_before(
    copied: Runs, write: int, capsys: pytest.CaptureFixture[str]
) -> None:
    left = iter(range(100))
    with dying(checkpoint, "_write", lambda path, content: "000005" in str(path) and next(left) == write):
        assert copied.train("four", "--rounds", "5", "--resume") == 130
    capsys.readouterr()
    assert copied.train("four", "--rounds", "5", "--resume") == 0
    out = capsys.readouterr().out
    assert "damaged" not in out
    assert "resumed after round 4 of 5" in out
    copied.assert_same("four", "five")
    assert copied.checkpoints("four") == copied.checkpoints("five")


# Another configuration


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (["--lr", "0.2"], "lr was 0.1, now 0.2"),
        (["--seed", "4"], "seed was 3, now 4"),
        (["--algorithm.server_lr", "0.5"], "algorithm.server_lr was 1.0, now 0.5"),
        (["--algorithm", "fedmuon"], "algorithm.name was 'scaffold', now 'fedmuon'"),
        (["--model.hidden", "[9]"], "model.hidden was [8], now [9]"),
        (["--partition.alpha", "0.4"], "partition.alpha was 0.5, now 0.4"),
        (["--clients", "9", "--cohort", "5"], "clients was 8, now 9; cohort was 4, now 5"),
        (["--schedule", "cosine"], "rounds was None, now 4; schedule was 'constant', now 'cosine'"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(
    copied: Runs, override: list[str], said: str, error_line: Callable[[], str]
) -> None:
    before = snapshot(copied / "four")
    assert copied.train("four", *override, "--resume") == 2
    message = error_line()
    assert said in message
    assert "belongs to another configuration" in message
    assert snapshot(copied / "four") == before


def test_a_cosine_run_cannot_be_prolonged(runs: Runs, error_line: Callable[[], str]) -> None:
    assert runs.train("a", "--schedule", "cosine", "--rounds", "2") == 0
    assert runs.train("a", "--schedule", "cosine", "--rounds", "3", "--resume") == 2
    assert "rounds was 2, now 3" in error_line()


def test_keys_that_touch_no_number_may_differ(copied: Runs) -> None:
    free = ["--on_nonfinite=drop_client", "--checkpoint_every=3", "--keep_checkpoints=7", "--store_memory_bytes=1e6"]
    assert copied.train("four", *free, "--rounds", "5", "--resume") == 0
    copied.assert_same("four", "five")
