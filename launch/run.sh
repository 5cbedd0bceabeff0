#!/usr/bin/env bash
# Pretrains on this machine under the deepspeed launcher, on any layout.
# Usage: [TENSOR=T] [PIPELINE=P] [RANKS=N] bash launch/run.sh CONFIG [arguments of pretrain.py]
# TENSOR: T ranks share every matrix. PIPELINE: P stages share the blocks. Default of both: the config's value.
# The remaining ranks are data parallel: each has its share of the rows.
# RANKS: default all GPUs; on a machine without GPUs TENSOR x PIPELINE, or 2 if neither is set.
# data.sh, tensor.sh, pipeline.sh and three_d.sh call this script with neither, TENSOR=2, PIPELINE=2 or both.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in "" | -h | --help) sed -n '2,/^$/s/^# //p' launch/run.sh; [ -n "${1:-}" ]; exit ;; esac
command -v deepspeed >/dev/null || PATH="$PWD/.venv/bin:$PATH"

config=$1
shift
[ -z "${PIPELINE:-}" ] || set -- --set parallel.pipeline="$PIPELINE" "$@"
[ -z "${TENSOR:-}" ] || set -- --set parallel.tensor="$TENSOR" "$@"
if ! command -v nvidia-smi >/dev/null; then
    export DS_ACCELERATOR=cpu # otherwise the launcher searches for an accelerator and warns
    ranks=2
    [ -z "${TENSOR:-}${PIPELINE:-}" ] || ranks=$((${TENSOR:-1} * ${PIPELINE:-1}))
    RANKS=${RANKS:-$ranks}
fi
exec deepspeed --quiet ${RANKS:+--num_accelerators "$RANKS"} launch/pretrain.py --config "$config" "$@"
