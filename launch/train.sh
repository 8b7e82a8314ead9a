#!/usr/bin/env bash
# Train on all GPUs of this node, or on the CPU where there are none.
# Usage: launch/train.sh CONFIG [--section.field value ...]
#
#   NPROC        ranks on this node (default: one per GPU; 1 on the CPU)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
#                several nodes: run the same command on each, with its own NODE_RANK.
#                A single node listens on loopback alone, on any free port.
#
# A mistake in the configuration is one message and exit code 2, before any rank starts.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
ranks="${NPROC:-$((gpus > 0 ? gpus : 1))}"
nodes="${NNODES:-1}"
if ((gpus > 0 && ranks > gpus)); then
    echo "NPROC ($ranks) is more than the GPUs here ($gpus): training on the CPU." >&2
    export CUDA_VISIBLE_DEVICES=""
fi

problem="$(python -m moetrain check "$@" --world-size $((nodes * ranks)) 2>&1 >/dev/null)" || {
    code=$?
    echo "$problem" >&2
    exit "$code"
}

cores="$(getconf _NPROCESSORS_ONLN)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}"

if ((nodes == 1)); then
    loopback="$([[ "$(uname)" == Darwin ]] && echo lo0 || echo lo)"
    export GLOO_SOCKET_IFNAME="$loopback" NCCL_SOCKET_IFNAME="$loopback"
    exec python -m moetrain.torchrun --nproc-per-node="$ranks" -m moetrain train "$@"
fi
exec python -m torch.distributed.run --nproc-per-node="$ranks" --nnodes="$nodes" \
    --node-rank="${NODE_RANK:?must be set when NNODES is above 1}" \
    --master-addr="${MASTER_ADDR:?must be set when NNODES is above 1}" \
    --master-port="${MASTER_PORT:-29500}" -m moetrain train "$@"
