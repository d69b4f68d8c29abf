"""What compiled GPU kernels take of a multiprocessor, read from their machine code."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import triton

SHARED_BYTES = 232_448  # what a program may have on sm_90


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """Registers of a thread, bytes of its stack and local memory, as they stand in the machine code."""
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [dump, "--dump-resource-usage", folder / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
