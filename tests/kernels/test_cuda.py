"""The CUDA kernels without a GPU: their source run by an emulator, and compiled for sm_80 and sm_90."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_emulator import (
    CUDA,
    SHARED_BYTES,
    Batch,
    NewtonSchulz,
    batch_of,
    compile_operator,
    compile_source,
    run_operator,
)
from kernel_matrices import SPECTRA, matrix_of, oracle, random, relative_error
from torch import Tensor

from fedkernels.kernels import dispatch, muon_step
from fedkernels.kernels.dispatch import MISSING, BackendError, choose
from fedkernels.kernels.fused_sam import row_norm
from fedkernels.kernels.newton_schulz import RULES, Orthogonalization, newton_schulz, rules_of
from fedkernels.kernels.newton_schulz.cuda import cuda_on_matrices

METHODS: list[Orthogonalization] = ["newton_schulz", "polar_express"]
BOUND = 1e-2  # of the norm of the result, five steps; measured are 0.5 % at most
FORWARDS, BACKWARDS, SHUFFLED = 0, 1, 7
# Room for P of 64 rows and 64 columns of X, so that small matrices are shared by blocks, or stream through one.
LITTLE = 256 + 3 * 2048 + 2 * 2 * 2048


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> NewtonSchulz:
    return NewtonSchulz(tmp_path_factory.mktemp("sm_90"))


@pytest.fixture(scope="session")
def without_clusters(tmp_path_factory: pytest.TempPathFactory) -> NewtonSchulz:
    return NewtonSchulz(tmp_path_factory.mktemp("sm_80"), "-DFEDKERNELS_EMULATE_SM80")


@pytest.fixture(scope="session")
def primitives(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compile_source(Path(__file__).parent / "primitives.cu", tmp_path_factory.mktemp("primitives"))


@pytest.fixture(scope="session")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_operator(tmp_path_factory.mktemp("operator"))


def single(*shape: int, seed: int = 0) -> Tensor:
    return random(1, 1, *shape, seed=seed, dtype=torch.float32)


def pointer(array: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


# The emulator


def test_fragments_are_those_of_the_manual(primitives: ctypes.CDLL) -> None:
    """PTX ISA, matrix fragments of mma.m16n8k16 in .f16, and of ldmatrix .m8n8 .x4, by its formulas."""
    rng = np.random.default_rng(0)
    A, B = (rng.integers(-8, 9, shape).astype(np.float16) for shape in ((16, 16), (16, 8)))
    matrices = rng.integers(0, 1 << 10, (4, 8, 8)).astype(np.float16)
    a, b = np.empty((32, 8), np.float16), np.empty((32, 4), np.float16)
    for lane in range(32):
        group, t = lane >> 2, lane % 4
        for i in range(8):
            row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
            a[lane, i] = A[row, t * 2 + (i & 1) + (8 if i >= 4 else 0)]
        for i in range(4):
            b[lane, i] = B[t * 2 + (i & 1) + (8 if i >= 2 else 0), group]
    loaded, transposed = np.empty((32, 8), np.float16), np.empty((32, 8), np.float16)
    d = np.empty((32, 4), np.float32)
    assert primitives.run_primitives(*map(pointer, (matrices, a, b, loaded, transposed, d))) == 0
    product = A.astype(np.float64) @ B.astype(np.float64)
    for lane in range(32):
        group, t = lane >> 2, lane % 4
        for i in range(4):
            assert d[lane, i] == product[group if i < 2 else group + 8, t * 2 + (i & 1)]
        for matrix in range(4):
            for e in range(2):
                assert loaded[lane, 2 * matrix + e] == matrices[matrix, lane // 4, lane % 4 * 2 + e]
                assert transposed[lane, 2 * matrix + e] == matrices[matrix, lane % 4 * 2 + e, lane // 4]


def test_halves_are_rounded_as_ieee_says(primitives: ctypes.CDLL) -> None:
    """Ties, subnormals, the border to infinity, and everything in between, against numpy."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = every[np.isfinite(every)]
    with np.errstate(over="ignore", invalid="ignore"):
        ties = (np.sort(finite)[1:] + np.sort(finite)[:-1]) / 2
        rng = np.random.default_rng(0)
        values = np.concatenate(
            [every, ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf)),
             rng.standard_normal(1000) * 10 ** rng.uniform(-12, 6, 1000), [65519, 65520, -65520, 1e30, 3e-8, 0, -0.0]]
        ).astype(np.float32)  # fmt: skip
        values = np.resize(values, (len(values) + 63) // 64 * 64)
        expected = values.astype(np.float16)
    packed, unpacked = np.empty(len(values), np.float16), np.empty_like(values)
    assert primitives.run_halves(pointer(values), pointer(packed), pointer(unpacked), len(values) // 2) == 0
    number = ~np.isnan(values)
    assert np.array_equal(packed[number].view(np.uint16), expected[number].view(np.uint16))
    assert np.isnan(packed[~number]).all()
    assert np.array_equal(unpacked, packed.astype(np.float32), equal_nan=True)


def test_a_missing_barrier_shows(primitives: ctypes.CDLL) -> None:
    found = {}
    for barrier in (0, 1):
        for order in (FORWARDS, BACKWARDS, SHUFFLED):
            values = np.empty(64, np.int32)
            primitives.fedkernels_emulator_order(order)
            assert primitives.run_ring(pointer(values), barrier) == 0
            found[barrier, order] = values.tolist()
    assert found[1, FORWARDS] == [(i + 33) % 64 + 1 for i in range(64)]
    assert found[1, FORWARDS] == found[1, BACKWARDS] == found[1, SHUFFLED]
    assert len({tuple(found[0, order]) for order in (FORWARDS, BACKWARDS, SHUFFLED)}) > 1


def test_what_would_hang_or_overrun_fails(primitives: ctypes.CDLL, capfd: pytest.CaptureFixture[str]) -> None:
    assert primitives.run_stuck(pointer(np.empty(64, np.int32))) == 1
    assert "deadlock" in capfd.readouterr().err
    assert primitives.run_overrun() == 1
    assert "beyond its end" in capfd.readouterr().err


# Newton–Schulz


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(144, 160), (60, 40)])
def test_spectra(emulated: NewtonSchulz, spectrum: str, shape: tuple[int, int], method: Orthogonalization) -> None:
    u = matrix_of(spectrum, *shape).float()
    (o,) = emulated([u.view(1, 1, *shape)], 5, method)
    assert relative_error(o[0, 0], oracle(u, 5, method)) <= BOUND


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (7, 3), (17, 300), (33, 65), (129, 200), (192, 192)])
@pytest.mark.parametrize("method", METHODS)
def test_shapes(emulated: NewtonSchulz, shape: tuple[int, int], method: Orthogonalization) -> None:
    u = single(*shape)
    kept = u.clone()
    (o,) = emulated([u], 5, method)
    assert relative_error(o, oracle(u, 5, method)) <= BOUND
    assert torch.equal(u, kept)


