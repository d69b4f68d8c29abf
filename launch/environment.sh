# Sourced by the scripts beside it: a virtual environment in .venv with PyTorch and this package, made once.
#
#   PYTHON  interpreter to build it with (python3)
#   VENV    where it lies (.venv in the repository)
#   TORCH   what to install as PyTorch (torch==2.13.0); pip's own settings choose between CPU and CUDA builds

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-$PWD/.venv}"

prepare_environment() {  # extras of the package, such as "hf,dev"
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: $PYTHON is $("$PYTHON" --version 2>&1 || true), expected Python 3.11 or newer; set PYTHON=..." >&2
        exit 2
    fi
    if [ ! -x "$VENV/bin/python" ] && ! "$PYTHON" -m venv "$VENV"; then
        rm -rf "$VENV"
        echo "error: $PYTHON -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 2
    fi
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
    python -m pip install --quiet --upgrade pip setuptools wheel
    python -c 'import torch' 2>/dev/null || python -m pip install --quiet "${TORCH:-torch==2.13.0}"
    # DeepSpeed builds what it needs of its own kernels when it is used; ninja is what it builds with.
    DS_BUILD_OPS=0 python -m pip install --quiet --no-build-isolation --editable ".${1:+[$1]}"
    # Parallelism comes from ranks; more threads than cores would only fight each other.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
}
