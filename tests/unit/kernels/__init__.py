"""Tests of megachat.kernels."""
