"""Tests of megachat.parallel."""
