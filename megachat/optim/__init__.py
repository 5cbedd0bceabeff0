"""Who optimizes what: groups by name pattern, Muon's mathematics, and the partition that spreads it over ranks."""
