"""Tests of megachat.train."""
