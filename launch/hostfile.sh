#!/usr/bin/env bash
# Several hosts over ssh and pdsh, started from one of them. The hosts are checked first: reachable, same code and versions, port free.
# Usage: [MASTER_PORT=29500] [MASTER_ADDR=A] bash launch/hostfile.sh HOSTFILE CONFIG [arguments of pretrain.py]
# HOSTFILE: lines as in launch/hostfile.example. MASTER_ADDR: default the first address that the first host tells (hostname -I).
# The layout is told by --set parallel.tensor=2 --set parallel.pipeline=2. docs/multinode.md has the steps before.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${2:-} in "" | -h | --help) sed -n '2,/^$/s/^# //p' "launch/${0##*/}"; [ "${1:-}" = -h ]; exit ;; esac
command -v deepspeed >/dev/null || PATH="$PWD/.venv/bin:$PATH"

hostfile=$1 config=$2 port=${MASTER_PORT:-29500}
shift 2
python launch/check_hosts.py "$hostfile" --master_port "$port"
# force_multi: with one host in the file deepspeed would otherwise train on this machine, whichever the file names
exec deepspeed --quiet --force_multi --hostfile "$hostfile" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} --master_port "$port" \
    launch/pretrain.py --config "$config" "$@"
