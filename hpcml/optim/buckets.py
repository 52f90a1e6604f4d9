"""How parameters lie in buckets, and which part of every bucket a rank holds.

A bucket is what a collective takes at once and what a fused optimizer walks through once. How its
parameters lie in it depends on neither the number of ranks nor the ZeRO stage, only its padding
does; blocks of ranks begin and end at multiples of its `grain`, and the norm of the gradient is
made of sums over single grains. Hence the same bits in every layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from hpcml import backend, rng
from hpcml.backend import Array, is_half
from hpcml.kernels import widen
from hpcml.nn.parameter import Parameter

ALIGNMENT = 64  # bytes: parameters share no cache line, if the allocator's buffers start on one
LARGEST_GRAIN = 4096
_GRAINS = 1024
"""A bucket has about this many grains at least, so that padding for N ranks adds N / 1024."""
KINDS = ("optim", "grads", "params")
"""What a rank holds; ZeRO stage k divides the first k of them among the ranks."""


@dataclass(frozen=True)
class Sharding:
    """Which part of every bucket a rank holds: the whole policy of ZeRO stages 0 to 3.

    size, rank: of the ranks that divide. layers: whole buckets have an owner each, in turn by unit,
    instead of every rank a block of each: the naive form, kept to count against.
    """

    stage: int = 0
    size: int = 1
    rank: int = 0
    layers: bool = False

    def whole(self, kind: str) -> bool:
        """Whether this rank holds all of the "optim", "grads" or "params"."""
        return KINDS.index(kind) >= self.stage

    def block(self, bucket: Bucket) -> slice:
        """The part of a bucket that this rank owns."""
        if self.layers:
            return slice(0, bucket.size if self.owner(bucket) == self.rank else 0)
        share = bucket.size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def owner(self, bucket: Bucket) -> int:
        """The rank that owns a whole bucket, in the naive form."""
        return bucket.unit % self.size

    def owned(self, kind: str, bucket: Bucket) -> slice:
        """The part of a bucket that this rank holds of a kind."""
        return slice(0, bucket.size) if self.whole(kind) else self.block(bucket)


class Bucket:
    """Some parameters side by side: where each lies, and the arrays of what this rank holds."""

    data: Array
    """Of the parameters; in their type."""
    grad: Array
    """Of the gradients; empty for frozen parameters."""
    master: Array | None = None
    """Of the parameters in float32, where they are kept so for the optimizer."""

    def __init__(
        self, members: Sequence[tuple[Parameter, int]], unit: int, align: int, sharding: Sharding
    ) -> None:
        """`members`: parameters, each with the number of its group (below 0: not trained)."""
        self.unit = unit
        members = sorted(members, key=lambda member: member[1])  # a group is one run of elements
        self.parameters = [parameter for parameter, _ in members]
        self._numbers = {id(p): number for number, p in enumerate(self.parameters)}
        self.slices: list[slice] = []
        end = 0
        for parameter in self.parameters:
            self.slices.append(slice(end, end + parameter.numel()))
            end += -(-parameter.numel() // align) * align
        self.content = max(end, align)
        self.grain = _grain(self.content, align)
        self.grains = -(-self.content // self.grain)
        ranks = 1 if sharding.layers else sharding.size
        self.size = -(-self.grains // ranks) * ranks * self.grain
        starts = [part.start for part in self.slices]
        self.runs: list[tuple[int, slice]] = []
        for group, run in groupby(range(len(members)), key=lambda i: members[i][1]):
            first, *_, last = [*run] * 2
            after = starts[last + 1] if last + 1 < len(starts) else self.size
            self.runs.append((group, slice(starts[first], after)))
        self.trained = bool(members) and members[0][1] >= 0
        self.layout = dict(members[0][0].layout)  # of all its parameters

    def number(self, parameter: Parameter) -> int:
        """The place of a parameter among those of the bucket."""
        return self._numbers[id(parameter)]

    def gaps(self) -> Iterator[slice]:
        """What lies between and behind the parameters."""
        ends = [0, *(part.stop for part in self.slices)]
        starts = [*(part.start for part in self.slices), self.size]
        return (slice(low, high) for low, high in zip(ends, starts, strict=True) if low < high)

    def view(self, whole: Array, number: int) -> Array:
        """The place of a parameter in an array of the whole bucket."""
        return whole[self.slices[number]].reshape(self.parameters[number].shape)

    def write(self, place: slice, out: Array) -> None:
        """Put elements `place` into `out`: given values, or first values made here."""
        for parameter, part in zip(self.parameters, self.slices, strict=True):
            low, high = max(part.start, place.start), min(part.stop, place.stop)
            if low >= high:
                continue
            view = out[low - place.start : high - place.start]
            if parameter.has_values:
                values = parameter.data.reshape(-1)[low - part.start : high - part.start]
                if is_half(values.dtype) and view.dtype == np.float32:
                    widen(values, view)
                else:
                    backend.put(values, view)
            else:
                parameter.fill(view, low - part.start, rng.seed())

    def put(self, parameter: Parameter, values: Array, place: slice, out: Array) -> None:
        """Put a parameter's values into `out`, which is elements `place` of the bucket."""
        part = self.slices[self.number(parameter)]
        low, high = max(part.start, place.start), min(part.stop, place.stop)
        if low < high:
            backend.put(
                values.reshape(-1)[low - part.start : high - part.start],
                out[low - place.start : high - place.start],
            )


def plan(
    units: Sequence[Sequence[tuple[Parameter, int]]], limit: int, sharding: Sharding
) -> list[Bucket]:
    """Cut each unit into buckets of whole parameters, in order, of at most `limit` bytes.

    A parameter above the limit has a bucket for itself. What is not trained is kept apart, and so
    are layouts: ranks that divide some parameters have the others in the same buckets.
    """
    buckets = []
    for number, unit in enumerate(units):
        for _, members in groupby(sorted(unit, key=_kind), key=_kind):
            rest: list[tuple[Parameter, int]] = []
            nbytes = 0
            for parameter, group in members:
                more = parameter.numel() * parameter.dtype.itemsize
                if rest and nbytes + more > limit:
                    buckets.append(_bucket(rest, number, sharding))
                    rest, nbytes = [], 0
                rest.append((parameter, group))
                nbytes += more
            buckets.append(_bucket(rest, number, sharding))
    return buckets


def _kind(member: tuple[Parameter, int]) -> tuple[bool, list[tuple[str, str]]]:
    parameter, group = member
    return group < 0, sorted(parameter.layout.items())


def _grain(content: int, align: int) -> int:
    """The largest power of two that leaves enough grains, within bounds."""
    power = 1 << max((content // _GRAINS).bit_length() - 1, 0)
    return min(max(power, align), LARGEST_GRAIN)


def _bucket(members: Sequence[tuple[Parameter, int]], unit: int, sharding: Sharding) -> Bucket:
    return Bucket(members, unit, ALIGNMENT // members[0][0].dtype.itemsize, sharding)
