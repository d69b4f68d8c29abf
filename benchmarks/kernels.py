"""Every kernel against what PyTorch and other libraries offer for the same job: rates, shares of a ceiling, errors.

All variants of a job work on the same memory and take turns; a ratio is between neighbours in time. Before anything is
timed, each is compared with the equations in float64; one that differs stops the benchmark. The ceiling takes its turn
too: a copy beside steps over rows, a product of large square matrices beside those of matrices.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import muon_step
import newton_schulz
import round_tail
import steps
import torch
from common import arguments, report
from shapes import NAMES, Workload, workload
from turns import Job, measure

GIB = 2**30


@dataclass(frozen=True)
class Family:
    """A module with the jobs of some ops, and the shapes that its ops run on where none is asked for."""

    module: ModuleType
    shapes: dict[str, tuple[str, ...]]
    matrices: bool = False

    def elements(self, work: Workload) -> int:
        return sum(n * rows * cols for n, rows, cols in work.matrices) if self.matrices else work.clients * work.d

    @property
    def jobs(self) -> Callable[[str, Workload, torch.dtype, torch.device], Iterator[Job]]:
        return self.module.jobs  # type: ignore[no-any-return]


ON_ROWS = {"cpu": ("vit_tiny x 10", "gpt2"), "cuda": ("lenet5 x 10", "vit_tiny x 10", "vit_b", "llama_1b")}
FAMILIES = (
    Family(steps, ON_ROWS),
    Family(round_tail, {"cpu": ("vit_tiny x 10",), "cuda": ("vit_tiny x 10", "gpt2")}),
    Family(
        newton_schulz,
        {"cpu": ("vit_tiny", "llama_1b_lora_r16"), "cuda": ("vit_tiny", "gpt2", "llama_1b", "llama_1b_lora_r16")},
        matrices=True,
    ),
    Family(muon_step, {"cpu": ("vit_tiny",), "cuda": ("vit_tiny", "gpt2")}, matrices=True),
)
OPS = {op: family for family in FAMILIES for op in family.module.OPS}
COLUMNS = [
    "op", "shape", "dtype", "threads", "variant", "ms", "GB/s", "GFLOP/s", "of the ceiling", "time / ours", "error",
]  # fmt: skip


def free_bytes(device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def row(result: dict[str, Any]) -> list[Any]:
    """Its line of the table."""
    ratio, of_ceiling = result["ours_is_faster"], result["of_ceiling"]["median"]
    bandwidth = f"{result['rate']['median'] / 1e9:.1f}" if result["limit"] == "memory" else ""
    return [
        result["op"], result["shape"], result["dtype"], result["threads"] if result["device"] == "cpu" else "",
        result["variant"], f"{1e3 * result['time_s']['median']:.3g}", bandwidth,
        f"{result['flop_per_s']['median'] / 1e9:.3g}", f"{of_ceiling:.2f}",
        f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
        " / ".join(f"{value:.1e}" for value in result["errors"].values()),
    ]  # fmt: skip


def workload_named(name: str) -> Workload:
    try:
        return workload(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@torch.no_grad()
def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--op", nargs="+", choices=[*OPS, "all"], default=["all"])
    parser.add_argument(
        "--shape", nargs="+", type=workload_named, metavar="MODEL[ x CLIENTS]",
        help=f"models are {', '.join(NAMES)}; where none is given, each op has its own",
    )  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"], help="of gradients")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="of the CPU, one table part each")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of every variant")
    options = parser.parse_args()
    if options.dtype != ["float32"]:
        print("--dtype is that of the gradients of optimizer steps; all else is float32")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no GPU")
    ops = list(OPS) if "all" in options.op else options.op
    results, left_out = [], []
    for op in ops:
        family = OPS[op]
        for work in options.shape or map(workload, family.shapes[device.type]):
            need, free = family.module.PEAK_BYTES * family.elements(work), free_bytes(device)
            if need == 0 or need > 0.9 * free:
                why = f"needs {need / GIB:.1f} GiB, {free / GIB:.1f} are free" if need else "has no matrices"
                left_out.append(f"{op} of {work.name}: {why}")
                print(f"not run: {left_out[-1]}", flush=True)
                continue
            for dtype in options.dtype if family.module is steps else ["float32"]:
                for job in family.jobs(op, work, getattr(torch, dtype), device):
                    for threads in options.threads if device.type == "cpu" else [1]:
                        torch.set_num_threads(threads)
                        for result in measure(job, device, options.repeats):
                            results.append(result)
                            print(*row(result), sep="  ", flush=True)
                    torch.compiler.reset()  # forgets the tensors that compiled variants hold
                del job  # with its memory
    if not results:
        parser.error("nothing was run: " + "; ".join(left_out))
    huge_pages = os.environ.get("THP_MEM_ALLOC_ENABLE", "0") == "1"
    details = {"huge_pages": huge_pages, "not_run": left_out, "runs": results}
    path = report(
        f"kernels-{device.type}", {"columns": COLUMNS, "rows": [row(result) for result in results]}, details,
        options.out, device.type,
    )  # fmt: skip
    if find_spec("matplotlib") is None:  # a machine with a GPU alone may not have it
        print("no roofline: matplotlib is not installed")
        return
    import roofline

    roofline.draw(results, path.with_suffix(".png"))
    print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
