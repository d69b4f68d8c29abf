"""A SLURM cluster of two nodes on this host, with daemons, ports and files of its own."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from launch.machine import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
CONFIG = """\
ClusterName=fedkernels
FirstJobId={first}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
# A job that is queued again may start after as many seconds, two minutes by default and five at least.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
GresTypes=disk,gpu
Licenses=seat:2
NodeName=DEFAULT CPUs=2 RealMemory=1000 TmpDisk=1000 Features=fast,local Gres=disk:4,gpu:1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=all Nodes=n1,n2 Default=YES State=UP
"""
# SLURM does no more with the file of a GPU than to look whether it is there.
RESOURCES = """\
Name=disk Count=4
Name=gpu File=/dev/null
"""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


class Cluster:
    """Two nodes, n1 and n2, for as long as the context lasts.

    Args:
        folder: of configuration, logs and state; empty, short enough for the name of a socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        ports = [free_port() for _ in range(3)]
        # Jobs take their ports from their numbers: clusters that run beside each other must not count alike.
        first = 1 + secrets.randbelow(60000)
        config = CONFIG.format(folder=self.folder, host=socket.gethostname(), ports=ports, first=first)
        (self.folder / "slurm.conf").write_text(config)
        (self.folder / "gres.conf").write_text(RESOURCES)
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"key": key, "socket": "munge.socket", "pid": "munge.pid", "log": "munge.log", "seed": "munge.seed"}
        options = [
            f"--{name}{'' if name == 'socket' else '-file'}={self.folder / file}" for name, file in files.items()
        ]
        try:
            # Forced: folders of tests lie in one that all may write to.
            self._start("munged", "--foreground", "--force", *options)
            self._wait(lambda: (self.folder / "munge.socket").exists(), "munged made no socket")
            self._start("slurmctld", "-D")
            for node in ("n1", "n2"):
                self._start("slurmd", "-D", "-N", node)
            self._wait(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", "nodes are not idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if len(self._daemons) == 4:
            subprocess.run(["scancel", "--user=root"], env=self.environment, timeout=30, check=False)
            self._wait(lambda: self.run("squeue", "-h") == "", "jobs do not end")
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(30)

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """A client's standard output."""
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def submit(self, *options: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """Submit a batch script, with variables of its own; the number of the job."""
        variables = [f"{name}={value}" for name, value in (env or {}).items()]
        return self.run("env", *variables, "sbatch", "--parsable", *options, cwd=cwd).strip()

    def fields(self, job: str) -> dict[str, str]:
        """What the controller knows of a job, or of a task of an array as JOB_TASK."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        # The first of a name is the field; what follows may be a comment.
        return dict(word.split("=", 1) for word in reversed(words) if "=" in word)

    def wait_for(self, job: str, timeout_s: float = 150) -> str:
        """The state in which a job ends."""
        self._wait(lambda: self.fields(job)["JobState"] in ENDED, f"job {job} does not end", timeout_s)
        return self.fields(job)["JobState"]

    def _start(self, *command: str) -> None:
        name = command[0] + (command[-1] if command[0] == "slurmd" else "")
        with open(self.folder / f"{name}.log", "wb") as log:
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def _wait(self, condition: object, otherwise: str, timeout_s: float = 30) -> None:
        assert callable(condition)
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{otherwise}\n{self.logs()}"
            assert all(daemon.poll() is None for daemon in self._daemons), f"a daemon ended\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))
