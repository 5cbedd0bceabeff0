#!/usr/bin/env bash
# Pipeline parallelism: see launch/run.sh -h
TENSOR="" PIPELINE="${PIPELINE:-2}" exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" "$@"
