#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most eight minutes: build, tests, sanitizer, benchmarks.
# Results land under benchmarks/results/ with date, device, clocks and versions; logs in build/gpu_check/.
#
#   PYTHON    interpreter with a CUDA build of torch and this package's dependencies (python3)
#   BUDGET_S  seconds for everything (470); a stage that would overrun is cut off and counted as failed
#   OUT       folder of the results (benchmarks/results)
#
# Nothing is installed or downloaded, and the GPU's settings stay as they are. On 16 cores and an H100 the stages are
# expected to take some 90, 5, 100, 40, 30, 60 and 140 s. The limits of all but the last leave it 90 s at least; it comes
# last because it keeps what it has measured when it is cut off.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-benchmarks/results}"
DEADLINE=$((SECONDS + ${BUDGET_S:-470}))
LOGS=build/gpu_check
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: $PYTHON has no torch that sees a GPU; set PYTHON to an interpreter with a CUDA build of torch" >&2
    exit 2
fi
rm -rf "$LOGS"  # or a stage that is left out would show what it said another time
mkdir -p "$LOGS"
# Modules of this package's dependencies that PYTHON lacks; a stage that needs one of them fails and names it.
MISSING=$("$PYTHON" - <<'END'
from importlib.util import find_spec

names = "setuptools numpy pydantic rich yaml safetensors sklearn dp_accounting matplotlib triton pytest xdist ninja"
print(*(name for name in names.split() if find_spec(name) is None))
END
)
[ -n "$MISSING" ] && echo "missing in $PYTHON: $MISSING" >&2
has() { [[ " $MISSING " != *" $1 "* ]]; }

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu \
    --format=csv | tee "$LOGS/gpu.csv"
# This GPU's binaries alone take half the time of all that are shipped, whatever list the environment comes with.
TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print(*torch.cuda.get_device_capability(), sep=".")')
MAX_JOBS="${MAX_JOBS:-$(env -u OMP_NUM_THREADS nproc)}"  # nproc would count as many cores as OMP_NUM_THREADS says
export TORCH_CUDA_ARCH_LIST MAX_JOBS

summary=()
failed=0
stage() {  # name, most seconds, modules it needs, command...
    local name=$1 most=$2 needs=$3 left=$((DEADLINE - SECONDS)) start=$SECONDS lacks="" status module
    shift 3
    for module in $needs; do has "$module" || lacks+=" $module"; done
    [ "$left" -lt "$most" ] && most=$left
    if [ -n "$lacks" ]; then
        status="FAILED: $PYTHON lacks$lacks"
        failed=1
    elif [ "$most" -le 5 ]; then
        status="FAILED: no time left"
        failed=1
    else
        timeout --kill-after=10 "$most" "$@" >"$LOGS/$name.log" 2>&1
        local code=$?
        case $code in
            0) status=ok ;;
            124 | 137) status="FAILED: cut off after $most s (see $LOGS/$name.log)" ;;
            *) status="FAILED with $code (see $LOGS/$name.log)" ;;
        esac
        if [ "$code" -ne 0 ]; then
            failed=1
            tail -n 25 "$LOGS/$name.log"
        fi
    fi
    summary+=("$(printf '%-18s %4ds  %s' "$name" $((SECONDS - start)) "$status")")
    echo "${summary[-1]}"
}

# What needs no GPU, the emulator, the interpreter and ahead-of-time compilation, is left to the tests of every change.
tests=(tests/gpu tests/kernels --ignore tests/kernels/test_cuda.py --ignore tests/kernels/test_triton.py
    --ignore tests/kernels/test_newton_schulz_compiled.py)
has xdist && tests+=(--numprocesses 8)

sanitizer() {  # tool
    local found folder
    for folder in "" "${CUDA_HOME:-}/bin/" /usr/local/cuda/bin/; do
        if found=$(command -v "${folder}compute-sanitizer"); then
            exec "$found" --tool "$1" --error-exitcode 1 "$PYTHON" tests/gpu/sanitized.py
        fi
    done
    echo "no compute-sanitizer in PATH, in CUDA_HOME/bin or in /usr/local/cuda/bin" >&2
    exit 1
}
export PYTHON
export -f sanitizer

stage build 120 "setuptools" "$PYTHON" setup.py build_ext --inplace
stage extension 15 "numpy" "$PYTHON" -c '
from fedkernels.kernels.dispatch import MISSING
absent = {name: why for name, why in MISSING.items() if why}
raise SystemExit("; ".join(f"{name}: {why}" for name, why in absent.items()))'
stage tests 110 "pytest numpy pydantic rich yaml safetensors sklearn dp_accounting" \
    "$PYTHON" -m pytest -q -p no:cacheprovider "${tests[@]}"
for tool in memcheck racecheck synccheck; do
    stage "$tool" 15 "" bash -c 'sanitizer "$0"' "$tool"
done
stage round 40 "pydantic rich" "$PYTHON" benchmarks/round.py --device cuda --out "$OUT"
stage simulation 50 "pydantic rich" \
    "$PYTHON" benchmarks/simulation.py --device cuda --models lenet5 --rounds 8 --out "$OUT"
stage kernels $((DEADLINE - SECONDS)) "pydantic rich" \
    "$PYTHON" benchmarks/kernels.py --device cuda --op all --out "$OUT"

cat "$LOGS"/{round,simulation,kernels}.log 2>/dev/null
printf '%s\n' "" "gpu_check, $SECONDS s:" "${summary[@]}"
[ -n "$MISSING" ] && echo "missing in $PYTHON: $MISSING"
exit "$failed"
