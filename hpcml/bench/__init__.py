"""Benchmarks: what the project claims, measured beside a peer in the same run."""
