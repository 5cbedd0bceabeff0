"""What only a GPU can tell: bash tests/run_gpu.sh."""
