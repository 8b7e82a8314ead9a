#!/usr/bin/env bash
# From a bare clone to a trained model: install, train with the experts spread over two processes,
# evaluate, and write text. Runs on two GPUs, or on the CPU alone.
# Usage: launch/quickstart.sh [--section.field value ...]     (settings for the training run)
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

cd "$root"
run=runs/quickstart
export VENV NPROC=2
launch/train.sh configs/quickstart.yaml "$@" --name quickstart --out runs --parallel.ep 2
python -m moetrain eval "$run"
python -m moetrain generate "$run" --prompt "def " --temperature 0.8
echo
echo "The run is in $root/$run: metrics.jsonl, plots/*.png, checkpoints/."
