"""What a training step asks of a model that ranks divide, whatever the way in which they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from hpcml.autograd import Tensor
from hpcml.backend import Array
from hpcml.errors import UserError
from hpcml.nn import Module
from hpcml.parallel.batch import samples_of
from hpcml.parallel.batchnorm import Turn
from hpcml.parallel.scores import Metric

_MARK = "_divided_among_ranks"  # an attribute of models that are


class Division:
    """A loss for a model of which every rank has all, or sees to it that it seems so."""

    def __init__(self, loss: Any) -> None:
        """loss: called with outputs and target, as a rank has them."""
        self.loss = loss
        self.turn: Turn | None = None
        """Where data-parallel ranks meet in batch norm."""

    def fields(self, batch: Any, samples: slice) -> Sequence[Any]:
        """Some samples of a batch, field by field, as this rank takes them."""
        return samples_of(batch, samples)

    def inputs(self, fields: Sequence[Any]) -> Sequence[Any]:
        """Inputs of the model, as this rank takes them."""
        return fields

    def begin_stage(self, inputs: Sequence[Tensor]) -> None:
        """A stage of a pipeline is called; `inputs`: of the whole model."""

    def metrics(self, given: Mapping[str, Metric]) -> Mapping[str, Metric]:
        """Metrics of outputs and targets, as this rank has them. Raises UserError if it can not."""
        return given

    def whole_buffers(self, model: Module) -> dict[str, Array]:
        """Copies of the model's buffers by name, none of which is divided. Collective."""
        return {name: np.array(one.data) for name, one in model.named_buffers()}

    def whole_outputs(self) -> AbstractContextManager[None]:
        """Within, the model gives all its outputs to every rank. Collective."""
        return nullcontext()


def refuse_divided(model: Module) -> None:
    """Raise UserError for a model that ranks divide already."""
    if getattr(model, _MARK, False):
        raise UserError(
            f"this {type(model).__name__} is divided among ranks already: make it anew, and load "
            "its values (load_state_dict of what `gathered` gave)"
        )


def mark_divided(model: Module) -> None:
    """From now on ranks divide this model."""
    setattr(model, _MARK, True)
