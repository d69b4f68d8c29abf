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
from fedkernels.kernels.fused_sgd.triton import SGD_OPTIONS, sgd_kernel
from fedkernels.kernels.round_tail.triton import (
    accumulate_kernel,
    bf16_kernel,
    int8_kernel,
    tile_of,
    total_kernel,
)
from fedkernels.kernels.tiles import OPTIONS, TILE

HERE = Path(__file__).parent
# Kernel, its compile-time constants, launch options; the optional pointers come from OPTIONAL.
KERNELS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "adamw": (
        adamw_kernel,
        {"LR_PER_CLIENT": False, "STEP_PER_CLIENT": False, "V_STEPS_PER_CLIENT": True, "SCALE_PER_CLIENT": True},
        OPTIONS,
    ),
    "adamw by client": (
        adamw_kernel,
        {"LR_PER_CLIENT": True, "STEP_PER_CLIENT": True, "V_STEPS_PER_CLIENT": False, "SCALE_PER_CLIENT": False},
        OPTIONS,
    ),
    "sgd": (sgd_kernel, {"LR_PER_CLIENT": False, "SCALE_PER_CLIENT": True}, SGD_OPTIONS),
    "sgd by client": (sgd_kernel, {"LR_PER_CLIENT": True, "SCALE_PER_CLIENT": False}, SGD_OPTIONS),
    "sam": (sam_kernel, {"ONE_ROW": False, "PER_CLIENT": False, "PARTS": PARTS, "SIZE": SAM_TILE}, OPTIONS),
    "sam by client": (sam_kernel, {"ONE_ROW": False, "PER_CLIENT": True, "PARTS": PARTS, "SIZE": SAM_TILE}, OPTIONS),
    "sam along one row": (sam_kernel, {"ONE_ROW": True, "PER_CLIENT": True, "PARTS": PARTS, "SIZE": SAM_TILE}, OPTIONS),
    "partial": (partial_kernel, {"SIZE": NORM_TILE}, NORM_OPTIONS),
    "norm": (norm_kernel, {"PARTS": PARTS}, OPTIONS),
    "int8": (int8_kernel, {"CHUNK": 256, "CHUNKS": tile_of(256)[0], "WIDTH": tile_of(256)[1]}, OPTIONS),
    "int8 by 7": (int8_kernel, {"CHUNK": 7, "CHUNKS": tile_of(7)[0], "WIDTH": tile_of(7)[1]}, OPTIONS),
    "int8 by 4100": (int8_kernel, {"CHUNK": 4100, "CHUNKS": tile_of(4100)[0], "WIDTH": tile_of(4100)[1]}, OPTIONS),
    "bf16": (bf16_kernel, {}, OPTIONS),
    "accumulate": (accumulate_kernel, {}, OPTIONS),
    "accumulate in float32": (accumulate_kernel, {}, OPTIONS),
    "total": (total_kernel, {"PARTS": PARTS}, OPTIONS),
}
OPTIONAL = {
    "adamw": ["G_ptr", "scale_ptr", "active_ptr", "x_ptr", "delta_ptr"],
    "sgd": ["m_ptr", "G_ptr", "scale_ptr", "active_ptr", "x_ptr", "delta_ptr"],
    "sam": ["saved_ptr", "coefficient_ptr"],
    "partial": [],
    "norm": [],
    "bf16": ["x_ptr", "residual_ptr", "begins_ptr", "ends_ptr", "payload_ptr"],
    "accumulate": [],
    "total": [],
}
OPTIONAL["int8"] = [*OPTIONAL["bf16"], "scale_ptr"]


