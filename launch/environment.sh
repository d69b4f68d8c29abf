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
    # DeepSpeed builds what it needs of its own kernels when it is used; ninja is what it builds with.
    DS_BUILD_OPS=0 python -m pip install --quiet --no-build-isolation --editable ".${1:+[$1]}"
    one_thread_per_rank
}

use_environment() {  # modules it must have; for launches: nothing is installed while ranks wait for each other
    # shellcheck disable=SC1091
    if [ -x "$VENV/bin/python" ]; then source "$VENV/bin/activate"; fi
    command -v python >/dev/null || fail "no python in $VENV or on the PATH; bash launch/quickstart.sh makes $VENV"
    # The package beside these scripts, whatever the working directory.
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    for module in "$@"; do
        python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" \
            || fail "$(command -v python) has no $module; install it there, or set VENV=... to one that has it"
    done
    one_thread_per_rank
}

one_thread_per_rank() {  # parallelism comes from ranks; more threads than cores would only fight each other
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
}

show_help() {  # what the calling script says of itself at its top
    sed -n '2,/^source/{/^source/d;s/^# \{0,1\}//p}' "$0"
}

read_option() {  # "$@" from an option on: sets option (with dashes, without value), value, and used, words taken
    option="${1%%=*}" used=1 value="${1#*=}"
    option="${option//_/-}"
    if [[ $1 != *=* ]]; then
        [[ $# -ge 2 && $2 != --* ]] || fail "$1: expected a value after it"
        value="$2" used=2
    fi
}

launched_by() {  # the command, without options of train: how the run folder says to start the run again
    FEDKERNELS_LAUNCHER="${FEDKERNELS_LAUNCHER:-$(printf '%q ' "$@")}"
    export FEDKERNELS_LAUNCHER
}

expect() {  # option, value, pattern, what was expected
    [[ $2 =~ ^($3)$ ]] || fail "$1: $2, expected $4"
}
