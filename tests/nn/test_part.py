"""Parts of a tensor: what a rank holds has the values that the whole tensor has there."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hpcml.nn import Normal, Parameter, Uniform
from hpcml.nn.part import Part, blocks

PARTS = [
    Part((7, 5), 0, ((2, 5),)), Part((7, 5), 1, ((1, 4),)), Part((9,), 0, ((4, 9),)),
    Part((6, 5), 0, ((0, 1), (2, 3), (4, 6))), Part((4, 6), 1, ((0, 2), (4, 6))),
    Part((3, 8, 2), 1, ((1, 3), (5, 6))), Part((5, 4), 0, ((3, 3),)),
]  # fmt: skip
cases = pytest.mark.parametrize


@cases("part", PARTS)
def test_runs_are_the_elements_of_the_part(part: Part) -> None:
    whole = np.arange(np.prod(part.shape)).reshape(part.shape)
    expected = whole[part.index].reshape(-1)
    taken, again = np.empty(part.own, int), np.full(part.shape, -1)
    part.take(whole, taken)
    part.put(taken, again)
    np.testing.assert_array_equal(taken.reshape(-1), expected)
    np.testing.assert_array_equal(again[part.index], taken)
    assert (again == -1).sum() == whole.size - taken.size
    assert whole[part.index].shape == part.own
    for start in range(expected.size + 1):
        for count in range(expected.size - start + 1):
            found = np.full(count, -1)
            for place, first, length in part.runs(start, count):
                found[place : place + length] = np.arange(first, first + length)
            np.testing.assert_array_equal(found, expected[start : start + count])


@cases("part", PARTS)
@cases("init", [Normal(0.02), Uniform(0.5)])
@cases("made", [False, True])
@cases("dtype", ["float32", "bfloat16", "float64"])
def test_first_values_are_those_of_the_whole(
    part: Part, init: Normal | Uniform, made: bool, dtype: str
) -> None:
    """To the bit, whether the whole had been made before or not."""
    whole, divided = (Parameter(shape=part.shape, init=init) for _ in range(2))
    for parameter in (whole, divided):
        parameter.name = "weight"
        parameter.to_dtype(whole.dtype if dtype == "float32" else _dtype(dtype))
    if made:
        assert divided.data.shape == part.shape
    divided.divide([part], 0, "tp")
    assert divided.shape == part.own and divided.layout == {"tp": f"S({part.dim})"}
    assert divided.data.tobytes() == np.ascontiguousarray(whole.data[part.index]).tobytes()


def _dtype(name: str) -> np.dtype[np.generic]:
    from hpcml import backend

    return backend.dtype(name)


@cases("n", [0, 1, 2, 7, 12])
@cases("ranks", [1, 2, 3, 4])
def test_blocks_are_all_and_nearly_equal(n: int, ranks: int) -> None:
    found = blocks(n, ranks)
    sizes = [end - first for first, end in found]
    assert list(itertools.chain(*(range(*block) for block in found))) == list(range(n))
    assert len(found) == ranks and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes)[::-1]