@pytest.mark.skipif(INTERPRETED, reason="this is the run that the test starts")
@pytest.mark.parametrize("op", ["fused_adamw", "fused_sgd", "fused_sam", "round_tail"])
def test_interpreted(op: str) -> None:
    """The tests of the op once more, with Triton on CPU tensors; the variable has to be there before the import."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", str(HERE / f"test_{op}.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent.parent)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"^(\d+) passed", run.stdout.splitlines()[-1])
    assert passed is not None, run.stdout[-500:]
    assert int(passed[1]) > 25


def compiled(
    name: str,
    arch: int,
    *,
    every_option: bool = True,
    one_client: bool = False,
    aligned: bool = True,
    g: str = "fp32",
    length: str = "i32",
) -> Any:
    """The kernel as a launch would specialise it: for `C` = 1 or more, and rows whose length divides by 16 or not, and
    is 2³¹ or more or not."""
    kernel, constants, options = KERNELS[name]
    op = name.split()[0]
    constants = {"SIZE": TILE, **constants} if "SIZE" in kernel.arg_names else dict(constants)
    if not every_option:
        constants |= dict.fromkeys(OPTIONAL[op])
    if op == "sam":  # a norm or a coefficient
        from_norm = every_option and not constants["PER_CLIENT"]
        constants |= {"coefficient_ptr" if from_norm else "partial_ptr": None}
        constants.pop("partial_ptr" if from_norm else "coefficient_ptr", None)
    if one_client and "clients" in kernel.arg_names:
        constants["clients"] = 1
    kinds = {"active_ptr": "*i1", "partial_ptr": "*fp64", "g_ptr": f"*{g}", "direction_ptr": f"*{g}"}
    lengths = ["d", *(name for name in kernel.arg_names if name.endswith("_stride"))]
    kinds |= {"step_ptr": "*i64", "v_steps_ptr": "*fp64", "clients": "i32", "parts": "i32"}
    kinds |= {"payload_ptr": "*i16" if op == "bf16" else "*i8", "total_ptr": "*fp64", "spans": "i32", "wire": "i32"}
    kinds |= {"sums_ptr": "*fp32" if name == "accumulate in float32" else "*fp64", "weights_ptr": "*fp64"}
    kinds |= dict.fromkeys(("begins_ptr", "ends_ptr", "key_ptr", "clients_ptr"), "*i64")
    kinds |= dict.fromkeys(lengths, length)
    signature = {
        at: "constexpr" if at in constants else kinds.get(at, "*fp32" if at.endswith("_ptr") else "fp32")
        for at in kernel.arg_names
    }
    divisible = [at for at, kind in signature.items() if kind.startswith("*") or (at in lengths and aligned)]
    attributes = {(kernel.arg_names.index(at),): [["tt.divisibility", 16]] for at in divisible}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("every_option", [True, False])
@pytest.mark.parametrize("op", KERNELS)
def test_compiles_without_spills(op: str, every_option: bool, arch: int, tmp_path: Path) -> None:
    """For one client and several, of rows that are aligned and not; for gradients in bfloat16, and for long rows."""
    launches: list[dict[str, Any]] = [
        {"one_client": one, "aligned": aligned} for one in (True, False) for aligned in (True, False)
    ]
    launches += [{"g": "bf16"}, {"g": "bf16", "aligned": False}, {"length": "i64", "aligned": False}]
    for launch in launches:
        kernel = compiled(op, arch, every_option=every_option, **launch)
        used = resources(kernel, tmp_path)
        assert kernel.metadata.shared <= SHARED_BYTES
        assert used["STACK"] == used["LOCAL"] == 0, launch
        assert used["REG"] <= 128, f"fewer than four programs fit a multiprocessor: {launch}"


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


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("op", ["partial", "accumulate", "bf16", "adamw"])
def test_nothing_is_added_to_a_length_of_32_bits(op: str) -> None:
    """Which may be 2³¹ − 1: what rounds it up to whole tiles would be negative."""
    ir = compiled(op, 90).asm["ttir"]
    assert not [line for line in ir.splitlines() if re.search(r"arith\.addi %d, .*: i32", line)]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("op", ["int8", "int8 by 7", "int8 by 4100", "bf16", "accumulate"])
def test_offsets_into_strided_rows_are_64_bits_wide(op: str) -> None:
    """To the row of a client, and of the columns in it. Sums go on from the row before, by a stride."""
    ir = compiled(op, 90, one_client=False).asm["ttir"]
    to_row = re.findall(r"tt\.addptr %(?:values|residual|payload|scale|decoded)_ptr, .*, (i\d+)", ir)
    columns = set(re.findall(r"tt\.addptr .* tensor<[\dx]+x(i\d+)>", ir))
    if op == "accumulate":
        assert columns == {"i32", "i64"}
    else:
        assert len(to_row) == (4 if op == "bf16" else 5)
        assert {*to_row, *columns} == {"i64"}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("op", "store"), [("int8", "v4.b32"), ("bf16", "v4.b32"), ("accumulate", "v2.b64")])
@pytest.mark.parametrize("one_client", [True, False])
def test_accesses_of_whole_messages_are_16_bytes_wide(op: str, store: str, one_client: bool) -> None:
    """Without spans, where rows start on such a boundary."""
    ptx = compiled(op, 90, every_option=False, one_client=one_client).asm["ptx"]
    for direction, width in (("ld", "v4.b32"), ("st", store)):
        assert re.search(rf"{direction}\.global\S*\.{width}", ptx)
