"""Triton's kernels over matrices without a GPU: run by its interpreter, and compiled for sm_80 and sm_90."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton
from kernel_cubins import SHARED_BYTES, resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedkernels.kernels.dispatch import INTERPRETED
from fedkernels.kernels.muon_step.triton import direction_kernel, step_kernel
from fedkernels.kernels.newton_schulz.triton import (
    TILES,
    Tiles,
    small_kernel,
    small_tiles,
    symmetric_kernel,
    update_kernel,
)
from fedkernels.kernels.tiles import OPTIONS, TILE

HERE = Path(__file__).parent
Configuration = tuple[Any, dict[str, Any], dict[str, Any]]  # kernel, compile-time constants, launch options


def products(kernel: Any, tiles: Tiles, **constants: Any) -> Configuration:
    return kernel, {"SIDE": tiles.side, "DEPTH": tiles.depth, **constants}, tiles.options


def small(side: int, *, tall: bool) -> Configuration:
    tiles = small_tiles(side)
    unit = "short_stride" if tall else "long_stride"
    return small_kernel, {"SIDE": tiles.side, "COLS": tiles.depth, unit: 1}, tiles.options


# Everything that a launch can ask for: matrices come aligned, whatever their shape was.
SMALL = {
    f"small {side} {how}": small(side, tall=how == "tall") for side in (16, 32, 64, 128) for how in ("wide", "tall")
}
TILED = {
    f"{name} {size}": configuration
    for size, tiles in TILES.items()
    for name, configuration in {
        "gram": products(symmetric_kernel, tiles, POLYNOMIAL=False),
        "polynomial": products(symmetric_kernel, tiles, POLYNOMIAL=True),
        "update": products(update_kernel, tiles),
    }.items()
}
STEPS: dict[str, Configuration] = {
    "direction": (direction_kernel, {"SIZE": TILE}, OPTIONS),
    "step": (step_kernel, {"LR_PER_CLIENT": True, "SIZE": TILE}, OPTIONS),
    "direction of all": (direction_kernel, {"SIZE": TILE, "active_ptr": None}, OPTIONS),
    "step without G": (step_kernel, {"LR_PER_CLIENT": False, "SIZE": TILE, "G_ptr": None, "active_ptr": None}, OPTIONS),
}
KERNELS = SMALL | TILED | STEPS
HALF = {
    symmetric_kernel: {"a_ptr", "c_ptr"},
    update_kernel: {"p_ptr", "h_ptr", "next_h_ptr"},
}
FLOATS = {"margin", "alpha", "beta", "a", "momentum", "scale", "weight_decay", "share"}
COUNTS = {"count", "steps"}  # the integers that nothing aligns


@pytest.mark.skipif(INTERPRETED, reason="this is the run that the test starts")
def test_interpreted() -> None:
    """The tests of the ops once more, with Triton on CPU tensors; the variable has to be there before the import."""
    files = [str(HERE / f"test_{name}.py") for name in ("newton_schulz_backends", "muon_step")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent.parent)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"^(\d+) passed", run.stdout.splitlines()[-1])
    assert passed is not None, run.stdout[-500:]
    assert int(passed[1]) > 100


def compiled(configuration: Configuration, arch: int) -> Any:
    kernel, constants, options = configuration

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return "*i1" if name == "active_ptr" else "*fp16" if name in HALF.get(kernel, ()) else "*fp32"
        if name in FLOATS:
            return "fp32"
        return "i64" if name.endswith(("_outer", "_inner", "outer_stride", "inner_stride")) else "i32"

    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = [n for n, k in signature.items() if k.startswith(("*", "i")) and n not in COUNTS]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills(name: str, arch: int, tmp_path: Path) -> None:
    kernel = compiled(KERNELS[name], arch)
    used = resources(kernel, tmp_path)
    assert kernel.metadata.shared <= (SHARED_BYTES if arch == 90 else 166_912)
    assert used["STACK"] == used["LOCAL"] == 0


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", [name for name in SMALL | TILED if KERNELS[name][1]["SIDE"] >= 64])
def test_products_run_on_groups_of_warps(name: str) -> None:
    """On sm_90, where a tile has the 64 rows that those need."""
    assert "wgmma.mma_async" in compiled(KERNELS[name], 90).asm["ptx"]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", KERNELS)
def test_offsets_are_64_bits_wide(name: str) -> None:
    """A batch may have more than 2³¹ elements: int64 leads to every matrix, and to every element of it."""
    ir = compiled(KERNELS[name], 90).asm["ttir"]
    assert set(re.findall(r"tt\.addptr .* tensor<[0-9x]+x(i\d+)>", ir)) == {"i64"}
    to_matrices = re.findall(r"tt\.addptr %(\w+), .* : !tt\.ptr<\w+>, (i\d+)", ir)
    narrow = {re.sub(r"_\d+$", "", pointer) for pointer, width in to_matrices if width != "i64"}
    assert narrow <= {"coefficients_ptr", "a", "lr_ptr", "active_ptr"}, narrow  # a follows the first of them
