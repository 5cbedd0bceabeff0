#!/usr/bin/env bash
# Pretrains on several hosts under Open MPI, which reaches them over ssh.
# First checks the hosts: reachable, same code and versions.
# Usage: [INTERFACE=eth0] [MASTER_ADDR=A MASTER_PORT=P] bash launch/mpirun.sh HOSTFILE CONFIG [arguments of pretrain.py]
# HOSTFILE: lines as in launch/hostfile.example, which mpirun also reads.
# INTERFACE: for Open MPI on hosts with several networks.
# MASTER_ADDR, MASTER_PORT: required only without mpi4py, which otherwise sends rank 0's address to all ranks.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${2:-} in "" | -h | --help) sed -n '2,/^$/s/^# //p' "launch/${0##*/}"; [ "${1:-}" = -h ]; exit ;; esac
command -v mpirun >/dev/null || PATH="$PWD/.venv/bin:$PATH"

hostfile=$1 config=$2
shift 2
python launch/check_hosts.py "$hostfile" --master_port "${MASTER_PORT:-29500}"
options=(--hostfile "$hostfile" --bind-to none)
if [ "$(id -u)" = 0 ]; then options+=(--allow-run-as-root); fi
if [ -n "${INTERFACE:-}" ]; then options+=(--mca btl_tcp_if_include "$INTERFACE"); fi
if [ -n "${MASTER_ADDR:-}" ]; then options+=(-x MASTER_ADDR -x MASTER_PORT); fi
exec mpirun "${options[@]}" "$(command -v python)" launch/pretrain.py --config "$config" "$@"
