#!/usr/bin/env bash
# Pretrains on several hosts over ssh and pdsh, started from one of them.
# First checks the hosts: reachable, same code and versions, port free.
# Usage: [MASTER_PORT=29500] [MASTER_ADDR=A] bash launch/hostfile.sh HOSTFILE CONFIG [arguments of pretrain.py]
# HOSTFILE, CONFIG: paths from here, or from the project's folder; lines as in launch/hostfile.example. MASTER_ADDR: default the first of hostname -I on the first host.
# --set parallel.tensor=2 --set parallel.pipeline=2 sets the layout. docs/multinode.md explains the preparations.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage launch/hostfile.sh 2 "$@"
use_venv deepspeed

hostfile=$(locate "$1") config=$(locate "$2") port=${MASTER_PORT:-29500}
shift 2
python launch/check_hosts.py --master_port "$port" -- "$hostfile"
hostfile=$(plain_hostfile "$hostfile")
# pdsh passes what deepspeed reads from a file, on command lines that everyone on the hosts can see
[ -z "${MEGACHAT_SECRET:-}" ] ||
    fail "pdsh would show MEGACHAT_SECRET: put it into a file on every host, named in MEGACHAT_SECRET_FILE"
if [ -n "${MEGACHAT_SECRET_FILE:-}" ]; then
    DS_ENV_FILE=$(mktemp "${TMPDIR:-/tmp}/megachat-env.XXXXXX")
    export DS_ENV_FILE
    for file in ~/.deepspeed_env .deepspeed_env; do [ ! -f "$file" ] || awk 1 "$file"; done >"$DS_ENV_FILE"
    echo "MEGACHAT_SECRET_FILE=$(locate "$MEGACHAT_SECRET_FILE")" >>"$DS_ENV_FILE"
fi
# pdsh passes the words to a shell on each host, where brackets and quotes would be lost; deepspeed quotes those with blanks
words=()
for word in "$@"; do
    case $word in *" "*) words+=("$word") ;; *) words+=("$(printf %q "$word")") ;; esac
done
# force_multi: with a single host in the file, deepspeed would otherwise train on this machine, whatever its name
start_launcher deepspeed --quiet --force_multi --hostfile "$hostfile" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} \
    --master_port "$port" launch/pretrain.py --config "$config" ${words[@]+"${words[@]}"}
