"""Checkpoints of other formats, and what to know about one: opened alike, compared, checked, converted with a proof."""
