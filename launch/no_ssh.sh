#!/usr/bin/env bash
# Pretrains on several hosts without ssh: run this on every host, within parallel.rendezvous_s of each other.
# Usage: [MASTER_PORT=29500] bash launch/no_ssh.sh HOSTFILE NODE_RANK MASTER_ADDR CONFIG [arguments of pretrain.py]
# HOSTFILE: the same on every host, lines as in launch/hostfile.example. NODE_RANK: the host's line in it, from 0.
# MASTER_ADDR: a name or address of the first host that the others can reach.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${4:-} in "" | -h | --help) sed -n '2,/^$/s/^# //p' "launch/${0##*/}"; [ "${1:-}" = -h ]; exit ;; esac
command -v deepspeed >/dev/null || PATH="$PWD/.venv/bin:$PATH"

hostfile=$1 node_rank=$2 address=$3 config=$4
shift 4
python launch/check_hosts.py "$hostfile" --no_ssh --node_rank "$node_rank"
exec deepspeed --quiet --no_ssh --hostfile "$hostfile" --node_rank "$node_rank" \
    --master_addr "$address" --master_port "${MASTER_PORT:-29500}" \
    launch/pretrain.py --config "$config" "$@"
