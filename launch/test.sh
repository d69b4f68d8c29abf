#!/usr/bin/env bash
# Everything that must pass: lint, types, tests. Arguments go to pytest.
#
#   bash launch/test.sh                # all, with a SLURM cluster and nodes of their own on this machine: needs root
#   bash launch/test.sh --no-cluster   # without those, for a laptop
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if ! command -v c++ >/dev/null; then
    fail "no C++ compiler, which torch.compile needs; on Debian and Ubuntu: apt-get install g++"
fi
if ! command -v nvcc >/dev/null; then
    echo "note: no nvcc here, so the CUDA kernels are not compiled; their other tests run" >&2
    export FEDKERNELS_TEST_WITHOUT_NVCC="${FEDKERNELS_TEST_WITHOUT_NVCC:-1}"
fi
selection=()
if [ "${1:-}" = --no-cluster ]; then
    selection=(-m "not cluster")
    shift
elif [ "$(id -u)" != 0 ] || ! type slurmctld slurmd munged ip >/dev/null 2>&1; then
    packages="on Debian and Ubuntu: apt-get install slurm-wlm munge iproute2"
    fail "tests of clusters need root, SLURM, munge and iproute2 ($packages); without: bash launch/test.sh --no-cluster"
fi
prepare_environment dev

ruff check .
ruff format --check .
mypy
# nproc counts as many cores as OMP_NUM_THREADS says, which is one for every rank.
python -m pytest --numprocesses "$(env -u OMP_NUM_THREADS nproc)" ${selection[@]+"${selection[@]}"} "$@"
