"""Tests of megachat.checkpoint."""
