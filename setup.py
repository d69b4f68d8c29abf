"""Packaging of fedkernels; metadata is here, tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent


def kernels():
    """The C++ kernels as arguments of `setup`: compiled where torch and a compiler are, left out where they are not."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print("fedkernels: no C++ kernels: torch is not here to build against (pip install --no-build-isolation)")
        return {}

    class BuildKernels(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # An editable install would build in a temporary folder and compile everything every time.
            self.build_temp = str(here / "build" / "kernels")

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:  # whatever a compiler or linker can do wrong
                print(f"fedkernels: no C++ kernels: {type(error).__name__}: {' '.join(str(error).split())}")

    extension = CppExtension(
        "fedkernels._C",
        sorted(str(path.relative_to(here)) for path in here.glob("csrc/*/*.cpp")),
        depends=sorted(str(path.relative_to(here)) for path in here.glob("csrc/*/*.h")),
        # Without contraction to fused multiply-adds every instruction set gives the same bits.
        extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"],
        extra_link_args=["-fopenmp"],
        optional=True,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildKernels}}


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
