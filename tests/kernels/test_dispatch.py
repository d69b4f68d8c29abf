"""The choice of a backend: by device and dtype, by request, and what is said where one cannot run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fedkernels
from fedkernels.cli import main
from fedkernels.kernels import dispatch
from fedkernels.kernels.dispatch import MISSING, ON_ROWS, BackendError, Choice, Kernels, choose
from fedkernels.kernels.fused_adamw import fused_adamw
from fedkernels.kernels.overview import MATRICES, MATRIX_OPS, OPS, SHAPES

ROOT = Path(__file__).resolve().parents[2]
HERE = {"triton": None, "cpp": None, "reference": None}


def chosen(device: str = "cpu", dtype: torch.dtype = torch.float32, backend: str | None = None) -> Choice:
    return choose("fused_adamw", ON_ROWS, device, dtype, (2, 10), backend)


def test_the_extension_and_triton_are_here() -> None:
    """The environment that runs the tests has a compiler and the developers' extra; whether it has a GPU is open."""
    assert {backend: reason for backend, reason in MISSING.items() if backend != "cuda"} == HERE


@pytest.mark.parametrize(
    ("device", "dtype", "backend"),
    [
        ("cpu", torch.float32, "cpp"),
        ("cpu", torch.float64, "cpp"),
        ("cpu", torch.bfloat16, "reference"),
        ("cuda", torch.float32, "triton"),
        ("cuda", torch.float64, "reference"),
        ("mps", torch.float32, "reference"),
    ],
)
def test_by_device_and_dtype(device: str, dtype: torch.dtype, backend: str) -> None:
    assert chosen(device, dtype).backend == backend


def test_says_why() -> None:
    choice = chosen("cuda", torch.float64)
    assert choice.why == "no other can"
    assert choice.refused == {
        "triton": "computes in float32, not in float64",
        "cpp": "runs on cpu, not on cuda",
    }


def test_falls_back_where_something_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MISSING", HERE | {"cpp": "extension not built"})
    choice = chosen()
    assert choice.backend == "reference"
    assert choice.refused == {"triton": "runs on cuda, not on cpu", "cpp": "extension not built"}
    with pytest.raises(BackendError, match=r"^backend=cpp cannot run fused_adamw: extension not built$"):
        chosen(backend="cpp")


