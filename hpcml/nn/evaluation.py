"""Evaluation: a state that ends, after which every module is as it was, and what is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hpcml.autograd import Tensor, no_grad
from hpcml.autograd.operators import array_of
from hpcml.nn.module import Module


@contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """Compute in evaluation mode and without recording; each module's mode is restored."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def accuracy(output: Tensor, target: Any) -> float:
    """Share of targets that have the largest logit: output (N, C, ...), target (N, ...)."""
    found = output.data.argmax(1)
    return float((found == array_of(target)).mean())
