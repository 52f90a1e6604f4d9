"""Synchronous data parallelism: every rank computes a part of each batch.

Losses are divided by the size of the global batch, so the gradient of the whole batch is the plain
sum of the ranks' gradients (Li et al. 2020, "PyTorch Distributed", section 2.2, calls this
synchronous training by gradient averaging).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hpcml import backend
from hpcml.backend import Array
from hpcml.comm import Axis
from hpcml.nn import Parameter


class Microbatch(NamedTuple):
    """Samples that a rank computes at once."""

    number: int
    """Counted over all ranks, in the order in which deterministic mode adds gradients."""
    samples: slice
    """Where they lie in the batch."""
    weight: float
    """Their share of the batch; 0 for samples that are computed for company only."""
    last: bool
    """Whether the rank computes no more in this step."""

    @property
    def counted(self) -> int:
        """How many samples count: all or none."""
        return self.samples.stop - self.samples.start if self.weight else 0


def count(size: int, microbatch: int, ranks: int) -> int:
    """Number of microbatches of a batch of `size` samples, over all ranks."""
    return -(-size // _samples(size, microbatch, ranks))


def rounds(size: int, microbatch: int, ranks: int) -> int:
    """The most microbatches that a rank has of such a batch."""
    return -(-count(size, microbatch, ranks) // ranks)


def microbatches(
    size: int, microbatch: int, axis: Axis, lockstep: bool = False
) -> Iterator[Microbatch]:
    """Yield what this rank of `axis` computes of a batch of `size` samples.

    The batch is cut into microbatches of `microbatch` samples (0: one for each rank), the last one
    possibly smaller; microbatch j goes to rank j mod size of the axis. A rank may get none.

    lockstep: every rank gets as many; one that has none left computes the first again, which counts
    nothing then. So it joins in what ranks do together during forward and backward, and on as many
    samples as others: of one alone batch norm could make nothing.
    """
    total = count(size, microbatch, axis.size)
    mine = len(range(axis.rank, total, axis.size))
    times = rounds(size, microbatch, axis.size) if lockstep else mine
    for number in range(times):
        j = number * axis.size + axis.rank
        last = number + 1 == times
        if j < total:
            samples = part(j, size, microbatch, axis.size)
            yield Microbatch(j, samples, (samples.stop - samples.start) / size, last)
        else:
            yield Microbatch(j, part(0, size, microbatch, axis.size), 0.0, last)


def part(number: int, size: int, microbatch: int, ranks: int) -> slice:
    """The samples of microbatch `number` of a batch."""
    length = _samples(size, microbatch, ranks)
    return slice(number * length, min((number + 1) * length, size))


def _samples(size: int, microbatch: int, ranks: int) -> int:
    return microbatch or max(-(-size // ranks), 1)


def broadcast_parameters(parameters: Iterable[Parameter], axis: Axis) -> None:
    """Give all ranks the values of rank 0 where there are any.

    First values that have not been made yet are the same everywhere: they depend on no rank.
    """
    if axis.size == 1:
        return
    for parameter in parameters:
        if parameter.has_values:
            axis.broadcast(parameter.data, out=parameter.data)


def shares(losses: Sequence[tuple[Microbatch, Array]], total: int) -> Array:
    """The share of each of `total` microbatches in a batch's mean loss; 0 for those of others.

    losses: what this rank has computed. A GPU is waited for, once for all.
    """
    found = np.zeros(total)
    values = backend.numbers([value for _, value in losses])
    for (part, _), value in zip(losses, values, strict=True):
        found[part.number] = value * part.weight
    return found
