"""From runs to decisions: what run folders hold, curves on three axes, comparisons with their noise."""
