"""Tests: unit (one process), ranks (gloo processes), runs (the real launcher)."""
