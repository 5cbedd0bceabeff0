#!/usr/bin/env bash
# From nothing to a trained model: sets up .venv, makes a corpus from this machine's Python, trains a tokenizer, and
# pretrains under the deepspeed launcher (two ranks on a CPU machine, all GPUs on a GPU machine). A second call reuses
# what exists.
# Usage: [PYTHON=python3] [MASTER_PORT=P] bash launch/demo.sh [arguments of pretrain.py]
# For example --set horizon.steps=20. PYTHON: see launch/setup.sh. MASTER_PORT: default a free port.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage launch/demo.sh 0 "$@"
source launch/setup.sh "" # without it, setup.sh would take the arguments for extras

exec python -m megachat demo "$@"
