"""Places for gradients and units: within the bound by construction, whatever the sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from hpcml.nn import Parameter
from hpcml.optim.buckets import Bucket, Sharding, plan
from hpcml.parallel.rooms import Rooms, rooms

cases = pytest.mark.parametrize


def buckets(units: Sequence[dict[str, int]], most: int) -> list[Bucket]:
    """Of layers by name and size, in thirds of `most` elements."""
    made = []
    for unit in units:
        made.append([])
        for name, size in unit.items():
            parameter = Parameter(shape=(size,))
            parameter.name = name
            made[-1].append((parameter, 0))
    return plan(made, 4 * most // 3, Sharding())


def laid_out(
    units: Sequence[dict[str, int]],
    most: int,
    *,
    tied: int,
    beside: int = 0,
    filled: int = 0,
    together: int = 0,
    overlap: bool = True,
) -> tuple[Rooms, int]:
    """Places where the first so many units are tied, and what the bound leaves beside them."""
    found = buckets(units, most)
    of_tied = [bucket for bucket in found if bucket.unit < tied]
    sizes = np.bincount([b.unit for b in found], [b.size for b in found])
    bound = max(most, *(bucket.size for bucket in found)) + 2 * int(sizes.max())
    room = rooms(
        found, of_tied, most, beside=beside, filled=filled, together=together, overlap=overlap,
        sharded=True,
    )  # fmt: skip
    return room, bound - sum(room) - sum(bucket.size for bucket in of_tied) - beside


BLOCK = {"a.weight": 3000, "a.bias": 300, "b.weight": 4000, "b.bias": 400}


@cases("most", [300, 3000, 12000, 50000])
@cases("vocab", [100, 2000, 7700, 30000])
@cases("beside", [0, 333])
@cases("overlap", [False, True])
def test_a_tied_gradient_is_within_the_bound(
    vocab: int, most: int, beside: int, overlap: bool
) -> None:
    """It waits beside the others, and reducing takes memory: that is taken off what comes.

    Which keeps half, unless a layer of which weight and bias are filled at once needs more.
    """
    room, left = laid_out(
        [{"wte.weight": vocab}, BLOCK, BLOCK], most, tied=1, beside=beside, overlap=overlap
    )
    assert left >= 0
    assert room.gradients >= 4000 + 400
    assert room.second >= min(room.unit // 2, room.unit - room.gradients - 64 * -(-beside // 64))


@cases("most", [13500, 50000])
def test_nothing_is_taken_off_without_need(most: int) -> None:
    """Two buckets pass and two whole units have places, with a small tied one too."""
    for tied in (0, 1):
        room, left = laid_out([{"wte.weight": 100}, BLOCK, BLOCK], most, tied=tied)
        assert left >= 0
        assert room.unit == room.second
        assert room.gradients >= min(2 * 4000, most)


def test_where_no_unit_can_come() -> None:
    """A bucket of gradients, a tied one and a unit are all that the bound allows: none is ahead."""
    layers = [{name: 6400} for name in ("wte.weight", "a.weight", "b.weight")]
    room, left = laid_out(layers, 3000, tied=1)
    assert (room, left) == ((6400, 6400, 0), 0)


def test_several_tied_gradients_at_once_may_be_more() -> None:
    """All of them wait: the bound leaves no place for the second, not even for all of a unit."""
    layers = [{name: 6400} for name in ("source.weight", "target.weight", "a.weight")]
    room, left = laid_out(layers, 3000, tied=2)
    assert (room, left) == ((6400, 6400, -6400), 0)


def test_a_layer_and_its_parts_are_filled_at_once() -> None:
    """As attention: its own weights and those of a layer in it have their gradients at once."""
    block = {"b.attn.in_weight": 6400, "b.attn.out.weight": 1280, "b.up.weight": 3200}
    room, left = laid_out([{"wte.weight": 9600}, block, block], 3000, tied=1)
    assert left >= 0
    assert room.gradients == 6400 + 1280
