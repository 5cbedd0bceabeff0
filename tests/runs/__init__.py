"""Tests that start the real programs, under the real launchers."""
