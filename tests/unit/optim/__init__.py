"""Tests of megachat.optim."""
