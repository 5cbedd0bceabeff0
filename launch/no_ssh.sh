#!/usr/bin/env bash
# Pretrains on several hosts without ssh: run this on every host, within parallel.rendezvous_s of each other.
# Usage: [MASTER_PORT=29500] bash launch/no_ssh.sh HOSTFILE NODE_RANK MASTER_ADDR CONFIG [arguments of pretrain.py]
# HOSTFILE, CONFIG: paths from here, or from the project's folder. HOSTFILE is the same on every host, lines as in launch/hostfile.example. NODE_RANK: the host's line in it, from 0.
# MASTER_ADDR: a name or address of the first host that the others can reach.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage launch/no_ssh.sh 4 "$@"
use_venv deepspeed

hostfile=$(locate "$1") node_rank=$2 address=$3 config=$(locate "$4")
shift 4
python launch/check_hosts.py --no_ssh --node_rank "$node_rank" -- "$hostfile"
hostfile=$(plain_hostfile "$hostfile")
start_launcher deepspeed --quiet --no_ssh --hostfile "$hostfile" --node_rank "$node_rank" \
    --master_addr "$address" --master_port "${MASTER_PORT:-29500}" \
    launch/pretrain.py --config "$config" "$@"
