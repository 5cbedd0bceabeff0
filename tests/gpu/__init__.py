"""Tests that need a GPU: bash tests/run_gpu.sh."""
