"""Each parallelism by itself, and `parallelize`, which puts them together."""

from hpcml.parallel.assemble import parallelize
from hpcml.parallel.step import Step

__all__ = ["Step", "parallelize"]
