#!/usr/bin/env bash
# Pipeline parallelism on this machine: PIPELINE stages share the blocks; the ranks that are left over are data parallel.
# Usage: [PIPELINE=2] [RANKS=N] bash launch/pipeline.sh CONFIG [arguments of pretrain.py]
# RANKS: default all GPUs, or PIPELINE on a machine without.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in "" | -h | --help) sed -n '2,/^$/s/^# //p' "launch/${0##*/}"; [ -n "${1:-}" ]; exit ;; esac
command -v deepspeed >/dev/null || PATH="$PWD/.venv/bin:$PATH"
pipeline=${PIPELINE:-2}
command -v nvidia-smi >/dev/null || { RANKS=${RANKS:-$pipeline}; export DS_ACCELERATOR=cpu; }

config=$1
shift
exec deepspeed --quiet ${RANKS:+--num_accelerators "$RANKS"} launch/pretrain.py --config "$config" --set parallel.pipeline="$pipeline" "$@"
