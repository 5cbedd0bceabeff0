"""Tests of megachat/job."""
