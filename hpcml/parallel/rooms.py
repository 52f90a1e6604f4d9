"""How much memory there is for what lives briefly, so that its bound holds whatever the sizes.

Beside the model states a step holds at most a bucket of gradients, or what `bucket_mb` allows where
that is more, and at stage 3 two units of parameters, one in use and one that comes or is used
beside it. The gradient of a tied weight is under way from its first use in backward to its last,
beside those of all others, and so is that of a layer that is called at several ends. And reducing a
bucket takes scratch memory. What is too much is taken off the place of the second unit. The first
steps show which gradients are under way for long, and how much is used beside the unit in use: then
the places are made anew. Where they have no place within the bound, small models and such with many
tied weights, there are none: each part is an array of its own, as long as it is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import NamedTuple

from hpcml.optim.buckets import ALIGNMENT, Bucket


class Rooms(NamedTuple):
    """Elements of each place; gradients of tied weights have memory of their own."""

    gradients: int
    """For buckets on their way: those filled at once, and as a rule one that is reduced."""
    unit: int
    """For the unit in use."""
    second: int
    """For what is fetched before its use, or used beside it: what the bound leaves, which may be
    less than nothing."""


def rooms(
    buckets: Sequence[Bucket],
    tied: Collection[Bucket],
    most: int,
    *,
    beside: int,
    filled: int,
    together: int,
    overlap: bool,
    sharded: bool,
) -> Rooms:
    """The places for buckets and units of these sizes.

    tied: buckets whose gradients stay. most: elements of gradients that are on their way at once,
    if no bucket is larger. beside: elements that reducing one takes. filled: those that are filled
    at once, or 0. together: those of the units in use beside one of them, as far as is known.
    overlap: a bucket may be reduced while others are filled. sharded: units are gathered; for the
    second one half a unit is left at least, unless what is filled at once leaves less, and what is
    in use together.
    """
    sizes = Counter[int]()
    for bucket in buckets:
        sizes[bucket.unit] += bucket.size
    unit = max(sizes.values())
    trained = [bucket for bucket in buckets if bucket.trained]
    passing = [bucket for bucket in trained if bucket not in tied]
    largest = max((bucket.size for bucket in passing), default=0)
    least = filled or _filled_at_once(passing)
    gradients = max(least, min(_aligned(most), least + largest)) if overlap else least
    if not sharded:
        return Rooms(gradients, unit, unit)
    left = max([most, *(bucket.size for bucket in trained)])
    left = _aligned(left - sum(bucket.size for bucket in tied) - beside)
    gradients = max(least, min(gradients, left + unit - max(together, _aligned(unit // 2))))
    return Rooms(gradients, unit, unit - max(gradients - left, 0))


def _filled_at_once(buckets: Sequence[Bucket]) -> int:
    """Elements of the largest bucket, or of the two with parameters of a layer and its parts."""
    layers = [{p.name.rpartition(".")[0] for p in bucket.parameters} for bucket in buckets]
    around = [own | {layer.rpartition(".")[0] for layer in own} for own in layers]
    both = [
        buckets[one].size + buckets[other].size
        for one, other in pairwise(range(len(buckets)))
        if buckets[one].unit == buckets[other].unit
        and (layers[one] & around[other] or around[one] & layers[other])
    ]
    return max([*both, *(bucket.size for bucket in buckets)], default=0)


def _aligned(size: int) -> int:
    """Down to where arrays of any type may end, so that what lies there begins as they do."""
    return size - size % ALIGNMENT
