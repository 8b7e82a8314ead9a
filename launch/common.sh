# shellcheck shell=bash
# Sourced by the launchers: mistakes, --dry-run, the configuration.
# Takes --dry-run off the arguments and sets `run` to what is then done with a command.

# What is wrong and how to mend it.
fail() {
    echo "$*" >&2
    exit 2
}

# Print a command instead of running it.
show() {
    local words
    words="$(printf '%q ' "$@")"
    echo "${words% }"
}

# require_count NAME VALUE
require_count() {
    [[ "$2" =~ ^[1-9][0-9]*$ ]] || fail "$1 ($2) must be a whole number, 1 or more"
}

# check_config RANKS CONFIG [--section.field value ...]: before any of the ranks starts.
check_config() {
    local ranks="$1" problem code=0
    shift
    problem="$(python -m moetrain check "$@" --world-size "$ranks" 2>&1 >/dev/null)" || code=$?
    if ((code != 0)); then
        echo "$problem" >&2
        exit "$code"
    fi
}

run="exec"
# shellcheck disable=SC2034 # it is for the scripts that source this
if [[ "${1:-}" == --dry-run ]]; then
    run="show"
    shift
fi
[[ -n "${1:-}" && "$1" != -* ]] || fail "CONFIG must come first; usage:" \
    "$(sed -n 's/^# Usage: //p' "$0")"