@pytest.mark.parametrize(("shape", "cluster"), [((192, 768), 2), ((255, 256), 1), ((256, 256), 1), ((256, 700), 4)])
def test_large(emulated: NewtonSchulz, shape: tuple[int, int], cluster: int) -> None:
    u = single(*shape)
    assert emulated.plan([batch_of(u, u)], SHARED_BYTES[90], 8).cluster == cluster
    (o,) = emulated([u], 5, "polar_express", order=SHUFFLED)
    assert relative_error(o, oracle(u, 5, "polar_express")) <= BOUND


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("max_cluster", [1, 4])
def test_steps(emulated: NewtonSchulz, steps: int, max_cluster: int) -> None:
    u = single(40, 150)
    (o,) = emulated([u], steps, shared_limit=LITTLE, max_cluster=max_cluster)
    assert relative_error(o, oracle(u, steps)) <= BOUND


@pytest.mark.parametrize("max_cluster", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(40, 300), (300, 64), (33, 129)])
def test_streamed_and_shared(emulated: NewtonSchulz, shape: tuple[int, int], max_cluster: int) -> None:
    """A slab passes through one block in pieces, or lies in several, the last of which may have few columns or none."""
    u = single(*shape)
    plan = emulated.plan([batch_of(u, u)], LITTLE, max_cluster)
    assert plan.shared_bytes == LITTLE
    assert (plan.workspace_floats > 0) == (max_cluster > 1)
    found = [
        emulated([u], shared_limit=LITTLE, max_cluster=max_cluster, order=order)[0]
        for order in (FORWARDS, BACKWARDS, SHUFFLED)
    ]
    assert relative_error(found[0], oracle(u)) <= BOUND
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_without_clusters(without_clusters: NewtonSchulz) -> None:
    """On sm_80: one block, less shared memory, other panels."""
    for shape in ((230, 240), (40, 700)):
        u = single(*shape)
        (o,) = without_clusters([u], shared_limit=SHARED_BYTES[80], max_cluster=1, order=SHUFFLED)
        assert relative_error(o, oracle(u)) <= BOUND


def model(seed: int = 0) -> list[Tensor]:
    """Batches of different shapes, tall ones among them, as they lie in rows `[C, d]` with other parameters between."""
    shapes = [(1, 40, 130), (2, 130, 40), (2, 17, 9), (3, 1, 30), (1, 64, 64)]
    size = sum(count * rows * cols + 3 for count, rows, cols in shapes)
    flat, batches, at = random(2, size, seed=seed, dtype=torch.float32), [], 1
    for count, rows, cols in shapes:
        batches.append(flat[:, at : at + count * rows * cols].view(2, count, rows, cols))
        at += count * rows * cols + 3
    return batches


