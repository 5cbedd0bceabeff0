#!/usr/bin/env bash
# All three axes: see launch/run.sh -h
TENSOR="${TENSOR:-2}" PIPELINE="${PIPELINE:-2}" exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" "$@"
