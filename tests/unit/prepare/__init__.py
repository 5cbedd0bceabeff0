"""Tests of megachat/prepare."""
