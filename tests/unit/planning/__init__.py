"""Tests of megachat/planning."""
