"""`fedkernels diagnose` on small runs: what it writes, prints and adds to the report, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli.small_runs import CONFIG

from fedkernels.cli import main
from fedkernels.report import write_report

QUICK = ["--probes", "2", "--iterations", "8", "--points", "2", "--grid", "1", "--ascent_steps", "1", "--samples", "64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of FedMuon and of FedAvg, the first of which is diagnosed."""
    folder = tmp_path_factory.mktemp("runs")
    for algorithm in ("fedmuon", "fedavg"):
        config = CONFIG | {"algorithm": algorithm, "model": {"name": "mlp", "hidden": [8, 8]}, "rounds": 2}
        (folder / f"{algorithm}.yaml").write_text(yaml.safe_dump(config))
        run = ["train", "--config", str(folder / f"{algorithm}.yaml"), "--run_dir", str(folder / algorithm)]
        assert main(run) == 0
    assert main(["diagnose", str(folder / "fedmuon"), *QUICK]) == 0
    return folder


def charts(page: Path) -> list[str]:
    return re.findall(r'aria-label="([^"]*)"', page.read_text())


def test_it_writes_prints_and_reports(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "fedmuon"
    (run / "diagnosis.json").unlink()
    assert main(["diagnose", str(run), *QUICK, "--rho", "0.1"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((run / "diagnosis.json").read_text())
    assert (found["algorithm"], found["round"], found["dtype"]) == ("fedmuon", 2, "float32")
    assert found["settings"]["rho"] == 0.1
    assert found["settings"]["lr"] == CONFIG["lr"]
    value = found["measures"]["lambda_max"]["global"]["value"]
    assert re.search(rf"Hessian λ_max +{re.escape(f'{value:.4g}')} ", printed)
    assert f"diagnosis: {run / 'diagnosis.json'}" in printed
    text = (run / "report.html").read_text()
    assert "<h2>Diagnostics</h2>" in text
    assert f"{value:.4g}" in text
    for chart in ("Loss along a random direction by", "Loss over two random directions", "Cosine between updates",
                  "λ_max of the Hessian of f_i", "Relative drift of M"):  # fmt: skip
        assert any(label.startswith(chart) for label in charts(run / "report.html")), chart


def test_it_is_the_same_every_time_and_may_be_written_elsewhere(folder: Path, tmp_path: Path) -> None:
    before = (folder / "fedavg" / "report.html").read_bytes()
    for name in ("a", "b"):
        assert main(["diagnose", str(folder / "fedavg"), *QUICK, "--out", str(tmp_path / name / "d.json")]) == 0
    assert (tmp_path / "a" / "d.json").read_bytes() == (tmp_path / "b" / "d.json").read_bytes()
    assert not (folder / "fedavg" / "diagnosis.json").exists()
    assert (folder / "fedavg" / "report.html").read_bytes() == before


def test_a_run_that_has_moved_is_found(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "checkpoints"):
        (moved / name).symlink_to(folder / "fedavg" / name)
    assert main(["diagnose", str(moved), *QUICK, "--seed", "0"]) == 0
    assert (moved / "diagnosis.json").is_file()


def test_several_runs_stand_side_by_side(folder: Path, tmp_path: Path) -> None:
    runs = [folder / "fedavg", folder / "fedmuon"]
    page = write_report(runs, tmp_path / "both.html").read_text()
    found = json.loads((runs[1] / "diagnosis.json").read_text())["measures"]
    diagnostics = page.split("<h2>Diagnostics</h2>")[1].split("</section>")[0]
    row = re.findall(r"<tr><th>(.*?)</tr>", diagnostics)
    assert len(row) == 2  # the head, and the one run that has been diagnosed
    for name in ("lambda_max", "trace", "sharpness_one_step", "sharpness_ascent"):
        for value in (found[name]["global"]["value"], found[name]["discrepancy"]["difference"]):
            assert f"<td>{value:.4g}<small>" in row[1]


def test_columns_over_rounds_have_curves_of_their_own(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "private"
    run.mkdir()
    names = {"epsilon": "Privacy spent, ε", "preconditioner_drift": "Preconditioner drift",
             "clipped_fraction": "Clipped fraction of updates", "noise_to_signal": "Noise to signal"}  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"round": r, "train_loss": 1 / r, **dict.fromkeys(names, 0.1 * r), "update_norm_p50": r} for r in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = charts(write_report([run], tmp_path / "report.html"))
    assert [f"{title} by round" for title in names.values()] == labels[1:-1]
    assert labels[-1] == "update_norm_p50 by round"


def test_recorded_columns_are_taken_over(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "private"
    run.mkdir()
    for name in ("config.yaml", "checkpoints"):
        (run / name).symlink_to(folder / "fedavg" / name)
    rows = [{"round": r, "clipped_fraction": c, "noise_to_signal": None} for r, c in ((1, 0.25), (2, 0.75))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["diagnose", str(run), *QUICK]) == 0
    recorded = json.loads((run / "diagnosis.json").read_text())["recorded"]
    assert recorded == {"clipped_fraction": {"last": 0.75, "mean": 0.5, "rounds": 2}}
    assert "clipped_fraction: 0.75 in the last round, mean 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "0"], "samples: 0, expected int >= 1"),
        (["--seed", "-1"], "seed: -1, expected int >= 0"),
        (["--rho", "-0.1"], "rho: -0.1, expected float > 0"),
        (["--rho", ".nan"], "rho: nan, expected float > 0"),
        (["--probes", "1"], "probes: 1, expected int >= 2"),
        (["--tolerance", "2"], "tolerance: 2, expected float > 0 and < 1"),
        (["--iterations", "many"], "iterations: 'many', expected int >= 1"),
        (["--lr", "0"], "lr: 0, expected float > 0"),
        (["--device", "tpu"], "device: 'tpu', expected auto | cpu | cuda"),
        (["--threads", "0"], "threads: 0, expected int >= 1"),
    ],
)
def test_bad_options(folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main(["diagnose", str(folder / "fedavg"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fedkernels: error: {message}")


def test_bad_folders(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(run: Path, status: int) -> str:
        assert main(["diagnose", str(run), *QUICK]) == status
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("fedkernels: error: ")

    for missing in (tmp_path / "missing", tmp_path, folder / "fedavg.yaml"):
        assert error(missing, 2) == f"{missing} is not a run folder: it has no config.yaml"

    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_bytes((folder / "fedavg" / "config.yaml").read_bytes())
    assert error(bare, 2) == f"{bare} has no checkpoint: there is no state to diagnose"

    (checkpoint,) = (folder / "fedavg" / "checkpoints").iterdir()
    damaged = bare / "checkpoints" / checkpoint.name
    damaged.mkdir(parents=True)
    for file in checkpoint.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "server.safetensors").write_bytes(b"torn")
    assert "server.safetensors does not match its checksum" in error(bare, 1)

    (bare / "config.yaml").write_text("rounds: many")
    assert error(bare, 2).startswith("algorithm: missing")
    assert not (bare / "diagnosis.json").exists()


def test_a_damaged_diagnosis_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_bytes((folder / "fedavg" / "metrics.jsonl").read_bytes())
    (run / "diagnosis.json").write_text("{")
    assert main(["report", str(run)]) == 2
    assert f"{run / 'diagnosis.json'}: damaged file" in capsys.readouterr().err
