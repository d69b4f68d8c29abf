"""The commands and what they print; training and its failures have files of their own."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli.small_runs import Runs
from PIL import Image

from fedkernels.cli import TABLES, main
from fedkernels.config import CHOICES, Config, load

ALL_NAMES = [name for table in CHOICES.values() for name in table]


def test_list_shows_every_name_with_the_first_line_of_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(TABLES) + len(ALL_NAMES)
    for title, table in TABLES.items():
        at = lines.index(f"{title}:") + 1
        for line, (name, cls) in zip(lines[at : at + len(table)], table.items(), strict=True):
            assert line.split(maxsplit=1) == [name, inspect.cleandoc(cls.__doc__).splitlines()[0]]


@pytest.mark.parametrize("title", TABLES)
def test_list_of_one_table(title: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", title]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [f"{title}:", *TABLES[title]]
    assert main(["list", "--names", title]) == 0
    assert capsys.readouterr().out.splitlines() == list(TABLES[title])


@pytest.mark.parametrize("name", dict.fromkeys(ALL_NAMES))
def test_list_of_one_name_shows_its_keys(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cls = next(table[name] for table in reversed(list(CHOICES.values())) if name in table)
    assert main(["list", name]) == 0
    text = capsys.readouterr().out
    assert text.startswith(inspect.cleandoc(cls.__doc__))
    for field in dataclasses.fields(cls):
        assert f"\n  {field.name} " in text


def test_list_of_an_unknown_name(error_line: Callable[[], str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "fedmuonn"]) == 2
    assert error_line() == "fedmuonn: unknown name; did you mean 'fedmuon'?"
    assert main(["list", "algorithm"]) == 2
    assert error_line() == "algorithm: unknown name; did you mean 'algorithms'?"


@pytest.mark.parametrize("command", [[], ["train"], ["list"], ["partition"], ["privacy"], ["report"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([*command, "--help"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out.startswith(" ".join(["usage: fedkernels", *command]))


def test_the_help_of_train_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = [line.split()[0] for line in capsys.readouterr().out.split("keys, as")[1].splitlines()[1:]]
    assert shown == [f"--{field.name}" for field in dataclasses.fields(Config)]


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["tarin"],
        ["list", "--names", "algorithm"],
        ["list", "algorithms", "--lr", "3"],
        ["partition"],
        ["privacy", "--sigma", "1"],
        ["privacy", "--sigma", "much", "--sampling_rate", "0.1", "--rounds", "9", "--delta", "0.01"],
        ["report"],
        ["report", "--outt", "x"],
    ],
)
def test_wrong_usage_exits_with_2(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(command)
    assert leaving.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_the_console_script_and_the_module_are_the_same_program() -> None:
    script = shutil.which("fedkernels", path=str(Path(sys.executable).parent))
    assert script is not None
    commands = ([script, "list"], [sys.executable, "-m", "fedkernels", "list"])
    outputs = [subprocess.run(command, capture_output=True, text=True, timeout=60, check=True) for command in commands]
    assert outputs[0].stdout == outputs[1].stdout
    assert "\n  fedmuon " in outputs[0].stdout


# partition


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_partition_draws_the_split_and_tells_its_numbers(
    runs: Runs, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = runs / f"split.{suffix}"
    arguments = ["partition", "--config", str(runs.config), "--run_dir", "unused", "--out", str(out)]
    assert main([*arguments, "--clients", "20"]) == 0
    *numbers, last = capsys.readouterr().out.splitlines()
    assert last == f"picture: {out}"
    told = dict(line.split() for line in numbers)
    config = load(runs.config, {"run_dir": "unused", "clients": 20})
    sizes = config.partition.split(config.data.load().labels.numpy(), None, 20, config.seed).sizes
    assert float(told["size_min"]) == sizes.min()
    assert float(told["size_max"]) == sizes.max()
    if suffix == "png":
        with Image.open(out) as picture:
            assert np.asarray(picture.convert("L")).std() > 10
    else:
        assert out.read_text().rstrip().endswith("</svg>")
    assert not Path("unused").exists()


def test_partition_of_another_split_is_another_picture(runs: Runs) -> None:
    pictures = []
    for alpha in ("0.1", "100"):
        out = runs / f"{alpha}.png"
        arguments = ["partition", "--config", str(runs.config), "--run_dir", "x", "--partition.alpha", alpha]
        assert main([*arguments, "--out", str(out)]) == 0
        pictures.append(out.read_bytes())
    assert pictures[0] != pictures[1]


def test_partition_refuses_what_train_refuses(runs: Runs, error_line: Callable[[], str]) -> None:
    arguments = ["partition", "--config", str(runs.config), "--run_dir", "x", "--out", str(runs / "split.png")]
    assert main([*arguments, "--partition", "dirichlett"]) == 2
    assert error_line() == "partition: unknown name 'dirichlett'; did you mean 'dirichlet'?"
    assert main([*arguments, "--clients", "2000"]) == 2
    assert "2000 clients" in error_line()
    assert main([*arguments[:-1], str(runs.config / "split.png")]) != 0
    assert "config.yaml" in error_line()
    assert not (runs / "split.png").exists()


# report


def test_report_compares_runs_in_a_table_and_a_page(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"first": "fedavg", "second": "scaffold"}
    for name, algorithm in names.items():
        assert runs.train(name, "--algorithm", algorithm, "--rounds", "1") == 0
    capsys.readouterr()
    folders = [str(runs / name) for name in names]
    assert main(["report", *folders]) == 0
    table = capsys.readouterr().out
    for name, algorithm in names.items():
        row = next(line for line in table.splitlines() if line.startswith(name))
        assert algorithm in row
        assert f"{100 * runs.rows(name)[-1]['test_accuracy']:.1f}" in row
    assert table.splitlines()[-1] == f"report: {runs / 'report.html'}"
    assert main(["report", folders[0], "--out", str(runs / "alone.html")]) == 0
    assert "scaffold" not in (runs / "alone.html").read_text().lower()
    assert "scaffold" in (runs / "report.html").read_text().lower()


def test_report_of_no_run(runs: Runs, error_line: Callable[[], str]) -> None:
    assert main(["report", str(runs / "nowhere")]) == 2
    assert "nowhere" in error_line()
