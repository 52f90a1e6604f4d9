"""Values brought together from the parts that ranks hold of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod

import numpy as np

from hpcml import memory
from hpcml.backend import Array
from hpcml.comm import Axis
from hpcml.comm.request import Request
from hpcml.nn import Parameter
from hpcml.optim.buckets import Bucket, Sharding
from hpcml.optim.flat import FlatStorage

HeldOf = Callable[[Bucket], tuple[Array, bool]]


def detach(parameters: Iterable[Parameter]) -> None:
    """Give parameters that lie in parts their whole values, to be laid out anew. Collective."""
    wholes = []
    for parameter in parameters:
        if parameter.unit is not None:
            wholes.append((parameter, parameter.data.copy()))
            parameter.unit.done()
    for parameter, values in wholes:
        parameter.unit = parameter.keeper = None
        parameter.data = values


def gather(
    bucket: Bucket,
    held: Array,
    out: Array,
    axis: Axis,
    sharding: Sharding,
    own: Array | None = None,
    background: bool = False,
) -> Request | None:
    """Bring a bucket together in `out`, given what each rank holds of it.

    own: this rank's block of `out`, if there is an array for it already.
    """
    if sharding.layers:
        if held.size:
            out[...] = held
        root = sharding.owner(bucket)
        if background:
            return axis.ibroadcast(out, root, out=out)
        axis.broadcast(out, root, out=out)
        return None
    own = out[sharding.block(bucket)] if own is None else own
    own[...] = held
    if background:
        return axis.iallgather(own, out=out)
    axis.allgather(own, out=out)
    return None


def gathered(
    parameters: Iterable[tuple[str, Parameter]],
    storage: FlatStorage,
    axis: Axis,
    held_of: HeldOf,
) -> Iterator[tuple[str, Array]]:
    """Each parameter by name with its part of an array, of one bucket at a time. Collective.

    held_of: what this rank holds of the array of a bucket, and whether that is all. Frozen
    parameters of which all ranks hold all give their values. An array is valid until the next is
    asked for.
    """
    current: Bucket | None = None
    whole: Array = None
    # One for all of a type: the caller still holds the last array when the next is made.
    rooms: dict[str, Array] = {}
    for name, parameter in parameters:
        bucket = storage.home.get(id(parameter))
        if bucket is None:  # frozen, and held by every rank
            yield name, parameter.data
            continue
        if bucket is not current:
            held, complete = held_of(bucket)
            current, whole = bucket, held
            if not complete:
                if held.dtype.name not in rooms:
                    size = max(bucket.size for bucket in storage.buckets)
                    rooms[held.dtype.name] = memory.empty(
                        (size,), held.dtype, "buffers", storage.device
                    )
                whole = rooms[held.dtype.name][: bucket.size]
                gather(bucket, held, whole, axis, storage.sharding)
        yield name, bucket.view(whole, bucket.number(parameter))


def assemble(parameter: Parameter, own: Array, axis: Axis) -> Array:
    """The whole of an array of which this rank has the part that it has of a parameter. Collective.

    own: this rank's part of the values, or of something like them; it is the whole of a parameter
    that the ranks of the axis do not divide.
    """
    if parameter.part is None:
        return own
    sizes = [prod(part.own) for part in parameter.parts]
    flat = axis.allgather(np.ascontiguousarray(own).reshape(-1), counts=sizes)
    whole = np.empty(parameter.whole_shape, own.dtype)
    start = 0
    for part, size in zip(parameter.parts, sizes, strict=True):
        part.put(flat[start : start + size].reshape(part.own), whole)
        start += size
    return whole
