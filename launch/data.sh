#!/usr/bin/env bash
# Data parallelism on this machine: every rank has the whole model and its share of the rows.
# Usage: [RANKS=N] bash launch/data.sh CONFIG [arguments of pretrain.py]
# RANKS: default all GPUs, or 2 on a machine without.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in "" | -h | --help) sed -n '2,/^$/s/^# //p' "launch/${0##*/}"; [ -n "${1:-}" ]; exit ;; esac
command -v deepspeed >/dev/null || PATH="$PWD/.venv/bin:$PATH"
command -v nvidia-smi >/dev/null || { RANKS=${RANKS:-2}; export DS_ACCELERATOR=cpu; }

config=$1
shift
exec deepspeed --quiet ${RANKS:+--num_accelerators "$RANKS"} launch/pretrain.py --config "$config" "$@"
