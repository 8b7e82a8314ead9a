#!/usr/bin/env bash
# Run the test suite, from a bare clone on: make the environment, install, test.
# Usage: launch/test.sh [pytest arguments]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # ranks are many and small: one thread for each
# Three files at a time, since tests of several processes mostly wait for them; in the order of
# collection, slow ones first; a file stays with one worker, which keeps its ranks.
exec python -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder "$@"
