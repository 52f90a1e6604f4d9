"""Optimizers, fused over flat storage, and the learning-rate schedule."""

from hpcml.optim.flat import FlatStorage
from hpcml.optim.optimizer import SGD, Adam, AdamW, Optimizer, clip_scale
from hpcml.optim.schedule import learning_rate

__all__ = ["SGD", "Adam", "AdamW", "FlatStorage", "Optimizer", "clip_scale", "learning_rate"]
