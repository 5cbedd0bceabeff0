# What the scripts in launch/ share; they source it first. It needs bash and coreutils only.
[ "${BASH_SOURCE[0]}" != "$0" ] || { echo "Usage: source launch/common.sh, as the other scripts here do" && exit; }
caller=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

fail() {
    echo "error: $1" >&2
    exit 2
}

# usage SCRIPT REQUIRED ARGUMENTS...: prints the comment at the top of SCRIPT and exits, with status 0 for -h and --help
# in one of the first REQUIRED arguments, with 2 if one of these is missing.
usage() {
    local script=$1 required=$2 argument status=
    shift 2
    [ $# -ge "$required" ] || status=2
    for argument in "${@:1:required}" "${1:-}"; do
        case $argument in -h | --help) status=0 ;; esac
    done
    [ -z "$status" ] || { sed -n '2,/^[^#]*$/s/^# \{0,1\}//p' "$script" && exit "$status"; }
}

# Prints the path of a file: relative to the caller's folder if it is there, else to the project's.
locate() {
    if [ "$caller" != "$root" ] && [ "${1#/}" = "$1" ] && [ -e "$caller/$1" ]; then echo "$caller/$1"; else echo "$1"; fi
}

# Fails unless each of the variables is unset or a whole number of at least 1.
require_counts() {
    local name
    for name in "$@"; do
        [[ ${!name:-1} =~ ^[1-9][0-9]{0,5}$ ]] || fail "$name is '${!name}': give a whole number of at least 1"
    done
}

# Prints a hostfile without a byte order mark, which deepspeed and mpirun take for a part of the first name.
plain_hostfile() {
    local copy
    if [ -r "$1" ] && [ "$(LC_ALL=C head -c 3 "$1")" = $'\xef\xbb\xbf' ]; then
        copy=$(mktemp "${TMPDIR:-/tmp}/megachat-hosts.XXXXXX")
        LC_ALL=C tail -c +4 "$1" | tr -d '\r' >"$copy"
        echo "$copy"
    else
        echo "$1"
    fi
}

# Prints MASTER_PORT if it is set, else a port that is free on this machine.
master_port() {
    [ -n "${MASTER_PORT:-}" ] && echo "$MASTER_PORT" ||
        python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# Prints the number of ranks of a --layout among the arguments, such as 4 for --layout tp=2,pp=2; nothing without one.
layout_ranks() {
    local word previous="" size ranks=""
    for word in "$@"; do
        [ "$previous" != --layout ] || word=--layout=$word
        if [[ $word =~ ^--layout=([a-z]+=[0-9]{1,4},?)+$ ]]; then
            word=${word#--layout=} ranks=1
            for size in ${word//,/ }; do ranks=$((ranks * 10#${size#*=})); done
        fi
        previous=$word
    done
    echo "$ranks"
}

# Runs deepspeed or torchrun in place of the script. Ctrl-C while it is imported ends it with one line.
start_launcher() { exec python -m megachat.job.launcher_process "$@"; }

use_venv() { command -v "$1" >/dev/null || PATH="$root/.venv/bin:$PATH"; }

# Gives the ranks that the script starts a new secret, unless the user gave them one (docs/multinode.md).
share_secret() {
    [ -z "${MEGACHAT_SECRET:-}${MEGACHAT_SECRET_FILE:-}" ] || return 0
    MEGACHAT_SECRET=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    export MEGACHAT_SECRET
}
