"""Diagnosis of an installation, on one host or on all hosts of a hostfile."""