def test_by_request(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(backend="reference") == Choice("reference", "asked for by backend", {})
    monkeypatch.setenv("FEDKERNELS_BACKEND", "reference")
    assert chosen() == Choice("reference", "asked for by FEDKERNELS_BACKEND", {})
    assert chosen(backend="cpp").backend == "cpp"
    monkeypatch.setenv("FEDKERNELS_BACKEND", "triton")
    with pytest.raises(BackendError, match="FEDKERNELS_BACKEND=triton cannot run fused_adamw: runs on cuda"):
        chosen()
    monkeypatch.setenv("FEDKERNELS_BACKEND", "gpu")
    with pytest.raises(ValueError, match="FEDKERNELS_BACKEND=gpu: unknown backend, expected one of cuda, triton"):
        chosen()


def test_an_op_refuses_as_the_dispatcher_does() -> None:
    y, m, v, g = torch.zeros(4, 2, 5).unbind()
    one = torch.ones(())
    constants = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    with pytest.raises(BackendError, match="backend=triton cannot run fused_adamw: runs on cuda"):
        fused_adamw(y, m, v, g, lr=one, step=one, v_steps=one, **constants, backend="triton")
    with pytest.raises(ValueError, match="backend=fast: unknown backend"):
        fused_adamw(y, m, v, g, lr=one, step=one, v_steps=one, **constants, backend="fast")


def test_schemas_of_backends_agree() -> None:
    """The entry points hand the same arguments to either, and Muon's step in Triton one more, who takes matrices."""
    import fedkernels.kernels.fused_adamw.triton
    import fedkernels.kernels.fused_sam.triton
    import fedkernels.kernels.fused_sgd.triton
    import fedkernels.kernels.muon_step.triton
    import fedkernels.kernels.newton_schulz.triton
    import fedkernels.kernels.round_tail.triton  # noqa: F401  the imports define the operators

    for op in (*(op for op, rules in OPS.items() if "triton" in rules), *MATRIX_OPS):
        schemas = [str(getattr(torch.ops.fedkernels, f"{op}_{name}").default._schema) for name in ("cpp", "triton")]
        more = ", str inner" if op == "muon_step" else ""
        assert schemas[0].replace("_cpp(", "_triton(").replace(") -> ", f"{more}) -> ") == schemas[1]


@pytest.mark.parametrize("cuda", ["extension built without CUDA", None])
def test_the_command_says_it_all(
    cuda: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the extension has kernels in CUDA C++ or not."""
    monkeypatch.setitem(MISSING, "cuda", cuda)
    assert main(["kernels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in dispatch.VARIABLES:
        assert any(line.split()[:1] == [name] for line in lines)
    starts = [f"{op:<13} {name:<14} " for op in OPS for name in SHAPES]
    matrices = [f"{name} {n}x{rows}x{cols}" for name, shapes in MATRICES.items() for n, rows, cols in shapes]
    starts += [f"{op:<13} {what:<14} " for op in MATRIX_OPS for what in matrices]
    table = lines[lines.index("cpu, float32:") + 1 :][: len(starts)]
    for line, start in zip(table, starts, strict=True):
        refused = "" if start.startswith("exact_add ") else "; not triton: runs on cuda, not on cpu"
        if start.split()[0] in MATRIX_OPS:
            refused = f"; not cuda: {cuda or 'runs on cuda, not on cpu'}{refused}"
        assert line.strip() == f"{start}cpp: the fastest on cpu{refused}"


def test_the_command_with_a_backend_that_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDKERNELS_BACKEND", "triton")
    assert main(["kernels"]) == 0
    said = capsys.readouterr().out
    assert "FEDKERNELS_BACKEND=triton cannot run fused_adamw: runs on cuda, not on cpu" in said
    assert "FEDKERNELS_BACKEND=triton cannot run exact_add: not written for this op" in said


def test_the_command_says_where_matrices_go(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU, by size, and where CUDA is asked for: what `newton_schulz` and `muon_step` themselves would choose."""
    for backend in ("cuda", "triton"):
        monkeypatch.setitem(MISSING, backend, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def said(what: str) -> dict[str, str]:
        assert main(["kernels"]) == 0
        on_gpu = capsys.readouterr().out.split("cuda, float32:")[1].splitlines()
        lines = {op: next(line for line in on_gpu if line.split()[:3] == [op, *what.split()]) for op in MATRIX_OPS}
        return {op: line.split(f"{what} ")[1].strip() for op, line in lines.items()}

    medium, small, large = "vit_tiny 48x192x192", "lora_r16 32x16x2048", "vit_b 48x768x768"
    assert set(said(medium).values()) == {"cuda: the fastest on cuda"}
    reason = "left to triton up to a short side of 128, as 16"
    assert set(said(small).values()) == {f"triton: the fastest on cuda; not cuda: {reason}"}
    monkeypatch.setenv("FEDKERNELS_BACKEND", "cuda")
    assert set(said(small).values()) == {"cuda: asked for by FEDKERNELS_BACKEND"}
    refused = "holds short sides up to 256 on chip, not 768"
    assert said(large) == {op: f"FEDKERNELS_BACKEND=cuda cannot run {op}: {refused}" for op in MATRIX_OPS}
    monkeypatch.setitem(MISSING, "triton", "triton is not installed")
    said_now = said(small)
    assert said_now["newton_schulz"].startswith("cuda: ")
    assert "begins and ends in triton, and that cannot: triton is not installed" in said_now["muon_step"]


def test_a_run_is_refused_for_any_op_that_it_needs() -> None:
    """Before its first round: steps run on C++ here, and an op that C++ does not have is asked for as well."""
    Kernels("cpp").check("cpu", torch.float32, 10, {})
    with pytest.raises(BackendError, match="kernels=cpp cannot run other: not written for this op"):
        Kernels("cpp").check("cpu", torch.float32, 10, {"other": {}})


def test_every_compiled_op_is_expected_of_the_extension() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "bindings").glob("*.cpp"))
    assert set(dispatch.COMPILED) == set(re.findall(r'"(\w+)_cpp\(', sources))


def test_an_extension_that_lacks_an_op_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "COMPILED", ("fused_sgd", "newer"))
    assert "older than this package" in (dispatch._load_extension() or "")
    assert "lacks newer" in (dispatch._load_extension() or "")


