#!/usr/bin/env bash
# The speedrun to GPT-2's CORE in one command: data, tokenizer, training, CORE, report, record (docs/speedrun.md).
# Usage: bash launch/speedrun.sh [--recipe nanochat-run6 | public-2026 | megachat] [--runs N] [--hostfile FILE] [--dry-run] [...]
# The same command again continues where it was. --help lists all options. Paths are relative to the project's folder,
# below which files are written.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
use_venv deepspeed
exec python -m megachat speedrun "$@"
