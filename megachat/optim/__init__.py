"""Optimizer groups by parameter name, Muon's mathematics, and the partition that distributes Muon over ranks."""
