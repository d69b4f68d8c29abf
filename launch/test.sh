#!/usr/bin/env bash
# Everything that must pass: lint, types, tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if ! command -v c++ >/dev/null; then
    echo "error: no C++ compiler, which torch.compile needs; on Debian and Ubuntu: apt-get install g++" >&2
    exit 2
fi
prepare_environment dev

ruff check .
ruff format --check .
mypy
python -m pytest --numprocesses "$(nproc)" "$@"
