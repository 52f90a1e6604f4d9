"""Each parallelism by itself, and `parallelize`, which puts them together."""

from hpcml.parallel.step import Step, parallelize

__all__ = ["Step", "parallelize"]
