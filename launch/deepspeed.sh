#!/usr/bin/env bash
# Train with DeepSpeed's engine, started by DeepSpeed's launcher on the hosts of a hostfile.
# Usage: launch/deepspeed.sh [--dry-run] CONFIG [--section.field value ...]
#
#   HOSTFILE       one line per host, "worker-0 slots=8": its name and its ranks (default: hostfile)
#   MASTER_ADDR    where the others reach the first host (default: its own first address)
#   MASTER_PORT    default: 29500
#
# Run it on one machine, from the root of the repository. The hosts need this repository and the
# environment (VENV) at the same paths, pdsh and ssh without a password. Variables for the ranks go
# into .deepspeed_env, one NAME=value per line. On a single host, use
# launch/train.sh CONFIG --engine.kind deepspeed.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

hostfile="${HOSTFILE:-hostfile}"
[[ -f "$hostfile" ]] ||
    fail "HOSTFILE ($hostfile) is not a file; write one line per host: worker-0 slots=8"
read -r hosts ranks <<<"$(awk '$2 ~ /^slots=[0-9]+$/ && !/^#/ { hosts++; ranks += substr($2, 7) }
    END { print hosts + 0, ranks + 0 }' "$hostfile")"
((hosts > 1)) || fail "HOSTFILE ($hostfile) must name two hosts or more, each as worker-0 slots=8;" \
    "on a single host use launch/train.sh $* --engine.kind deepspeed"

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
settings=("$@" --engine.kind deepspeed)
check_config "$ranks" "${settings[@]}"

"$run" deepspeed --hostfile="$hostfile" ${MASTER_ADDR:+--master_addr="$MASTER_ADDR"} \
    --master_port="${MASTER_PORT:-29500}" --no_local_rank --module moetrain train "${settings[@]}"
