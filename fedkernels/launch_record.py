"""How a run was started: the job, the code and the launch, and a script that starts it again.

Launch scripts say what they were called with in `FEDKERNELS_LAUNCHER`, as words for a shell; what torchrun was called
with is read from its process, and a single process is started as itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import __version__, faults
from .metrics import git_revision

LAUNCHES, RESUBMIT = "launches.jsonl", "resubmit.sh"
LAUNCHER = "FEDKERNELS_LAUNCHER"
# Environment variables that change how ranks compute or talk; none of them carries a secret.
PREFIXES = (
    "FEDKERNELS_", "NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "FI_", "OMP_", "MKL_", "CUDA_", "PET_", "TRITON_",
    "TORCH_ELASTIC_", "DS_ACCELERATOR",
)  # fmt: skip
SOURCE = Path(__file__).resolve().parent.parent


def job() -> str | None:
    """What ranks of a launch, and those that its launcher starts again, have in common: torchrun's rendezvous id."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name == "none" else name  # torchrun's word for a rendezvous that was given no id


def begun_by_this_job(run_dir: Path) -> bool:
    """Whether the newest launch in a run folder is the one that this process belongs to: it is being started again."""
    path = run_dir / LAUNCHES
    lines = path.read_text().splitlines() if job() is not None and path.exists() else []
    return bool(lines) and json.loads(lines[-1])["job"] == job()


def record_launch(run_dir: Path) -> None:
    """Add this launch to `launches.jsonl`, unless it is the newest there, and write `resubmit.sh`.

    Differences of the code to its commit are kept beside them as `code-HASH.diff`.
    """
    code, diff = _code()
    variables = {name: value for name, value in sorted(os.environ.items()) if _matters(name)}
    launcher = _launcher()
    launch = {"job": job(), "directory": os.getcwd(), "launcher": launcher, "environment": variables, "code": code}
    if diff is not None:
        _replace(run_dir / code["diff"], diff)
    path, line = run_dir / LAUNCHES, json.dumps(launch)
    before = path.read_text().splitlines() if path.exists() else []
    if before[-1:] != [line]:
        # Whole or not at all: a torn last line would hide from a restarted rank that the run is its own.
        _replace(path, "".join(f"{text}\n" for text in [*before, line]).encode())
    script = _script(run_dir, launch)
    _replace(run_dir / RESUBMIT, script.encode())
    (run_dir / RESUBMIT).chmod(0o755)


def _script(run_dir: Path, launch: dict[str, Any]) -> str:
    code, directory = launch["code"], Path(launch["directory"])
    folder = (directory / run_dir).resolve()
    commit = code["commit"] or "no git checkout"
    notes = [f"# Code: fedkernels {code['version']}, {commit}" + (f", with {code['diff']}" if code["diff"] else "")]
    if launch["launcher"] is None:
        notes.append(
            f"# Was one of {os.environ['WORLD_SIZE']} ranks; start it once for each, with RANK and MASTER_ADDR set."
        )
    launcher = launch["launcher"] or shlex.join([sys.executable, "-m", "fedkernels", "train"])
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            "# Continues this run from its newest checkpoint; with --run_dir FOLDER it repeats the run there.",
            *notes,
            "set -euo pipefail",
            f"cd {shlex.quote(str(directory))}",
            *(f"export {name}={shlex.quote(value)}" for name, value in launch["environment"].items()),
            f'exec {launcher} --config {shlex.quote(str(folder / "config.yaml"))} --resume "$@"',
            "",
        ]
    )


def _launcher() -> str | None:
    """The words that start these ranks, up to the options of `train`; None where they were started one by one."""
    if LAUNCHER in os.environ:
        return os.environ[LAUNCHER].strip()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        try:
            words = Path(f"/proc/{os.getppid()}/cmdline").read_text().rstrip("\0").split("\0")
        except OSError:
            words = []
        if "train" in words:
            return shlex.join(words[: words.index("train") + 1])
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return None
    return shlex.join([sys.executable, "-m", "fedkernels", "train"])


def _matters(name: str) -> bool:
    # SLURM and DeepSpeed give out GPUs themselves; DeepSpeed is known by CROSS_RANK.
    given = name == "CUDA_VISIBLE_DEVICES" and not {"SLURM_JOB_ID", "CROSS_RANK"}.isdisjoint(os.environ)
    return name.startswith(PREFIXES) and name not in (LAUNCHER, faults.VARIABLE) and not given


def _code() -> tuple[dict[str, Any], bytes | None]:
    """Version, commit, a file's name and content with what differs from it, and source files that git does not know."""
    revision = git_revision(SOURCE)
    code: dict[str, Any] = {"version": __version__, "commit": None, "diff": None, "untracked": []}
    if revision is None:
        return code, None
    code["commit"] = revision.removesuffix("-dirty")
    try:
        untracked = _git("ls-files", "--others", "--exclude-standard", "fedkernels", "csrc")
        diff = _git("diff", "HEAD", "--binary") if revision.endswith("-dirty") else b""
    except subprocess.SubprocessError as error:  # such as a lock, or a file system that takes its time
        return code | {"unknown": str(error)}, None
    code["untracked"] = untracked.decode().splitlines()
    if not diff:
        return code, None
    code["diff"] = f"code-{hashlib.sha256(diff).hexdigest()[:12]}.diff"
    return code, diff


def _git(*arguments: str) -> bytes:
    command = ["git", "-C", str(SOURCE), *arguments]
    return subprocess.run(command, capture_output=True, timeout=30, check=True).stdout


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
