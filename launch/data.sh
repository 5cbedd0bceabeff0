#!/usr/bin/env bash
# Data parallelism: see launch/run.sh -h
TENSOR="" PIPELINE="" exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" "$@"
