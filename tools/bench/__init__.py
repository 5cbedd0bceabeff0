"""Benchmarks behind `tools/bench.py`."""