@pytest.mark.parametrize("max_cluster", [1, 4])
def test_a_whole_model_in_one_launch(emulated: NewtonSchulz, max_cluster: int) -> None:
    """Some matrices in clusters, others several to a cluster, from addresses that are not aligned."""
    us = model()
    found = [emulated(us, shared_limit=LITTLE, max_cluster=max_cluster, order=order) for order in (FORWARDS, SHUFFLED)]
    for u, o, again in zip(us, *found, strict=True):
        assert relative_error(o, oracle(u)) <= BOUND
        assert torch.equal(o, again)


def test_strides_of_the_output(emulated: NewtonSchulz) -> None:
    """Nothing is written between and around matrices, whatever their strides."""
    for rows, cols in ((20, 37), (37, 20), (64, 64)):
        space = torch.full((2, 3, rows + 2, cols + 3), 7.0)
        out = space[..., 1:-1, 1:-2]
        u = random(2, 3, cols, rows, dtype=torch.float32).mT
        emulated([u], outs=[out])
        assert relative_error(out, oracle(u)) <= BOUND
        out.fill_(7)
        assert (space == 7).all()


def test_matrices_far_apart(emulated: NewtonSchulz) -> None:
    """Offsets are 64 bits wide. Memory that nobody touches costs nothing."""
    far = 2**31 + 12
    u, o = (torch.empty(far + 64).as_strided((1, 2, 5, 8), (0, far, 8, 1)) for _ in range(2))
    u.copy_(random(1, 2, 5, 8))
    emulated([u], outs=[o])
    assert relative_error(o, oracle(u)) <= BOUND


@pytest.mark.parametrize("max_cluster", [1, 2])
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_what_is_not_finite_stays_alone(emulated: NewtonSchulz, bad: float, max_cluster: int) -> None:
    us = [u.clone() for u in model()]
    us[0][1, 0, 3, 99] = bad
    us[1][0, 0, 7, 1] = bad
    us[4][1, 0, 63, 63] = bad
    os = emulated(us, shared_limit=LITTLE, max_cluster=max_cluster)
    for u, o, clean in zip(us, os, emulated(model(), shared_limit=LITTLE, max_cluster=max_cluster), strict=True):
        finite = u.isfinite().all(-1).all(-1)
        assert o[~finite].isnan().all()
        assert torch.equal(o[finite], clean[finite])


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (50, 3), (33, 33)])
def test_zero_stays_zero(emulated: NewtonSchulz, shape: tuple[int, int]) -> None:
    (o,) = emulated([torch.zeros(1, 2, *shape)])
    assert torch.equal(o, torch.zeros(1, 2, *shape))


@pytest.mark.parametrize("rank", [1, 3])
def test_rank_deficient(emulated: NewtonSchulz, rank: int) -> None:
    u = (random(1, 1, 48, rank) @ random(1, 1, rank, 70, seed=1)).float()
    (o,) = emulated([u])
    assert relative_error(o, oracle(u)) <= BOUND


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-7, 1e-5, 1e5, 1e19, 1e37])
def test_scales(emulated: NewtonSchulz, scale: float) -> None:
    """As far as floats go, the 1e-7 of the division included."""
    for shape in ((9, 20), (70, 40)):
        u = (random(1, 1, *shape) * scale).float()
        (o,) = emulated([u])
        assert relative_error(o * 1e20, oracle(u) * 1e20) <= BOUND


# Launch and dispatch


def test_the_operator(operator: Path, tmp_path: Path) -> None:
    """Through torch: a whole model with strides, any dimensions, an empty batch, more batches than one launch takes."""
    us = [*model(), random(20, 37, dtype=torch.float32).mT, single(0, 5), random(3, 33, 65, dtype=torch.float32)]
    us.append(random(2, 2, 2, 9, 20, dtype=torch.float32)[:, :, 0])
    us += [random(3, 4, seed=seed, dtype=torch.float32) for seed in range(100)]
    for u, o in zip(us, run_operator(operator, us, LITTLE, tmp_path), strict=True):
        assert o.shape == u.shape
        assert o.is_contiguous()
        if u.numel():
            assert relative_error(o, oracle(u)) <= BOUND


