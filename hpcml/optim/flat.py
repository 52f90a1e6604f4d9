"""Flat storage: what a rank holds of parameters, gradients and optimizer state, in flat arrays.

One array of each kind for all buckets (see `hpcml.optim.buckets`), with views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from hpcml import backend, kernels, memory
from hpcml.backend import Array, is_half
from hpcml.kernels import narrow, widen
from hpcml.nn.parameter import Home, Parameter
from hpcml.optim.buckets import Bucket, Sharding, plan

BUCKET_BYTES = 25 << 20
_WHOLE = Sharding()

Allocate = Callable[[tuple[int, ...], Any, str, str], Array]
"""Makes an array, given its shape, type, kind and device."""


class Piece(NamedTuple):
    """Elements that the optimizer updates together: of one group, and this rank's to update."""

    group: int
    data: Array
    grad: Array
    state: slice
    values: Array | None
    """Where the parameters lie in their 16-bit type; `data` is then their float32 master."""


class FlatStorage:
    """Parameters of one type and their gradients in buckets, held as `sharding` says.

    groups: parameters by parameter group. units: all of them (and perhaps frozen ones) in the lists
    that are gathered together where parameters are sharded; by default one. allocate: makes the
    arrays of kind "params", "grads" or "optim". 16-bit parameters have a float32 master each.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Parameter]],
        *,
        units: Sequence[Sequence[Parameter]] | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        sharding: Sharding = _WHOLE,
        allocate: Allocate = memory.zeros,
    ) -> None:
        self.sharding, self.allocate = sharding, allocate
        group_of = {id(p): number for number, group in enumerate(groups) for p in group}
        units = [[p for group in groups for p in group]] if units is None else units
        everything = [p for unit in units for p in unit]
        self.dtype, self.device = _one_type(everything), _one_device(everything)
        self.buckets = plan(
            [[(p, group_of.get(id(p), -1)) for p in unit] for unit in units], bucket_bytes, sharding
        )
        self.trained = [bucket for bucket in self.buckets if bucket.trained]
        self.parameters = [p for bucket in self.trained for p in bucket.parameters]
        self.home = {id(p): bucket for bucket in self.buckets for p in bucket.parameters}
        self.data = self._lay("params", "data", self.buckets)
        self.grad = self._lay("grads", "grad", self.trained)
        if is_half(self.dtype):
            self._lay("optim", "master", self.trained, np.dtype(np.float32))
        self._views: list[tuple[Parameter, Array | None, Array | None]] = []
        for bucket in self.buckets:
            self._fill(bucket)
            self._adopt(bucket)
        self.state_size = 0  # elements of each array of the optimizer's state
        self.pieces = list(self._pieces())

    def _lay(
        self, kind: str, name: str, buckets: Sequence[Bucket], dtype: np.dtype[Any] | None = None
    ) -> Array:
        """One array for what this rank holds of all buckets, and its part for each of them."""
        parts = [self.sharding.owned(kind, bucket) for bucket in buckets]
        sizes = [part.stop - part.start for part in parts]
        flat = self.allocate((sum(sizes),), dtype or self.dtype, kind, self.device)
        flat[...] = 0
        start = 0
        for bucket, size in zip(buckets, sizes, strict=True):
            setattr(bucket, name, flat[start : start + size])
            start += size
        return flat

    def _fill(self, bucket: Bucket) -> None:
        """Put the values of the parameters into what this rank holds of them."""
        sharding = self.sharding
        if bucket.master is not None:
            bucket.write(sharding.owned("optim", bucket), bucket.master)
        held = sharding.owned("params", bucket)
        if bucket.master is not None and sharding.owned("optim", bucket) == held:
            narrow(bucket.master, bucket.data)
        else:
            bucket.write(held, bucket.data)

    def _adopt(self, bucket: Bucket) -> None:
        """Let the parameters lie in the bucket, where this rank holds all of it."""
        for number, parameter in enumerate(bucket.parameters):
            values = gradient = None
            if self.sharding.whole("params"):
                values = parameter.data = bucket.view(bucket.data, number)
            else:
                parameter.forget()
            if bucket.trained and self.sharding.whole("grads"):
                gradient = bucket.view(bucket.grad, number)
                if parameter.gradient is not None:
                    gradient[...] = parameter.gradient
                    parameter.gradient = gradient
            parameter.home, parameter.gradient_buffer = None, gradient
            parameter.keeper = self
            self._views.append((parameter, values, gradient))

    def _pieces(self) -> Iterator[Piece]:
        sharding, start = self.sharding, 0
        for bucket in self.trained:
            mine = sharding.owned("optim", bucket)
            for group, run in bucket.runs:
                low, high = max(run.start, mine.start), min(run.stop, mine.stop)
                if low >= high:
                    continue
                values = _part(bucket.data, sharding.owned("params", bucket), low, high)
                data = values
                if bucket.master is not None:
                    data = _part(bucket.master, mine, low, high)
                grad = _part(bucket.grad, sharding.owned("grads", bucket), low, high)
                offset = start - mine.start
                yield Piece(
                    group, data, grad, slice(offset + low, offset + high),
                    None if bucket.master is None else values,
                )  # fmt: skip
            start += mine.stop - mine.start
        self.state_size = start

    def store(self, parameter: Parameter, values: Array) -> None:
        """Take a parameter's new values, the same on all ranks, into what this rank holds of it."""
        bucket, sharding = self.home[id(parameter)], self.sharding
        if bucket.master is not None:
            bucket.put(parameter, values, sharding.owned("optim", bucket), bucket.master)
        bucket.put(parameter, values, sharding.owned("params", bucket), bucket.data)
        if parameter.unit is not None:
            parameter.unit.drop()

    def move(self, flat: Array) -> None:
        """Let the parameters lie in `flat` from now on, which has their values, laid out as `data`.

        What they lay in until now is left as it is, for those who made something of it. Only where
        this rank holds all of its parameters.
        """
        assert self.sharding.whole("params")
        self.data = flat
        for bucket, part in self._parts(flat):
            bucket.data = part
        self._views = [
            (parameter, view, gradient)
            for (parameter, view), (_, _, gradient) in zip(
                self._viewed(flat), self._views, strict=True
            )
        ]
        self.pieces = list(self._pieces())
        self.show(flat)

    def show(self, flat: Array) -> None:
        """Let the parameters have the values in `flat`; the optimizer goes on with those in `data`.

        To be undone, by `show(data)`, before the next update.
        """
        own = flat is self.data
        views = [(p, values) for p, values, _ in self._views] if own else self._viewed(flat)
        for parameter, values in views:
            parameter.data = values

    def _parts(self, flat: Array) -> Iterator[tuple[Bucket, Array]]:
        """The part of each bucket in an array of all that this rank holds of them."""
        start = 0
        for bucket in self.buckets:
            end = start + bucket.data.size
            yield bucket, flat[start:end]
            start = end

    def _viewed(self, flat: Array) -> Iterator[tuple[Parameter, Array]]:
        """Each parameter and its place in such an array, in the order of `_views`."""
        for bucket, part in self._parts(flat):
            for number, parameter in enumerate(bucket.parameters):
                yield parameter, bucket.view(part, number)

    def collect_gradients(self, home: Home | None = None) -> None:
        """Let gradients go where `home` says, or into the buffer of all that this rank holds."""
        for parameter, _, gradient in self._views:
            if self.home[id(parameter)].trained:
                parameter.home = home
                parameter.gradient_buffer = gradient if home is None else None

    def check(self) -> None:
        """Raise RuntimeError if a parameter lies elsewhere by now: it would not be trained."""
        for parameter, values, gradient in self._views:
            moved = values is not None and parameter._array is not values
            if moved or (gradient is not None and parameter.gradient_buffer is not gradient):
                raise RuntimeError(
                    f"parameter {parameter.name} has left this optimizer (its type or array was "
                    "changed, or a later optimizer took it): make the optimizer again"
                )

    def finish_gradients(self) -> None:
        """Make the gradient of each parameter that got none zero: what is held is then complete."""
        self.check()
        for parameter, _, gradient in self._views:
            if gradient is not None and parameter.gradient is None:
                gradient[...] = 0
                parameter.gradient = gradient

    def squares(self) -> Array:
        """Sums of squares of the gradient in float64, one of each grain of every bucket, in order.

        Zero where this rank does not own the grain. Added up over the ranks that divide the
        gradients, and then over the grains in order, the square of the norm, in every layout the
        same to the last bit.
        """
        count, start = sum(bucket.grains for bucket in self.trained), 0
        sums = backend.device_module(self.device).zeros(count, np.float64)
        for bucket in self.trained:
            mine, (grad, _) = self.sharding.owned("optim", bucket), self.sums(bucket)
            first = mine.start // bucket.grain
            last = min(mine.stop // bucket.grain, bucket.grains)
            if first < last:
                out = sums[start + first : start + last]
                _squares(grad[: (last - first) * bucket.grain], bucket.grain, out)
            start += bucket.grains
        return backend.to_kind(sums, "cpu")

    def masters(self, bucket: Bucket) -> tuple[Array, bool]:
        """The most exact values of a bucket that this rank holds, and whether those are all."""
        if bucket.master is not None:
            return bucket.master, self.sharding.whole("optim")
        return bucket.data, self.sharding.whole("params")

    def sums(self, bucket: Bucket) -> tuple[Array, bool]:
        """The sums of gradients of a bucket that this rank has, and whether those are all."""
        mine, held = (self.sharding.owned(kind, bucket) for kind in ("optim", "grads"))
        return _part(bucket.grad, held, mine.start, mine.stop), self.sharding.whole("optim")


def _one_type(parameters: Sequence[Parameter]) -> np.dtype[Any]:
    types = {parameter.dtype for parameter in parameters}
    if len(types) != 1:
        raise ValueError(
            f"flat storage needs parameters of one type, not {sorted(map(str, types))}"
        )
    return types.pop()


def _one_device(parameters: Sequence[Parameter]) -> str:
    devices = {parameter.device for parameter in parameters}
    if len(devices) != 1:
        raise ValueError(f"flat storage needs parameters on one device, not {sorted(devices)}")
    return devices.pop()


def _part(held: Array, place: slice, low: int, high: int) -> Array:
    """Elements low to high of a bucket, of which `held` is the part `place`."""
    assert place.start <= low <= high <= place.stop
    return held[low - place.start : high - place.start]


def _squares(x: Array, block: int, out: Array) -> None:
    """out[k] = sum of the squares of x[k * block : (k + 1) * block]."""
    if not is_half(x.dtype) or not isinstance(x, np.ndarray):
        kernels.of(x).block_squares(x, block, out)
        return
    step = max(1 << 16, block)  # elements at once, which stay in the cache
    for start in range(0, x.size, step):
        wide = widen(x[start : start + step])
        kernels.of(wide).block_squares(wide, block, out[start // block :])
