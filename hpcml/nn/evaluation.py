"""Evaluation as a state that ends: afterwards every module is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hpcml.autograd import no_grad
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
