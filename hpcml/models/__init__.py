"""Models, written serially: what makes them parallel lies in `hpcml.parallel`."""

from hpcml.models.generate import generate
from hpcml.models.gpt import GPT, NextTokenLoss
from hpcml.models.meshnet import MeshNet
from hpcml.models.mlp import MLP
from hpcml.models.resnet import ResNet

__all__ = ["GPT", "MLP", "MeshNet", "NextTokenLoss", "ResNet", "generate"]
