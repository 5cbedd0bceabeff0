#!/usr/bin/env bash
# Pretrains on several hosts under Open MPI, which reaches them over ssh.
# First checks the hosts: reachable, same code and versions.
# Usage: [INTERFACE=eth0] [MASTER_ADDR=A MASTER_PORT=P] bash launch/mpirun.sh HOSTFILE CONFIG [arguments of pretrain.py]
# HOSTFILE, CONFIG: paths from here, or from the project's folder; lines as in launch/hostfile.example, which mpirun also reads.
# INTERFACE: for Open MPI on hosts with several networks.
# MASTER_ADDR, MASTER_PORT: required only without mpi4py, which otherwise sends rank 0's address to all ranks.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage launch/mpirun.sh 2 "$@"
use_venv mpirun

hostfile=$(locate "$1") config=$(locate "$2")
shift 2
# port 0 is free: without MASTER_PORT, mpi4py agrees on a free one
python launch/check_hosts.py --master_port "${MASTER_PORT:-0}" -- "$hostfile"
hostfile=$(plain_hostfile "$hostfile")
options=(--hostfile "$hostfile" --bind-to none)
share_secret
options+=(-x "MEGACHAT_SECRET${MEGACHAT_SECRET_FILE:+_FILE}")
if [ "$(id -u)" = 0 ]; then options+=(--allow-run-as-root); fi
if [ -n "${INTERFACE:-}" ]; then options+=(--mca btl_tcp_if_include "$INTERFACE"); fi
if [ -n "${MASTER_ADDR:-}" ]; then options+=(-x MASTER_ADDR -x "MASTER_PORT=${MASTER_PORT:-29500}"); fi
exec mpirun "${options[@]}" "$(command -v python)" launch/pretrain.py --config "$config" "$@"
