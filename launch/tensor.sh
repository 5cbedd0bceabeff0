#!/usr/bin/env bash
# Tensor parallelism: see launch/run.sh -h
TENSOR="${TENSOR:-2}" PIPELINE="" exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" "$@"
