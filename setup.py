"""Packaging of fedkernels; metadata is here, tool settings are in pyproject.toml."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent


def no_cuda():
    """Why the CUDA kernels are not compiled, or None."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return "nvcc is not here; CUDA_HOME may say where it is"
    return None


# Names that TORCH_CUDA_ARCH_LIST knows for what is below 8.0.
OLD = {"Kepler", "Kepler+Tegra", "Maxwell", "Maxwell+Tegra", "Pascal", "Volta", "Turing"}


def architectures(listed):
    """Of a TORCH_CUDA_ARCH_LIST, those that the kernels compile for, and those before 8.0, for which they do not."""

    def old(name):
        number = re.match(r"\d+\.\d+", name)
        return name in OLD if number is None else float(number[0]) < 8

    names = listed.replace(";", " ").split()
    return [name for name in names if not old(name)], [name for name in names if old(name)]


def kernels():
    """The C++ kernels as arguments of `setup`: compiled where torch and a compiler are, left out where they are not."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except (ImportError, OSError):
        print("fedkernels: no C++ kernels: torch is not here to build against (pip install --no-build-isolation)")
        return {}

    def sources(*patterns):
        return sorted(str(path.relative_to(here)) for pattern in patterns for path in here.glob(pattern))

    def extension(kind, *patterns):
        # Without contraction to fused multiply-adds every instruction set gives the same bits. Nobody catches
        # floating-point traps; to say so lets comparisons and floor become vectors.
        flags = ["-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
        return kind(
            "fedkernels._C",
            sources(*patterns),
            depends=sources("csrc/*/*.h"),
            extra_compile_args={"cxx": flags, "nvcc": ["-O3"]},
            extra_link_args=["-fopenmp"],
            optional=True,
        )

    cpp = extension(CppExtension, "csrc/*/*.cpp")
    built = cpp
    if (reason := no_cuda()) is None:
        # Binaries of two generations, and PTX of each for those after it.
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0+PTX;9.0+PTX"
        known, old = architectures(listed)
        if old:
            print(f"fedkernels: CUDA kernels leave out {', '.join(old)} of TORCH_CUDA_ARCH_LIST, they begin at 8.0")
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(known)
        reason = None if known else f"TORCH_CUDA_ARCH_LIST={listed} has nothing from 8.0 on"
    if reason is None:
        built = extension(CUDAExtension, "csrc/*/*.cpp", "csrc/cuda/*.cu", "csrc/bindings/cuda/*.cpp")
    else:
        print(f"fedkernels: no CUDA kernels: {reason}")

    class BuildKernels(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # An editable install would build in a temporary folder and compile everything every time.
            self.build_temp = str(here / "build" / "kernels")

        def build_extensions(self):
            if built is not cpp and self.build("CUDA"):
                return
            for name in ("sources", "include_dirs", "library_dirs", "libraries"):
                setattr(built, name, getattr(cpp, name))
            self.build("C++")

        def build(self, what):
            """Whether the extension could be built; a line says why it could not."""
            built.optional = False  # or setuptools would keep the error to itself
            try:
                super().build_extensions()
            except Exception as error:  # whatever a compiler or linker can do wrong
                print(f"fedkernels: no {what} kernels: {type(error).__name__}: {' '.join(str(error).split())}")
                return False
            finally:
                built.optional = True  # and an editable install would miss what was not built
            return True

    return {"ext_modules": [built], "cmdclass": {"build_ext": BuildKernels}}


init = (here / "fedkernels" / "__init__.py").read_text()
version = re.search(r'__version__ = "(.+)"', init).group(1)
extras = {
    "triton": ["triton>=3.5; platform_system == 'Linux'"],
    "deepspeed": ["deepspeed>=0.18"],
    "hf": ["transformers>=5.24", "peft>=0.18"],
    "tensorboard": ["tensorboard>=2.16"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3",
        "ruff>=0.9",
        "mypy>=1.13",
        "types-PyYAML",
        "ninja",
    ],
}
# The tests cover what the optional packages do.
extras["dev"] += extras["hf"] + extras["tensorboard"] + extras["triton"] + extras["deepspeed"]

setup(
    name="fedkernels",
    version=version,
    description="Multi-node federated training on torch.distributed",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["fedkernels", "fedkernels.*"]),
    package_data={"fedkernels": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "pydantic>=2.8",
        "pyyaml>=6",
        "rich>=13",
        "matplotlib>=3.8",
        "scikit-learn>=1.4",
        "safetensors>=0.4.5",
        "pillow>=10",
        "dp-accounting>=0.6",
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["fedkernels=fedkernels.cli:main"]},
    **kernels(),
)