def test_code_without_clusters_gets_none(
    emulated: NewtonSchulz, without_clusters: NewtonSchulz, tmp_path: Path
) -> None:
    """Where PTX of sm_80 runs on a newer device, a matrix that the device could share has to stay with one block."""
    for kernel, clusters in ((emulated, 8), (without_clusters, 1)):
        most = ctypes.c_int(0)
        assert kernel.library.fedkernels_newton_schulz_max_cluster(ctypes.byref(most)) == 0
        assert most.value == clusters
    u = single(40, 300)
    old = compile_operator(tmp_path, "-DFEDKERNELS_EMULATE_SM80")
    (o,) = run_operator(old, [u], LITTLE, tmp_path)
    assert relative_error(o, oracle(u)) <= BOUND


def test_plans_fit(emulated: NewtonSchulz) -> None:
    """Shared memory is enough for every size, and whatever is up to 256² stays on chip where sm_90 has it."""
    for arch, limit in SHARED_BYTES.items():
        for short in (1, 32, 33, 96, 128, 129, 160, 192, 224, 225, 256):
            for long in (short, 2 * short, 1000 + short, 100_000):
                batch = Batch(count=3, inner=3, short_side=short, long_side=long)
                plan = emulated.plan([batch], limit, 8 if arch == 90 else 1)
                assert plan.clusters * plan.cluster >= 3
                if arch == 90 and long == short:
                    assert plan.cluster == 1


def test_vit_tiny_is_one_wave(emulated: NewtonSchulz) -> None:
    """48 matrices of 192² in pairs, 24 of 192×768 in clusters of two: 96 of the 132 multiprocessors of an H100."""
    square = Batch(count=48, inner=48, short_side=192, long_side=192)
    wide = Batch(count=24, inner=24, short_side=192, long_side=768)
    plan = emulated.plan([square, wide], SHARED_BYTES[90], 8)
    assert (plan.cluster, plan.clusters) == (2, 24 + 24)


def test_rules() -> None:
    rule = RULES["cuda"]
    assert rule("cuda", torch.float32, (2, 129, 500)) is None
    assert rule("cuda", torch.float32, (500, 256)) is None
    assert rule("cuda", torch.float32, (2, 128, 500)) == "left to triton up to a short side of 128, as 128"
    assert cuda_on_matrices("cuda", torch.float32, (2, 128, 500)) is None
    assert rule("cuda", torch.float32, (257, 500)) == "holds short sides up to 256 on chip, not 257"
    assert rule("cuda", torch.float64, (200, 500)) == "computes in float32, not in float64"
    assert rule("cpu", torch.float32, (200, 500)) == "runs on cuda, not on cpu"


def test_more_steps_than_the_kernel_holds_go_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the rule says, so that the choice is Triton's; who asks for CUDA hears why not."""
    for backend in ("cuda", "triton"):
        monkeypatch.setitem(MISSING, backend, None)
    for op in (rules_of, muon_step.rules_of):
        for steps, backend in ((32, "cuda"), (33, "triton")):
            assert choose("op", op(steps), "cuda", torch.float32, (2, 200, 500)).backend == backend
        with pytest.raises(BackendError, match="backend=cuda cannot run op: takes at most 32 steps, not 33"):
            choose("op", op(33, "cuda"), "cuda", torch.float32, (2, 200, 500), "cuda")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch can build the CUDA kernels here")
def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MISSING["cuda"] == "extension built without CUDA: install with nvcc and a CUDA build of torch present"
    with pytest.raises(BackendError, match="backend=cuda cannot run newton_schulz: extension built without CUDA"):
        newton_schulz(torch.eye(2), backend="cuda")
    with pytest.raises(BackendError, match="backend=cuda cannot run row_norm: not written for this op"):
        row_norm(torch.ones(2), backend="cuda")
    monkeypatch.setattr(dispatch, "MISSING", MISSING | {"cuda": None})
    with pytest.raises(BackendError, match="backend=cuda cannot run newton_schulz: runs on cuda, not on cpu"):
        newton_schulz(torch.eye(2), backend="cuda")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_90a"])
@pytest.mark.parametrize("source", sorted(CUDA.glob("*.cu")), ids=lambda path: path.stem)
def test_compiles_without_spills(source: Path, arch: str, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        if os.environ.get("FEDKERNELS_TEST_WITHOUT_NVCC") == "1":
            pytest.skip("FEDKERNELS_TEST_WITHOUT_NVCC=1")
        pytest.fail("no nvcc to compile the CUDA kernels; FEDKERNELS_TEST_WITHOUT_NVCC=1 goes on without it")
    command = ["nvcc", "-std=c++17", "-cubin", f"-arch={arch}", "-Xptxas", "-v", source, "-o", tmp_path / "cubin"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert set(re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", run.stderr)) == {"0"}
    assert not re.search(r"bytes smem", run.stderr), "all shared memory is what the plan asks for"
    # Twelve warps: more registers would not start.
    assert max(map(int, re.findall(r"Used (\d+) registers", run.stderr))) * 384 <= 65_536
