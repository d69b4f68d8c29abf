#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most eight minutes: build, tests, sanitizer, benchmarks.
# Results land under benchmarks/results/ with date, device and versions; logs in build/gpu_check/.
#
#   PYTHON    interpreter with a CUDA build of torch and this package's dependencies (python3)
#   BUDGET_S  seconds for everything (470); a stage that would overrun is cut off and counted as failed
#   OUT       folder of the results (benchmarks/results)
#
# Nothing is installed or downloaded, and the GPU's settings stay as they are.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
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
mkdir -p "$LOGS"
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu \
    --format=csv | tee "$LOGS/gpu.csv"

summary=()
failed=0
stage() {  # name, most seconds, command...
    local name=$1 most=$2 left=$((DEADLINE - SECONDS)) start=$SECONDS status
    shift 2
    [ "$left" -lt "$most" ] && most=$left
    if [ "$most" -le 5 ]; then
        status="FAILED: no time left"
        failed=1
    elif timeout --kill-after=10 "$most" "$@" >"$LOGS/$name.log" 2>&1; then
        status=ok
    else
        status="FAILED with $? (see $LOGS/$name.log)"
        failed=1
        tail -n 25 "$LOGS/$name.log"
    fi
    summary+=("$(printf '%-12s %4ds  %s' "$name" $((SECONDS - start)) "$status")")
    echo "${summary[-1]}"
}

workers=()
"$PYTHON" -c 'import xdist' 2>/dev/null && workers=(--numprocesses 8)

stage build 120 "$PYTHON" setup.py build_ext --inplace
stage kernels 150 "$PYTHON" -m pytest -q -p no:cacheprovider "${workers[@]}" tests/kernels tests/gpu/test_graphs.py
stage trainer 120 "$PYTHON" -m pytest -q -p no:cacheprovider "${workers[@]}" tests/gpu --ignore tests/gpu/test_graphs.py
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck; do
        stage "$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" tests/gpu/sanitized.py
    done
else
    summary+=("sanitizer    not run: no compute-sanitizer on this machine")
fi
stage benchmark 150 "$PYTHON" benchmarks/kernels.py --device cuda --op all --out "$OUT"
stage simulation 90 "$PYTHON" benchmarks/simulation.py --device cuda --out "$OUT"

cat "$LOGS/benchmark.log" "$LOGS/simulation.log" 2>/dev/null
printf '%s\n' "" "gpu_check, $SECONDS s:" "${summary[@]}"
exit "$failed"
