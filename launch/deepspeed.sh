#!/usr/bin/env bash
# Train through DeepSpeed's launcher, on this machine or on the hosts of a hostfile. Options of the launcher may stand
# anywhere; all others go to `fedkernels train`. Nothing is installed: the environment in .venv is used where there is
# one.
#
#   bash launch/deepspeed.sh --nproc-per-node 2 --config configs/digits/fedmuon.yaml --rounds 3
#   bash launch/deepspeed.sh --hostfile hosts --config C --run_dir /shared/runs/a            # on one, by ssh and pdsh
#   bash launch/deepspeed.sh --hostfile hosts --node-rank R --master-addr HEAD --config C    # on each, without ssh
#
#   --hostfile FILE      lines of HOST slots=RANKS, see launch/hostfile.example (this machine alone)
#   --nproc-per-node N   ranks on each host (its slots; on this machine alone its GPUs, or 1 without any)
#   --nnodes N           only the first N hosts of the hostfile (all)
#   --master-addr A      address of the first host (asked from it by ssh)
#   --master-port P      free port on the first host, another for every job (29500; on this machine alone any free one)
#   --node-rank R        place of this host in the hostfile, counted from 0: start its ranks and no others
#
# There are no restarts: start the same command again with --resume. To stop a run at the end of its round, send its
# ranks SIGUSR1; DeepSpeed ends them 30 s after SIGTERM.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

hostfile="" ranks="" nodes="" address="" port="" node_rank=""
launcher=() train=()
while [ $# -gt 0 ]; do
    option="${1%%=*}"
    case "${option//_/-}" in
        --hostfile | --nproc-per-node | --nnodes | --master-addr | --master-port | --node-rank)
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
        --hostfile) hostfile="$value" ;;
        --nproc-per-node) ranks="$value" ;;
        --nnodes) nodes="$value" ;;
        --master-addr) address="$value" ;;
        --master-port) port="$value" ;;
        --node-rank) node_rank="$value" ;;
    esac
done

for option in --nproc-per-node:ranks --nnodes:nodes --master-port:port; do
    name="${option#*:}"
    expect "${option%:*}" "${!name}" '|[1-9][0-9]*' "a number from 1"
done
expect --node-rank "$node_rank" '|[0-9]+' "a number from 0"
[ ${#train[@]} -gt 0 ] || fail "nothing to train; give --config FILE, see --help"

if [ -n "$hostfile" ]; then
    # DeepSpeed would go on with this machine alone.
    [ -f "$hostfile" ] || fail "--hostfile: $hostfile is not there, expected a file of lines HOST slots=RANKS"
    [ -z "$node_rank" ] || [ -n "$address" ] || fail "--master-addr: missing; with --node-rank no host is asked for it"
else
    [ -z "$nodes$address$node_rank" ] || fail "--hostfile: missing; --nnodes, --master-addr and --node-rank need one"
fi

use_environment torch deepspeed
if [ -z "$hostfile" ]; then
    # A GPU or none, said rather than found out with a warning.
    if [ ! -e /dev/nvidiactl ] && [ ! -e /dev/kfd ]; then
        export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
        ranks="${ranks:-1}"
    fi
    port="${port:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}"
fi
launched_by bash "$ROOT/launch/deepspeed.sh" ${launcher[@]+"${launcher[@]}"}
if [ -n "$hostfile" ] && [ -z "$node_rank" ]; then
    # What ssh would lose: the variables of .deepspeed_env, where there is one, and those that matter to a run.
    DS_ENV_FILE="$(mktemp)"
    trap 'rm -f "$DS_ENV_FILE"' EXIT
    cat "$HOME/.deepspeed_env" .deepspeed_env 2>/dev/null >"$DS_ENV_FILE" || true
    matters='^(FEDKERNELS|(TORCH_)?NCCL|TORCH_ELASTIC|GLOO|UCX|FI|OMP|MKL|CUDA|PET|TRITON)_|^DS_ACCELERATOR'
    # DeepSpeed gives out GPUs itself.
    env | grep -E "$matters" | grep -v '^CUDA_VISIBLE_DEVICES=' >>"$DS_ENV_FILE"
    export DS_ENV_FILE
fi
python -m deepspeed.launcher.runner --module --no_local_rank ${hostfile:+--hostfile "$hostfile"} \
    ${ranks:+--num_gpus "$ranks"} ${nodes:+--num_nodes "$nodes"} ${address:+--master_addr "$address"} \
    ${port:+--master_port "$port"} ${node_rank:+--no_ssh --node_rank "$node_rank"} fedkernels train "${train[@]}"
