"""Tests of megachat/doctor."""
