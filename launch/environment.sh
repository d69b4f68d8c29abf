# Sourced by the scripts beside it: a virtual environment in .venv with PyTorch and this package, made once; and how
# launch scripts read their options.
#
#   PYTHON  interpreter to build it with (python3)
#   VENV    where it lies (.venv in the repository)
#   TORCH   what to install as PyTorch (torch==2.13.0); pip's own settings choose between CPU and CUDA builds

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-$ROOT/.venv}"

fail() {  # a message; bad input is status 2 everywhere
    echo "error: $1" >&2
    exit 2
}

prepare_environment() {  # extras of the package, such as "hf,dev"
    cd "$ROOT"
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        fail "$PYTHON is $("$PYTHON" --version 2>&1 || true), expected Python 3.11 or newer; set PYTHON=..."
    fi
    if [ ! -x "$VENV/bin/python" ] && ! "$PYTHON" -m venv "$VENV"; then
        rm -rf "$VENV"
        fail "$PYTHON -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"
    fi
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
    python -m pip install --quiet --upgrade pip setuptools wheel
    python -c 'import torch' 2>/dev/null || python -m pip install --quiet "${TORCH:-torch==2.13.0}"
    python -m pip install --quiet --no-build-isolation --editable ".${1:+[$1]}"
    one_thread_per_rank
}

use_environment() {  # what is there already, for launches: nothing is installed while ranks wait for each other
    # shellcheck disable=SC1091
    if [ -x "$VENV/bin/python" ]; then source "$VENV/bin/activate"; fi
    command -v python >/dev/null || fail "no python in $VENV or on the PATH; bash launch/quickstart.sh makes $VENV"
    # The package beside these scripts, whatever the working directory.
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    python -c 'import importlib.util as i, sys; sys.exit(i.find_spec("torch") is None)' \
        || fail "$(command -v python) has no torch; bash launch/quickstart.sh makes $VENV, or set VENV=..."
    one_thread_per_rank
}

one_thread_per_rank() {  # parallelism comes from ranks; more threads than cores would only fight each other
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
}

read_option() {  # "$@" from an option on: sets option (with dashes, without value), value, and used, words taken
    option="${1%%=*}" used=1 value="${1#*=}"
    option="${option//_/-}"
    if [[ $1 != *=* ]]; then
        [[ $# -ge 2 && $2 != --* ]] || fail "$1: expected a value after it"
        value="$2" used=2
    fi
}

expect() {  # option, value, pattern, what was expected
    [[ $2 =~ ^($3)$ ]] || fail "$1: $2, expected $4"
}
