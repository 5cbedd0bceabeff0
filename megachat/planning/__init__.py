"""What a run will be before it starts: dimensions, derived settings, memory, ownership."""