@pytest.mark.parametrize(("spoilt", "reason"), [(False, "extension not built"), (True, "extension does not load")])
def test_works_without_the_extension(spoilt: bool, reason: str, tmp_path: Path) -> None:
    """A copy of the package without its compiled part, or with one that another torch left behind."""
    shutil.copytree(
        Path(fedkernels.__file__).parent, tmp_path / "fedkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    if spoilt:
        (tmp_path / "fedkernels" / "_C.abi3.so").write_bytes(b"not a library")
    program = """
import torch
from fedkernels.kernels.dispatch import MISSING
from fedkernels.kernels.fused_sam import row_norm
assert row_norm(torch.tensor([[3.0, 4.0]])).tolist() == [5.0]
print(MISSING["cpp"])
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(reason)


@pytest.mark.parametrize(
    ("architectures", "built"),
    [
        (None, None),
        ("", "8.0+PTX;9.0+PTX"),
        ("7.5 8.0 Volta;9.0a 12.0+PTX", "8.0;9.0a;12.0+PTX"),
        ("5.0;7.5+PTX", None),
    ],
)
def test_installs_without_a_compiler(architectures: str | None, built: str | None, tmp_path: Path) -> None:
    """A line says that there are no kernels and why, another one which are not there for CUDA; nothing fails.

    With CUDA, it is compiled for what the environment lists, but for what is too old.
    """
    cuda = architectures is not None
    root = Path(__file__).parent.parent.parent
    for name in ("setup.py", "README.md", "pyproject.toml"):
        shutil.copy(root / name, tmp_path)
    for name in ("csrc", "fedkernels"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    environment = os.environ | {"CXX": "no-such-compiler", "CC": "no-such-compiler", "MAX_JOBS": "1"}
    program = ["setup.py"]
    if cuda:  # a torch that claims to be built for it, and an nvcc that fails
        nvcc = tmp_path / "cuda" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text("#!/bin/sh\nexit 1\n")
        nvcc.chmod(0o755)
        environment |= {"CUDA_HOME": str(tmp_path / "cuda"), "TORCH_CUDA_ARCH_LIST": architectures}
        claim = "import os, runpy, torch; from torch.utils import cpp_extension; torch.version.cuda = '13.0'"
        claim += "; cpp_extension.CUDA_HOME = os.environ['CUDA_HOME']"
        build = "runpy.run_path('setup.py', run_name='__main__'); print('for', os.environ['TORCH_CUDA_ARCH_LIST'])"
        program = ["-c", f"{claim}; {build}"]
    run = subprocess.run(
        [sys.executable, *program, "build_ext", "--inplace"], cwd=tmp_path, capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    said = [line.split(" kernels: ") for line in run.stdout.splitlines() if line.startswith("fedkernels: no ")]
    assert [line[0] for line in said] == ["fedkernels: no CUDA", "fedkernels: no C++"]
    assert ("a build without CUDA" in said[0][1]) == (not cuda and torch.version.cuda is None)
    if built is not None:
        assert run.stdout.splitlines()[-1] == f"for {built}"
    elif cuda:
        assert said[0][1] == "TORCH_CUDA_ARCH_LIST=5.0;7.5+PTX has nothing from 8.0 on"
    left_out = {"7.5 8.0 Volta;9.0a 12.0+PTX": "7.5, Volta", "5.0;7.5+PTX": "5.0, 7.5+PTX"}.get(architectures or "")
    told = f"fedkernels: CUDA kernels leave out {left_out} of TORCH_CUDA_ARCH_LIST, they begin at 8.0"
    assert (told in run.stdout.splitlines()) == (left_out is not None)
    assert not list(tmp_path.glob("fedkernels/*.so"))
