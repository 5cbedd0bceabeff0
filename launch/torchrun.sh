#!/usr/bin/env bash
# Pretrains under torchrun, on one machine or several: run this on every machine, with the same words.
# Usage: [NODES=1] [RANKS=N] [TENSOR=T] [PIPELINE=P] [JOB=megachat] bash launch/torchrun.sh HOST[:PORT] CONFIG [arguments of pretrain.py]
# HOST: one of the machines, where they meet (torchrun's --rdzv-endpoint; PORT is 29400 if it is not given).
# CONFIG: a path from here, or from the project's folder.
# NODES: how many machines take part. RANKS: on this machine, default all GPUs, 1 without GPUs. TENSOR, PIPELINE: as in
# launch/run.sh. JOB: jobs that meet on the same HOST:PORT need different names.
# launch/supervise.py does the same, and restarts the ranks after a crash.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage launch/torchrun.sh 2 "$@"
require_counts NODES TENSOR PIPELINE
case ${RANKS:-} in gpu | cpu | auto) ;; *) require_counts RANKS ;; esac # torchrun counts by these words
use_venv torchrun

endpoint=$1 config=$(locate "$2")
shift 2
[ -z "${PIPELINE:-}" ] || set -- --set parallel.pipeline="$PIPELINE" "$@"
[ -z "${TENSOR:-}" ] || set -- --set parallel.tensor="$TENSOR" "$@"
[ "${NODES:-1}" != 1 ] || share_secret # several machines: docs/multinode.md
if command -v nvidia-smi >/dev/null; then RANKS=${RANKS:-gpu}; fi
start_launcher torchrun --nnodes "${NODES:-1}" --nproc-per-node "${RANKS:-1}" --rdzv-backend c10d --rdzv-endpoint "$endpoint" \
    --rdzv-id "${JOB:-megachat}" launch/pretrain.py --config "$config" "$@"
