"""Several gloo processes, through tests.harness."""
