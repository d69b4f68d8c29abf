#!/usr/bin/env bash
# From a fresh machine to a report: FedAvg and FedMuon on scikit-learn's digits, two ranks each. Takes a few minutes the
# first time, about one afterwards; every call makes a new folder of runs.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment

runs="runs/quickstart-$(date +%Y%m%d-%H%M%S)"
for algorithm in fedavg fedmuon; do
    echo "== $algorithm, 2 ranks"
    torchrun --standalone --nproc-per-node 2 -m fedkernels train \
        --config "configs/digits/$algorithm.yaml" --run_dir "$runs/$algorithm"
done
echo "== comparison"
python -m fedkernels report "$runs/fedavg" "$runs/fedmuon" --out "$runs/report.html"
