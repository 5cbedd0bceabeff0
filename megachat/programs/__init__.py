"""Programs of several ranks, from their arguments to their exit status."""
