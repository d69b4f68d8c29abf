"""Two nodes on one host: network namespaces with addresses of their own, joined by one cable."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PORT = 29400
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PROGRAMS = ("ip", "nsenter")


class Nodes:
    """The nodes 0 and 1 for as long as the context lasts; what runs there is killed at its end."""

    def __init__(self) -> None:
        # Names are common to the whole host.
        self.names = [f"fk{os.getpid()}-{node}" for node in range(2)]
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Nodes:
        one, other = self.names
        try:
            for name in self.names:
                _ip("netns", "add", name)
            _ip("link", "add", "eth0", "netns", one, "type", "veth", "peer", "name", "eth0", "netns", other)
            for name, address in zip(self.names, ADDRESSES, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    _ip("-n", name, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for name in self.names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for process in found.stdout.split():
                subprocess.run(["kill", "-KILL", process], check=False)
        for started in self._processes:
            started.communicate()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False)

    def start(self, node: int, script: Path, *arguments: str) -> subprocess.Popen[str]:
        """Run a shell script on a node; gloo finds its address, and torchrun says what it does."""
        process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self.names[node]}", "bash", str(script), *arguments],
            env=os.environ | {"VENV": sys.prefix, "GLOO_SOCKET_IFNAME": "eth0", "LOGLEVEL": "INFO"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._processes.append(process)
        return process

    def cut(self, node: int) -> None:
        """Pull the cable out of a node: nothing arrives any more, and nobody is told."""
        _ip("-n", self.names[node], "link", "set", "eth0", "down")

    def join(self, node: int) -> None:
        _ip("-n", self.names[node], "link", "set", "eth0", "up")

    @staticmethod
    def rendezvous(node: int) -> Sequence[str]:
        """Options of `launch/torchrun.sh` on a node that may come and go, with time-outs of seconds."""
        return [
            "--nnodes=1:2", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv-id", "nodes", "--node-rank", str(node),
            "--local-addr", ADDRESSES[node], "--rdzv-conf",
            "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3",
        ]  # fmt: skip


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
