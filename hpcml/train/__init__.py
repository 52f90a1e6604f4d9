"""Training runs: configuration, loop, records, results."""
