"""The tool that makes faults: what it understands, and that it does nothing unless it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedkernels.faults import VARIABLE, Fault, Faults, InjectedError, damage, from_environment, parse


def test_several_faults() -> None:
    assert parse("kill rank=1 round=3 stage=reduce; slow rank=0 round=2 stage=train seconds=2.5") == (
        Fault(kind="kill", rank=1, round=3, stage="reduce"),
        Fault(kind="slow", rank=0, round=2, stage="train", seconds=2.5),
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("explode rank=1 round=3 stage=reduce", "unknown kind 'explode'; expected one of raise, kill"),
        ("kill rank=1 round=3 stage=lunch", "unknown stage 'lunch'; expected one of move, train"),
        ("kill rank=1 round=3", "unknown stage ''"),
        ("kill rank=one round=3 stage=train", "expected rank=N round=N"),
        ("kill round=3 stage=train", "expected rank=N round=N"),
        ("kill rank=1 round=3 stage=train when=now", "unknown key 'when'"),
        ("kill rank=1 round=3 stage=train;", "between semicolons"),
    ],
)
def test_what_is_no_fault(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{VARIABLE}: .*{said}"):
        parse(text)


def test_a_fault_happens_once_to_its_rank_at_its_place(tmp_path: Path) -> None:
    planned = parse("raise rank=1 round=3 stage=train")
    for round, stage, rank in ((2, "train", 1), (3, "reduce", 1), (3, "train", 0)):
        Faults(planned, tmp_path, rank).at(round, stage)
    faults = Faults(planned, tmp_path, 1)
    with pytest.raises(InjectedError, match="'train' of round 3"):
        faults.at(3, "train")
    faults.at(3, "train")
    Faults(planned, tmp_path, 1).at(3, "train")  # of a run that was started again


def test_one_client_of_a_batch_sends_nan(tmp_path: Path) -> None:
    up = {"delta": torch.ones(2, 3)}
    faults = Faults(parse("nan rank=0 round=1 stage=train"), tmp_path, 0)
    faults.at(1, "train")
    faults.spoil(up, 2)
    assert up["delta"].isfinite().all()
    faults.spoil(up, 1)
    assert up["delta"].isnan().tolist() == [[True] * 3, [False] * 3]


def test_nothing_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert from_environment(tmp_path) is None


def test_damage(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abcde")
    damage(path, "flip")
    assert path.read_bytes() == b"abade"
    damage(path, "truncate")
    assert path.read_bytes() == b"abad"
