"""Flat storage: parameters side by side in one buffer, their gradients in another, with views.

One buffer is what a collective reduces at once and what a fused optimizer walks through once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hpcml import kernels, memory, rng
from hpcml.backend import Array
from hpcml.nn.parameter import Parameter

ALIGNMENT = 64  # bytes: parameters share no cache line, if the allocator's buffers start on one

Allocate = Callable[[tuple[int, ...], Any, str], Array]


class FlatStorage:
    """Parameters of one dtype and their gradients, as views into two flat arrays.

    Between and behind the parameters lie zeros up to the alignment; they stay zero, so sums over
    the whole buffer are sums over the parameters.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = list(parameters)
        types = {parameter.dtype for parameter in self.parameters}
        if len(types) != 1:
            raise ValueError(
                f"flat storage needs parameters of one type, not {sorted(map(str, types))}"
            )
        self.dtype: np.dtype[Any] = types.pop()
        step = ALIGNMENT // self.dtype.itemsize
        self.slices: list[slice] = []
        end = 0
        for parameter in self.parameters:
            count = parameter.numel()
            self.slices.append(slice(end, end + count))
            end += -(-count // step) * step
        self.size = end
        self.data = memory.zeros((end,), self.dtype, "params")
        self.grad = memory.zeros((end,), self.dtype, "grads")
        self._views: list[tuple[Array, Array]] = []  # of each parameter: its values, its gradient
        for parameter, part in zip(self.parameters, self.slices, strict=True):
            self._adopt(parameter, part)

    def _adopt(self, parameter: Parameter, part: slice) -> None:
        """Move a parameter here; one without values gets its first values right in place."""
        view = self.data[part].reshape(parameter.shape)
        if parameter.has_values:
            view[...] = parameter.data
        else:
            parameter.fill(self.data[part], 0, rng.seed())
        parameter.data = view
        parameter.gradient_buffer = self.grad[part].reshape(parameter.shape)
        self._views.append((view, parameter.gradient_buffer))
        if parameter.gradient is not None:
            parameter.gradient_buffer[...] = parameter.gradient
            parameter.gradient = parameter.gradient_buffer

    def move_gradients(self, allocate: Allocate) -> None:
        """Keep gradients in memory of `allocate(shape, dtype, category)` from now on.

        Memory that ranks share, for example, which they reduce in place.
        """
        before, self.grad = self.grad, allocate((self.size,), self.dtype, "grads")
        self.grad[...] = before
        places = zip(self.parameters, self.slices, self._views, strict=True)
        self._views = []
        for parameter, part, (values, _) in places:
            parameter.gradient_buffer = self.grad[part].reshape(parameter.shape)
            self._views.append((values, parameter.gradient_buffer))
            if parameter.gradient is not None:
                parameter.gradient = parameter.gradient_buffer

    def span(self, parameters: Sequence[Parameter]) -> slice:
        """The part of the buffers that holds `parameters`, which must be neighbours in order."""
        places = {id(p): number for number, p in enumerate(self.parameters)}
        first = places[id(parameters[0])]
        after = first + len(parameters)
        assert all(places[id(p)] == first + i for i, p in enumerate(parameters))
        end = self.slices[after].start if after < len(self.slices) else self.size
        return slice(self.slices[first].start, end)

    def finish_gradients(self) -> None:
        """Make the gradient of each parameter that got none zero: the buffer is then complete.

        Raises RuntimeError for a parameter that lies elsewhere by now: it would not be trained.
        """
        places = zip(self.parameters, self.slices, self._views, strict=True)
        for parameter, part, (values, gradient) in places:
            if parameter.data is not values or parameter.gradient_buffer is not gradient:
                raise RuntimeError(
                    f"parameter {parameter.name} has left this optimizer (its type or array was "
                    "changed, or a later optimizer took it): make the optimizer again"
                )
            if parameter.gradient is None:
                self.grad[part] = 0
                parameter.gradient = parameter.gradient_buffer

    def squared_norm(self) -> float:
        """Sum of squares of the gradient, over fixed blocks added in order."""
        return float(kernels.of(self.grad).sum_of_squares(self.grad))
