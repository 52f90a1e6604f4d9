"""Which part of a serial tensor a rank has, and whether two ranks have the same."""

from __future__ import annotations

import numpy as np
import pytest

from hpcml.comm import Mesh, run
from hpcml.train.compare import Item, Print, differing, marks, part_of
from hpcml.train.watch import Event, Place

X = np.random.default_rng(0).normal(size=(2, 5, 12))
HEADS = np.random.default_rng(1).normal(size=(2, 4, 5, 6))


def place(rank: int) -> Place:
    """Packed features, 3 and 2 positions between regions, the first and the last within."""
    packed = ((3 * rank, 3 * rank + 3), (6 + 3 * rank, 9 + 3 * rank))
    return Place((12, packed), 5, ((3 * rank, 3 + 2 * rank),), ((0, 1), (4, 5)))


def test_a_part_is_found_by_its_shape() -> None:
    def program() -> None:
        mesh = Mesh(dp=1, tp=2)
        rank = mesh.rank
        at = place(rank)
        packed = [i for first, end in at.features[1] for i in range(first, end)]
        own = slice(*at.own[0])
        half = X[..., :8]
        for whole, part in (
            (X, X),
            (X, X[..., packed]),  # as the layer before has left them
            (half, half[..., 4 * rank : 4 * rank + 4]),  # others in blocks
            (X, X[:, own]),
            (X, X[:, own][..., packed]),
            (X, X[:, [0, 4]]),
            (X.reshape(10, 12), X[:, own].reshape(-1, 12)),  # rows of all samples
            (HEADS, HEADS[:, 2 * rank : 2 * rank + 2]),
        ):
            found = part_of(Item(whole, part, "", at), mesh)
            assert found is not None and np.array_equal(found, part), part.shape
        for wrong in (X[..., :5], X[:, :1], X[:1], X[0]):
            assert part_of(Item(X, wrong, "", at), mesh) is None, wrong.shape
        assert part_of(Item(X, X[:, own], ""), mesh) is None  # where all should have the whole

    run(program, ranks=2)


def test_what_is_no_part_is_said() -> None:
    def program() -> None:
        mesh, event = Mesh(dp=2, tp=2), Event("forward", "up", "output")
        found = marks({event: Item(X, X[..., :5], "up", place(0))}, mesh)[event]
        assert found.off == np.inf
        assert found.note == "shape (2, 5, 5) is no part of (2, 5, 12) along tp"
        absent = marks({event: Item(X, None, "up")}, mesh)[event]
        assert absent.off == np.inf and absent.note == "it was computed serially only"

    run(program, ranks=4)


def test_rounding_of_what_is_nothing_else_is_no_difference() -> None:
    """The gradient of a bias that the softmax after it cancels, beside that of another."""
    large, noise = np.full(3, 7.0), np.array([1e-17, -3e-17])
    events = Event("gradient", "v", "bias"), Event("gradient", "k", "bias")
    items = Item(large, large, "v"), Item(noise, -noise, "k")
    found = marks(dict(zip(events, items, strict=True)), Mesh(layout={"dp": 1}))
    assert found[events[0]].off == 0 and 0 < found[events[1]].off < 1e-15
    other = found[events[1]].parallel
    assert other is not None and found[events[1]].serial.like(other, 1e-9)


def test_axes_along_which_ranks_differ() -> None:
    def program() -> None:
        mesh = Mesh(dp=2, tp=2)  # ranks 0 and 1, 2 and 3 are neighbours along tp
        for values, axes in (
            ([1, 1, 1, 1], []),
            ([1, 2, 1, 2], ["tp"]),
            ([1, 1, 2, 2], ["dp"]),
            ([1, 1, 1, 2], ["dp", "tp"]),
            ([1, None, 2, None], ["dp"]),
            ([1, 1 + 1e-12, 1, 1], []),
            ([1, np.nan, 1, np.inf], ["tp"]),
        ):
            prints = [v and Print.of(np.array([v, -1.0])) for v in values]
            assert differing(mesh, prints, ["dp", "tp"], 1e-9) == axes, values

    run(program, ranks=4)


@pytest.mark.parametrize("other", [[2.0, 1.0], [1.0, 2.5], [1.0, -2.0], [1.0, np.inf]])
def test_a_print_tells_values_from_others(other: list[float]) -> None:
    mine = Print.of(np.array([1.0, 2.0]))
    assert mine.like(Print.of(np.array([1.0, 2.0 + 1e-12])), 1e-9)
    assert not mine.like(Print.of(np.array(other)), 1e-9)
