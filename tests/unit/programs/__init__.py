"""Tests of megachat/programs."""
