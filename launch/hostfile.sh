#!/usr/bin/env bash
# Pretrains on several hosts over ssh and pdsh, started from one of them.
# First checks the hosts: reachable, same code and versions, port free.
# Usage: [MASTER_PORT=29500] [MASTER_ADDR=A] bash launch/hostfile.sh HOSTFILE CONFIG [arguments of pretrain.py]
# HOSTFILE: lines as in launch/hostfile.example. MASTER_ADDR: default the first of hostname -I on the first host.
# --set parallel.tensor=2 --set parallel.pipeline=2 sets the layout. docs/multinode.md explains the preparations.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${2:-} in "" | -h | --help) sed -n '2,/^$/s/^# //p' "launch/${0##*/}"; [ "${1:-}" = -h ]; exit ;; esac
command -v deepspeed >/dev/null || PATH="$PWD/.venv/bin:$PATH"

hostfile=$1 config=$2 port=${MASTER_PORT:-29500}
shift 2
python launch/check_hosts.py "$hostfile" --master_port "$port"
# force_multi: with a single host in the file, deepspeed would otherwise train on this machine, whatever its name
exec deepspeed --quiet --force_multi --hostfile "$hostfile" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} \
    --master_port "$port" launch/pretrain.py --config "$config" "$@"
