# shellcheck shell=bash
# Sourced by the scripts beside it: sets `root` and puts an environment with moetrain on PATH.
#
#   VENV     an environment that has moetrain already; it is used as it is.
#            Without it, .venv in the repository is made, and renewed when pyproject.toml changes.
#   PYTHON   interpreter to make .venv with, 3.11 or newer (default: python3)
#   EXTRA    optional dependencies to install into .venv (default: test)

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

make_environment() {
    local python="${PYTHON:-python3}" extra="${EXTRA:-test}" wanted
    wanted="$extra $root $(cksum <"$root/pyproject.toml")"
    if [[ "$(cat "$VENV/installed" 2>/dev/null)" == "$wanted" ]]; then
        return
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "moetrain needs Python 3.11 or newer; $python is not: set PYTHON" >&2
        return 1
    fi
    echo "Installing moetrain and what it needs into $VENV (minutes, once)." >&2
    "$python" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet -e "${root}[$extra]"
    # Last, so that an interrupted installation is done again.
    echo "$wanted" >"$VENV/installed"
}

if [[ -z "${VENV:-}" ]]; then
    VENV="$root/.venv"
    make_environment
fi
export PATH="$VENV/bin:$PATH"
