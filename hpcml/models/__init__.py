"""Models, written serially: what makes them parallel lies in `hpcml.parallel`."""

from hpcml.models.generate import generate
from hpcml.models.gpt import GPT, NextTokenLoss
from hpcml.models.mlp import MLP

__all__ = ["GPT", "MLP", "NextTokenLoss", "generate"]
