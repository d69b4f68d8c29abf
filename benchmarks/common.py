"""What the benchmarks share: processes with one thread each, spreads, tables, dated result files."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fedkernels import __version__
from fedkernels.data.datasets import Dataset
from fedkernels.metrics import environment

RESULTS = Path(__file__).resolve().parent / "results"
Table = dict[str, list[Any]]


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the option every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the dated result file")
    return parser


def noise_images(samples: int, shape: tuple[int, int, int], classes: int = 10, seed: int = 0) -> Dataset:
    """Uniform uint8 noise with random labels: the cost of training without a download."""
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (samples, *shape), dtype=np.uint8))
    targets = torch.from_numpy(rng.integers(0, classes, samples))
    mean, std = (0.5,) * shape[0], (0.25,) * shape[0]
    return Dataset("image", images, targets, images[:1], targets[:1], classes, targets, None, mean, std)


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on fresh processes of one torch thread, joined by gloo; results in rank order."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        ranks = mp.spawn(_rank, (world_size, folder, queue, function, args), nprocs=world_size, join=False)
        # Results are small, so the pipe holds them until every rank has ended; a failed rank raises here.
        while not ranks.join():
            pass
        return [result for _, result in sorted((queue.get() for _ in range(world_size)), key=lambda item: item[0])]


def _rank(
    rank: int, world_size: int, folder: str, queue: Any, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    queue.put((rank, function(*args)))
    if world_size > 1:
        dist.destroy_process_group()


def peak_rss_bytes() -> int:
    """Most memory this process ever held; unlike `ru_maxrss`, not inherited from the process that started it."""
    return _status_bytes("VmHWM")


def rss_bytes() -> int:
    """Memory this process holds now."""
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return 1024 * int(match[1])


def process_age_s() -> float:
    """Seconds since this process was started, its imports included."""
    started_ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def cpu_flags() -> set[str]:
    """The instruction sets the CPU announces."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and count of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def report(what: str, table: Table, details: dict[str, Any], out: Path, device: str = "cpu") -> Path:
    """Print the table with hardware and versions, write the dated JSON file and refresh the folder's README.

    Args:
        what: the first part of the file's name.
        table: `columns`, and `rows` of as many cells; numbers rounded by the caller.
        details: every number behind the table.
        device: `cpu` or `cuda`, where it was measured.
    """
    facts = facts_of(device)
    print(f"\n{what}: {_hardware(facts)}")
    print(", ".join(f"{name} {facts[name]}" for name in ("fedkernels", "torch", "numpy", "python", "git_revision")))
    print(markdown(table))
    path = write(what, table, details, facts, out)
    print(f"wrote {path}")
    return path


def facts_of(device: str) -> dict[str, Any]:
    """The machine and the versions that something is measured with."""
    facts = environment() | {"fedkernels": __version__}  # of this checkout, installed or not
    facts["load_average_1min"] = round(os.getloadavg()[0], 2)
    facts["measured_on"] = facts["devices"][0] if device == "cuda" else facts["cpu"]
    if device == "cuda":
        facts["gpu"] = gpu_facts()
    return facts


def write(what: str, table: Table, details: dict[str, Any], facts: dict[str, Any], out: Path) -> Path:
    """Write the dated JSON file, in the place of one of the same day, and refresh the folder's README."""
    date = datetime.date.today().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w+\)", "", facts["measured_on"].lower())).strip("-") or "cpu"
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{date}-{what}-{slug}.json"
    content = {"what": what, "date": date, "environment": facts, "table": table, "details": details}
    path.write_text(json.dumps(content, indent=1) + "\n")
    _write_index(out)
    return path


def _hardware(facts: dict[str, Any]) -> str:
    gpu = f"{facts['measured_on']} (driver {facts['gpu']['driver_version']}) beside " if "gpu" in facts else ""
    return f"{gpu}{facts['cpu']}, {facts['cores']} cores, load {facts['load_average_1min']}"


def gpu_facts() -> dict[str, str]:
    """Driver, clocks and limits of the first GPU, as nvidia-smi tells them."""
    fields = ("driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    told = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return dict(zip(fields, (value.strip() for value in told.split(",")), strict=True))


def markdown(table: Table) -> str:
    """A Markdown table."""
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _write_index(out: Path) -> None:
    parts = ["# Results", "Written by the benchmarks from the files beside it; `../METHOD.md` says how they measure."]
    for path in sorted(out.glob("*.json"), reverse=True):
        result = json.loads(path.read_text())
        facts = result["environment"]
        hardware = f"{_hardware(facts)}; torch {facts['torch']}"
        parts += [f"## {result['what']}, {result['date']}", hardware, markdown(result["table"])]
    (out / "README.md").write_text("\n\n".join(parts) + "\n")
