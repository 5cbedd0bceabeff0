"""Tests of megachat.evals."""
