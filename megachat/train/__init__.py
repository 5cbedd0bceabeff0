"""Where model meets parallel: build, state, step, loop, metrics."""
