#!/usr/bin/env bash
# Train on the ranks of one node or of many. Options of the launcher may stand anywhere; all others go to
# `fedkernels train`. Nothing is installed: the environment in .venv is used where there is one.
#
#   bash launch/torchrun.sh --nproc-per-node 2 --config configs/digits/fedmuon.yaml --rounds 3
#   bash launch/torchrun.sh --nnodes 4 --nproc-per-node 8 --rdzv-endpoint HEAD:29500 --rdzv-id fedmuon-1 \
#       --node-rank R --config configs/cifar100/fedmuon.yaml --cohort 64 --run_dir /shared/runs/c   # on each node, R = 0..3
#
#   --nproc-per-node N   ranks on this node: a number, or gpu, cpu or auto for one per device (1)
#   --nnodes N           nodes: a number, or MIN:MAX to go on while nodes come and go (1)
#   --rdzv-endpoint H:P  where nodes meet: address of the first node and a free port on it
#   --rdzv-id ID         name of this job, the same on all its nodes, another for every other job
#   --node-rank R        0 on the node of the endpoint, another number elsewhere (found out from host names)
#   --local-addr A       address of this node as the others reach it (what its host name resolves to)
#   --max-restarts N     how often ranks are started again after a failure (0 on one node, 3 on several); they go on
#                        from the newest checkpoint
#   --rdzv-conf K=V,...  time-outs of the rendezvous, see torchrun
#
# SIGTERM, SIGINT and SIGUSR1 stop the run at the end of its round, with a checkpoint. TORCH_ELASTIC_SHUTDOWN_TIMEOUT
# says how many seconds ranks have for that (30; releases of torch that do not read it wait as long).
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

nnodes=1 nproc=1 endpoint="" id="" node_rank="" address="" restarts="" conf=""
launcher=() train=()
while [ $# -gt 0 ]; do
    option="${1%%=*}"
    case "${option//_/-}" in
        --nnodes | --nproc-per-node | --rdzv-endpoint | --rdzv-id | --rdzv-conf | --node-rank | --local-addr \
            | --max-restarts)
            read_option "$@"
            shift "$used"
            launcher+=("$option" "$value")
            ;;
        -h | --help)
            show_help
            exit 0
            ;;
        *)
            train+=("$1")
            shift
            continue
            ;;
    esac
    case "$option" in
        --nnodes) nnodes="$value" ;;
        --nproc-per-node) nproc="$value" ;;
        --rdzv-endpoint) endpoint="$value" ;;
        --rdzv-id) id="$value" ;;
        --rdzv-conf) conf="$value" ;;
        --node-rank) node_rank="$value" ;;
        --local-addr) address="$value" ;;
        --max-restarts) restarts="$value" ;;
    esac
done

expect --nnodes "$nnodes" '[1-9][0-9]*(:[1-9][0-9]*)?' "a number of nodes, or MIN:MAX"
[ "${nnodes%:*}" -le "${nnodes#*:}" ] || fail "--nnodes: $nnodes, expected MIN:MAX with MIN at most MAX"
expect --nproc-per-node "$nproc" '[1-9][0-9]*|gpu|cpu|auto' "a number of ranks, or gpu, cpu or auto"
expect --rdzv-endpoint "$endpoint" '|[^ ]+:[1-9][0-9]{0,4}' "HOST:PORT"
[ -z "$endpoint" ] || [ "${endpoint##*:}" -le 65535 ] \
    || fail "--rdzv-endpoint: $endpoint, expected a port of at most 65535"
expect --node-rank "$node_rank" '|[0-9]+' "a number from 0"
expect --max-restarts "$restarts" '|[0-9]+' "a number from 0"
[ ${#train[@]} -gt 0 ] || fail "nothing to train; give --config FILE, see --help"

if [ -n "$endpoint" ]; then
    [ -n "$id" ] || fail "--rdzv-id: missing; give this job a name, the same on all its nodes"
    [ -z "$node_rank" ] || [ "$node_rank" -lt "${nnodes#*:}" ] \
        || fail "--node-rank: $node_rank, expected less than --nnodes $nnodes"
    # Who hosts the rendezvous is said, not guessed from host names, wherever the rank of the node is known.
    if [ -n "$node_rank" ]; then conf="is_host=$((node_rank == 0))${conf:+,$conf}"; fi
    torchrun=(--rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$id" ${conf:+--rdzv-conf "$conf"})
else
    [ "$nnodes" = 1 ] || fail "--rdzv-endpoint: missing; $nnodes nodes need HOST:PORT of the first one, the same on all"
    [ -z "$id$conf$node_rank$address" ] \
        || fail "--rdzv-endpoint: missing; --rdzv-id, --rdzv-conf, --node-rank and --local-addr are for several nodes"
    torchrun=(--standalone)
fi
if [ -z "$restarts" ]; then restarts=$([ "$nnodes" = 1 ] && echo 0 || echo 3); fi

use_environment torch
launched_by bash "$ROOT/launch/torchrun.sh" ${launcher[@]+"${launcher[@]}"}
exec python -m torch.distributed.run --nnodes "$nnodes" --nproc-per-node "$nproc" --max-restarts "$restarts" \
    ${address:+--local-addr "$address"} "${torchrun[@]}" --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m fedkernels train "${train[@]}"
