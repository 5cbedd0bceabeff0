"""Tests of megachat.convert."""
