#!/usr/bin/env bash
# Train on all GPUs of this node, or on the CPU where there are none; on one node or several.
# Usage: launch/train.sh [--dry-run] CONFIG [--section.field value ...]
#
#   NPROC        ranks on this node (default: one per GPU; 1 on the CPU)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
#                several nodes: run the same command on each, with its own NODE_RANK (default: as
#                srun numbers them). A single node listens on loopback alone, on any free port.
#                NNODES=MIN:MAX goes on with the nodes that are left, and takes in new ones.
#   MAX_RESTARTS how often the ranks are started again when some are lost (default: 3; 0 for a fixed
#                number of several nodes). They continue from the newest checkpoint.
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME
#                several nodes: the interface that ranks talk over (default: as Gloo and NCCL choose)
#
# --dry-run checks the configuration and prints the command. A mistake in the configuration is one
# message and exit code 2, before any rank starts. Stopped by a signal, it saves and exits with 75.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

nodes="${NNODES:-1}" node="${NODE_RANK:-${SLURM_NODEID:-}}"
fewest="${nodes%%:*}" most="${nodes##*:}"
require_count NNODES "$fewest"
require_count NNODES "$most"
((fewest <= most)) || fail "NNODES ($nodes) must be MIN:MAX with MIN not above MAX"
require_count NPROC "${NPROC:-1}"
[[ "${MAX_RESTARTS:-0}" =~ ^[0-9]+$ ]] ||
    fail "MAX_RESTARTS ($MAX_RESTARTS) must be a whole number, 0 or more"
if ((most > 1)); then
    [[ -n "${MASTER_ADDR:-}" ]] ||
        fail "MASTER_ADDR must be set when NNODES is above 1: where the other nodes reach node 0"
    [[ "$nodes" == *:* || ("$node" =~ ^[0-9]+$ && "$node" -lt "$nodes") ]] ||
        fail "NODE_RANK (${node:-not set}) must be one of 0 to $((nodes - 1)), another on each node"
fi

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
gpus=0
if [[ -n "${CUDA_VISIBLE_DEVICES-all}" ]]; then # empty, it hides them all
    gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
fi
ranks="${NPROC:-$((gpus > 0 ? gpus : 1))}"
for ((n = fewest; n <= most; n++)); do
    LOCAL_WORLD_SIZE="$ranks" check_config $((n * ranks)) "$@"
done

# nproc knows how many cores this process may use; it is not on every system.
cores="$(OMP_NUM_THREADS='' nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
variables=("OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}")
if ((gpus > 0 && ranks > gpus)); then
    echo "NPROC ($ranks) is more than the GPUs here ($gpus): training on the CPU." >&2
    variables+=("CUDA_VISIBLE_DEVICES=")
fi
agent=(moetrain.torchrun --nproc-per-node="$ranks")
restarts=3
if ((most > 1)); then
    port="${MASTER_PORT:-29500}"
    agent+=(--nnodes="$nodes")
    if [[ "$nodes" == *:* ]]; then
        agent+=(--rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:$port"
            --rdzv-id="${SLURM_JOB_ID:-moetrain}")
    else
        agent+=(--node-rank="$node" --master-addr="$MASTER_ADDR" --master-port="$port")
        restarts=0 # a node that came back would not find the others
    fi
fi
agent+=(--max-restarts="${MAX_RESTARTS:-$restarts}")
"$run" env "${variables[@]}" python -m "${agent[@]}" -m moetrain train "$@"
