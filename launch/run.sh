#!/usr/bin/env bash
# Pretrains on this machine under the deepspeed launcher, on any layout.
# Usage: [TENSOR=T] [PIPELINE=P] [RANKS=N] [MASTER_PORT=P] bash launch/run.sh CONFIG [arguments of pretrain.py]
# CONFIG: a path from here, or from the project's folder.
# TENSOR: T ranks share every matrix. PIPELINE: P stages share the blocks. Default of both: the config's value.
# The remaining ranks are data parallel: each has its share of the rows. --layout tp=T,pp=P among the arguments is the
# same as TENSOR=T PIPELINE=P, and --layout dp=D,tp=T,pp=P starts D x T x P ranks.
# RANKS: default all GPUs; on a machine without GPUs TENSOR x PIPELINE, or 2 if no layout is given.
# MASTER_PORT: default a free port.
# data.sh, tensor.sh, pipeline.sh and three_d.sh call this script with neither, TENSOR=2, PIPELINE=2 or both.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage launch/run.sh 1 "$@"
require_counts RANKS TENSOR PIPELINE
use_venv deepspeed

config=$(locate "$1")
shift
[ -z "${PIPELINE:-}" ] || set -- --set parallel.pipeline="$PIPELINE" "$@"
[ -z "${TENSOR:-}" ] || set -- --set parallel.tensor="$TENSOR" "$@"
share_secret
layout=$(layout_ranks "$@")
case " $*" in *[\ =,]dp=*) RANKS=${RANKS:-$layout} ;; esac
if ! command -v nvidia-smi >/dev/null; then
    export DS_ACCELERATOR=cpu # otherwise the launcher searches for an accelerator and warns
    ranks=${layout:-2}
    [ -n "$layout" ] || [ -z "${TENSOR:-}${PIPELINE:-}" ] || ranks=$((${TENSOR:-1} * ${PIPELINE:-1}))
    RANKS=${RANKS:-$ranks}
fi
port=$(master_port)
start_launcher deepspeed --quiet ${RANKS:+--num_accelerators "$RANKS"} --master_port "$port" \
    launch/pretrain.py --config "$config" "$@"
