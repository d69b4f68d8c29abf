"""Triton's kernels without a GPU: run by its interpreter, and compiled for sm_80 and sm_90."""

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
from fedkernels.kernels.fused_adamw.triton import adamw_kernel
from fedkernels.kernels.fused_sam.triton import (
    NORM_OPTIONS,
    NORM_TILE,
    PARTS,
    SAM_TILE,
    norm_kernel,
    partial_kernel,
    sam_kernel,
)
from fedkernels.kernels.fused_sgd.triton import sgd_kernel
from fedkernels.kernels.tiles import OPTIONS, TILE

HERE = Path(__file__).parent
# Kernel, its compile-time constants, launch options; the optional pointers come from OPTIONAL.
KERNELS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "adamw": (
        adamw_kernel,
        {"LR_PER_CLIENT": False, "STEP_PER_CLIENT": False, "V_STEPS_PER_CLIENT": True, "SCALE_PER_CLIENT": True},
        OPTIONS,
    ),
    "sgd": (sgd_kernel, {"LR_PER_CLIENT": False, "SCALE_PER_CLIENT": True}, OPTIONS),
    "sam": (sam_kernel, {"ONE_ROW": False, "PER_CLIENT": False, "PARTS": PARTS, "SIZE": SAM_TILE}, OPTIONS),
    "partial": (partial_kernel, {"SIZE": NORM_TILE}, NORM_OPTIONS),
    "norm": (norm_kernel, {"PARTS": PARTS}, OPTIONS),
}
OPTIONAL = {
    "adamw": ["G_ptr", "scale_ptr", "active_ptr", "x_ptr", "delta_ptr"],
    "sgd": ["m_ptr", "G_ptr", "scale_ptr", "active_ptr", "x_ptr", "delta_ptr"],
    "sam": ["saved_ptr", "coefficient_ptr"],
    "partial": [],
    "norm": [],
}


@pytest.mark.skipif(INTERPRETED, reason="this is the run that the test starts")
@pytest.mark.parametrize("op", ["adamw", "sgd", "sam"])
def test_interpreted(op: str) -> None:
    """The tests of the op once more, with Triton on CPU tensors; the variable has to be there before the import."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", str(HERE / f"test_fused_{op}.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent.parent)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"^(\d+) passed", run.stdout.splitlines()[-1])
    assert passed is not None, run.stdout[-500:]
    assert int(passed[1]) > 25


def compiled(
    op: str, arch: int, *, every_option: bool = True, one_client: bool = False, aligned: bool = True, g: str = "fp32"
) -> Any:
    """The kernel as a launch would specialise it: for `C` = 1 or more, and rows whose length divides by 16 or not."""
    kernel, constants, options = KERNELS[op]
    constants = {"SIZE": TILE, **constants} if "SIZE" in kernel.arg_names else dict(constants)
    if not every_option:
        constants |= dict.fromkeys(OPTIONAL[op])
    if op == "sam":  # a norm or a coefficient
        constants |= {"coefficient_ptr" if every_option else "partial_ptr": None}
        constants.pop("partial_ptr" if every_option else "coefficient_ptr", None)
    if one_client and "clients" in kernel.arg_names:
        constants["clients"] = 1
    kinds = {"active_ptr": "*i1", "partial_ptr": "*fp64", "g_ptr": f"*{g}", "direction_ptr": f"*{g}"}
    lengths = ["d", *(name for name in kernel.arg_names if name.endswith("_stride"))]
    kinds |= {"step_ptr": "*i64", "v_steps_ptr": "*fp64", "clients": "i32", "parts": "i32"}
    kinds |= dict.fromkeys(lengths, "i32")
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, "*fp32" if name.endswith("_ptr") else "fp32")
        for name in kernel.arg_names
    }
    divisible = [name for name, kind in signature.items() if kind.startswith("*") or (name in lengths and aligned)]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("every_option", [True, False])
@pytest.mark.parametrize("op", KERNELS)
def test_compiles_without_spills(op: str, every_option: bool, arch: int, tmp_path: Path) -> None:
    for g in ("fp32", "bf16"):
        for one_client in (True, False):
            kernel = compiled(op, arch, every_option=every_option, one_client=one_client, g=g)
            used = resources(kernel, tmp_path)
            assert kernel.metadata.shared <= SHARED_BYTES
            assert used["STACK"] == used["LOCAL"] == 0
            assert used["REG"] <= 128, "fewer than four programs fit a multiprocessor"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("op", ["adamw", "sgd", "sam"])
@pytest.mark.parametrize(("one_client", "aligned"), [(True, True), (True, False), (False, True)])
def test_accesses_of_whole_tiles_are_16_bytes_wide(op: str, one_client: bool, aligned: bool) -> None:
    """Of a single client at any length, of several where rows start on such a boundary."""
    ptx = compiled(op, 90, every_option=False, one_client=one_client, aligned=aligned).asm["ptx"]
    streams = {"adamw": (4, 3), "sgd": (2, 1), "sam": (2, 1)}[op]
    tile = SAM_TILE if op == "sam" else TILE
    vectors = tile // (4 * 32 * OPTIONS["num_warps"])
    for direction, count in zip(("ld", "st"), streams, strict=True):
        assert len(re.findall(rf"{direction}\.global\S*\.v4\.b32", ptx)) >= count * vectors


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("op", ["adamw", "sgd", "sam", "partial"])
def test_offsets_are_64_bits_wide(op: str) -> None:
    """`client · d` may exceed 2³¹: the product and every offset into a pointer are int64."""
    ir = compiled(op, 90, one_client=False).asm["ttir"]
    tile = {"sam": SAM_TILE, "partial": NORM_TILE}.get(op, TILE)
    assert set(re.findall(rf"tt\.addptr .* tensor<{tile}x(i\d+)>", ir)) == {"i64"}
    # `parts` counts partial sums, a few hundred a client.
    assert not [line for line in ir.splitlines() if re.search(r"arith\.muli .*: i32", line) and "%parts" not in line]
