"""Checkpoints by parameter name and whole shape: any layout loads any layout."""
