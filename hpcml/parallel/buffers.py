"""Buffers of a model, such as the running estimates of batch norm: changed once a step.

Forward changes them in training. In a step every microbatch begins with the same values, and what
the step makes of them is the mean of what its microbatches would, by samples: for estimates that
move towards a statistic, one move towards the mean of the microbatches' statistics. So they are the
same on all ranks, and but for rounding do not depend on which rank computed what.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from hpcml.autograd import Tensor
from hpcml.backend import Array, xp
from hpcml.comm import Axis
from hpcml.nn import Module


class Buffers:
    """The buffers of a model on this rank, from step to step."""

    def __init__(self, model: Module, ordered: bool) -> None:
        """ordered: what microbatches make is added up in their order over all ranks."""
        self._homes = [
            (f"{path}.{name}" if path else name, name, module._buffers)
            for path, module in model.named_modules() for name in module._buffers
        ]  # fmt: skip
        self.ordered = ordered
        self._rows: list[Array] = []
        self._first = 0  # row of the batch under way
        self._samples = 0

    @property
    def named(self) -> list[tuple[str, Tensor]]:
        """The buffers by qualified names: forward may have set others."""
        return [(full, registry[name]) for full, name, registry in self._homes]

    def broadcast(self, axis: Axis) -> None:
        """Give all ranks the values of the first. Collective."""
        if self._homes:
            self._write(axis.broadcast(self._read()))

    def begin(self, rounds: int, *, fresh: bool) -> None:
        """A batch of so many microbatches a rank comes; fresh: the first one of an update."""
        if fresh:
            self._rows, self._samples = [], 0
        self._first = len(self._rows) if self.ordered else 0
        while len(self._rows) < (self._first + rounds if self.ordered else 1):
            self._rows.append(_nothing(self._read()))

    @contextmanager
    def microbatch(self, number: int, samples: int) -> Iterator[None]:
        """Within is forward of a microbatch; 0 samples: it does not count."""
        before = self._read()
        try:
            yield
            if samples:
                row = self._rows[self._first + number if self.ordered else 0]
                row += (self._read() - before) * samples
                self._samples += samples
        finally:
            self._write(before)

    def complete(self, axis: Axis | None, samples: int) -> None:
        """Change the buffers by the mean over all `samples` since `begin`. Collective.

        axis: the ranks that have computed them; None: by those of this rank alone.
        """
        if not self._homes:
            return
        before = self._read()
        total = _nothing(before)
        for row in self._rows:
            if axis is None:
                total += row
            elif self.ordered:
                for one in axis.allgather(row).reshape(axis.size, -1):
                    total += one
            else:
                total = axis.allreduce(row)
        samples = self._samples if axis is None else samples
        self._write(before + total / max(samples, 1))

    @contextmanager
    def averaged(self, axis: Axis) -> Iterator[None]:
        """Within, they are the means over ranks that train apart. Collective."""
        own = self._read()
        if self._homes:
            self._write(axis.allreduce(own.copy()) / axis.size)
        try:
            yield
        finally:
            self._write(own)

    def _read(self) -> Array:
        """All values side by side, in float64, on the device where they are."""
        flat = [one.data.astype(np.float64).reshape(-1) for _, one in self.named]
        return xp(flat[0]).concatenate(flat) if flat else np.zeros(0)

    def _write(self, values: Array) -> None:
        start = 0
        for _, one in self.named:
            stop = start + one.data.size
            new = values[start:stop].reshape(one.data.shape)
            one.data[...] = xp(new).rint(new) if one.data.dtype.kind in "biu" else new
            start = stop


def _nothing(like: Array) -> Array:
    return xp(like).zeros_like(like)
