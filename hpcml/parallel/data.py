"""Synchronous data parallelism: every rank holds the model and computes a part of each batch.

Losses are divided by the size of the global batch, so the gradient of the whole batch is the plain
sum of the ranks' gradients: one all-reduce of the flat gradient buffer a step (Li et al. 2020,
"PyTorch Distributed", section 2.2, calls this synchronous training by gradient averaging).
"""

from __future__ import annotations

from collections.abc import Iterator

from hpcml.comm import Axis
from hpcml.nn import Module
from hpcml.optim import FlatStorage


def microbatches(size: int, microbatch: int, axis: Axis) -> Iterator[slice]:
    """Yield the parts of a batch of `size` samples that this rank of `axis` computes.

    The batch is cut into microbatches of `microbatch` samples (0: one for each rank), the last one
    possibly smaller; microbatch j goes to rank j mod size of the axis. A rank may get none.
    """
    part = microbatch or max(-(-size // axis.size), 1)
    for start in range(axis.rank * part, size, axis.size * part):
        yield slice(start, min(start + part, size))


def share_gradients(storage: FlatStorage, axis: Axis) -> None:
    """Let the gradients lie where the axis reduces them in place: in shared memory, on one node."""
    if axis.size > 1:
        storage.move_gradients(axis.empty)


def reduce_gradients(storage: FlatStorage, axis: Axis) -> None:
    """Replace each rank's gradients by their sum over `axis`: partial -> replicated, in place.

    A rank that computed nothing joins with zeros.
    """
    storage.finish_gradients()
    axis.allreduce(storage.grad, out=storage.grad)


def broadcast_parameters(model: Module, storage: FlatStorage, axis: Axis) -> None:
    """Give all ranks the parameters of rank 0, frozen ones included."""
    axis.broadcast(storage.data, out=storage.data)
    held = {id(parameter) for parameter in storage.parameters}
    for parameter in model.parameters():
        if id(parameter) not in held:
            axis.broadcast(parameter.data, out=parameter.data)
