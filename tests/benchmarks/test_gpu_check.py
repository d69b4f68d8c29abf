"""The command for machines with a GPU, run where its programs only say what they were told."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.sh"
STAGES = ["build", "extension", "tests", "memcheck", "racecheck", "synccheck", "round", "simulation", "kernels"]
PYTHON = """#!/bin/sh
case "$*" in
    *get_device_capability*) echo 9.0 ;;
    -) echo $LACKING ;;
    -c*) ;;
    *) echo "jobs $MAX_JOBS, arch $TORCH_CUDA_ARCH_LIST, threads $OMP_NUM_THREADS" ;;
esac
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with nothing but the command, and a machine where nproc obeys OMP_NUM_THREADS as it does."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(SCRIPT, tmp_path / "benchmarks")
    program(tmp_path / "bin" / "python", PYTHON)
    program(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\necho a GPU\n")
    program(tmp_path / "bin" / "nproc", '#!/bin/sh\necho "${OMP_NUM_THREADS:-7}"\n')
    return tmp_path


def run(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("MAX_JOBS", "CUDA_HOME")}
    given = {"PATH": f"{root / 'bin'}:{os.environ['PATH']}", "PYTHON": str(root / "bin" / "python"), **environment}
    command = ["bash", str(root / "benchmarks" / "gpu_check.sh")]
    return subprocess.run(command, capture_output=True, text=True, env=kept | given)


def stages(said: str) -> dict[str, str]:
    summary = said.split("gpu_check, ")[1].splitlines()[1:]
    return {line.split()[0]: line.split(maxsplit=2)[2] for line in summary if line}


def test_builds_for_this_gpu_on_all_cores(root: Path) -> None:
    """Whatever list of architectures the environment has, and however many threads its programs get."""
    program(root / "cuda" / "bin" / "compute-sanitizer", "#!/bin/sh\necho sanitizer $*\n")
    done = run(
        root, TORCH_CUDA_ARCH_LIST="7.5 8.0 12.0+PTX", OMP_NUM_THREADS="3", CUDA_HOME=str(root / "cuda"), BUDGET_S="60"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert stages(done.stdout) == dict.fromkeys(STAGES, "ok")
    assert list(stages(done.stdout)) == STAGES
    assert (root / "build" / "gpu_check" / "build.log").read_text() == "jobs 7, arch 9.0, threads 3\n"
    tools = [(root / "build" / "gpu_check" / f"{tool}.log").read_text() for tool in STAGES[3:6]]
    python = root / "bin" / "python"
    expected = "sanitizer --tool {} --error-exitcode 1 {} tests/gpu/sanitized.py\n"
    assert tools == [expected.format(tool, python) for tool in STAGES[3:6]]


@pytest.mark.skipif(Path("/usr/local/cuda/bin/compute-sanitizer").exists(), reason="there is one here")
def test_fails_without_a_sanitizer(root: Path) -> None:
    done = run(root, PATH=f"{root / 'bin'}:/usr/bin:/bin", BUDGET_S="60")
    assert done.returncode == 1
    assert {name for name, status in stages(done.stdout).items() if status != "ok"} == set(STAGES[3:6])
    assert "no compute-sanitizer in PATH, in CUDA_HOME/bin or in /usr/local/cuda/bin" in done.stdout


def test_a_stage_that_is_left_out_shows_no_old_log(root: Path) -> None:
    program(root / "build" / "gpu_check" / "round.log", "what an earlier run said")
    done = run(root, LACKING="pydantic", BUDGET_S="60")
    assert stages(done.stdout)["round"] == f"FAILED: {root / 'bin' / 'python'} lacks pydantic"
    assert "what an earlier run said" not in done.stdout


def test_limits_leave_time_for_the_last_stage() -> None:
    """If all others run into theirs, and the sanitizer does so three times."""
    text = SCRIPT.read_text()
    limits = {name: int(most) for name, most in re.findall(r'^ *stage "?(\$?\w+)"? (\d+) ', text, re.MULTILINE)}
    budget = re.search(r"BUDGET_S:-(\d+)", text)
    assert budget is not None
    assert sum(limits.values()) + 2 * limits["$tool"] <= int(budget[1]) - 90
