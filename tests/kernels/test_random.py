"""Philox and what is made of it: known answers, equality of slices, dropout."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from hpcml.kernels import cpu, generic, of
from hpcml.kernels.cpu.random import TILE, philox
from tests.kernels.support import DTYPES, Array, bits, close, randoms

KEY = np.uint64(0x0123456789ABCDEF)
SLICES = [(0, 1), (1, 2), (2, 9), (3, 3), (5, 70), (63, 300), (TILE - 1, TILE + 6), (7, 2 * TILE)]

# Random123 1.14, tests/kat_vectors: philox4x32, 10 rounds: counter, key, words
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.fixture(params=DTYPES, autouse=True)
def dtype(request: pytest.FixtureRequest) -> str:
    of(np.empty(0, request.param))
    return str(request.param)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    @numba.njit
    def call(key: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> Any:
        return philox(key, c0, c1, c2, c3)

    whole = key[0] | key[1] << 32
    assert list(call(np.uint64(whole), *map(np.uint32, counter))) == words
    arrays = [np.array([c], np.uint64) for c in counter]
    assert [int(w[0]) for w in generic._philox(whole, *arrays)] == words


@pytest.mark.parametrize("start", [0, 1, 6, 2**34 - 3, 2**40 + 1])
@pytest.mark.parametrize("count", [0, 1, 7, 63, 64, 65, 300, TILE + 9])
@pytest.mark.parametrize("name", ["random_words", "random_uniform", "random_normal"])
def test_streams(name: str, count: int, start: int, dtype: str) -> None:
    actual = np.empty(count, np.uint32 if name == "random_words" else dtype)
    expected = np.empty(count, actual.dtype if name == "random_words" else np.float64)
    getattr(cpu, name)(KEY, start, actual)
    getattr(generic, name)(KEY, start, expected)
    if name == "random_normal":
        close(actual, expected, dtype)
    else:
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("first", "last"), SLICES)
@pytest.mark.parametrize("name", ["random_words", "random_uniform", "random_normal"])
def test_a_slice_of_a_stream_has_the_bits_of_the_whole(
    name: str, first: int, last: int, dtype: str
) -> None:
    whole = np.empty(3 * TILE, np.uint32 if name == "random_words" else dtype)
    getattr(cpu, name)(KEY, 11, whole)
    part = np.empty(last - first, whole.dtype)
    getattr(cpu, name)(KEY, 11 + first, part)
    assert bits(part) == bits(whole[first:last])


def test_a_uniform_number_is_below_one_and_on_a_grid(dtype: str) -> None:
    out = np.empty(100_000, dtype)
    cpu.random_uniform(KEY, 0, out)
    assert out.min() >= 0 and out.max() < 1
    np.testing.assert_array_equal(out * 2**24 % 1, 0)


def dropped(
    x: Array, first: int, probability: float, runs: Any = None, period: int = 0, module: Any = cpu
) -> Array:
    out = np.full_like(x, np.nan)
    threshold = np.uint32(probability * 2**32)
    whole = [(0, x.shape[1])] if runs is None else runs
    module.dropout(x, KEY, np.uint64(first), threshold, np.array(whole), period, out)
    return out


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 7), (3, 65), (2, TILE + 9)])
@pytest.mark.parametrize("first", [0, 2**32 - 1])
def test_dropout(first: int, shape: tuple[int, int], dtype: str) -> None:
    (x,) = randoms(dtype, shape)
    expected = dropped(x.astype(np.float64), first, 0.3, module=generic)
    out = dropped(x, first, 0.3)
    np.testing.assert_array_equal(out == 0, expected == 0)
    close(out, expected, dtype)


def test_a_mask_is_what_it_always_was(dtype: str) -> None:
    """The elements of sample 7 that are dropped: a run that is resumed needs the same ones."""
    gone = np.flatnonzero(dropped(np.ones((1, 2 * TILE), dtype), 7, 0.01) == 0)
    assert gone[:6].tolist() == [116, 185, 211, 229, 236, 242]
    assert gone[gone >= TILE][:2].tolist() == [4276, 4508]


# runs of neighbours, how far apart they come again, how often
PARTS = [
    ([(0, 300)], 300, 1), ([(1, 1)], 2, 7), ([(3, 10), (20, 1)], 40, 9), ([(5, 64)], 70, 130),
    ([(0, 0), (6, 5), (11, 2)], 13, 4), ([(TILE - 3, 9)], 2 * TILE, 3), ([(0, 0)], 5, 3),
    ([(TILE + 2, 2 * TILE), (3 * TILE + 5, TILE)], 5 * TILE, 1),
]  # fmt: skip


@pytest.mark.parametrize(("runs", "period", "times"), PARTS)
def test_a_part_of_a_sample_has_the_mask_of_the_whole(
    runs: Any, period: int, times: int, dtype: str
) -> None:
    (x,) = randoms(dtype, (3, times * period))
    places = [t * period + i for t in range(times) for a, n in runs for i in range(a, a + n)]
    part = np.ascontiguousarray(x[:, places])
    expected = dropped(x, 2**32 - 2, 0.4)[:, places]
    assert bits(dropped(part, 2**32 - 2, 0.4, runs, period)) == bits(expected)
    close(dropped(part, 2**32 - 2, 0.4, runs, period, generic), expected, dtype)


def test_dropout_of_a_sample_depends_on_its_number_alone(dtype: str) -> None:
    (x,) = randoms(dtype, (6, 300))
    assert bits(dropped(x[2:5], 12, 0.5)) == bits(dropped(x, 10, 0.5)[2:5])
    masks = {row.tobytes() for row in dropped(np.ones((50, 300), dtype), 0, 0.5) != 0}
    assert len(masks) == 50


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9])
def test_dropout_drops_as_often_as_asked(probability: float, dtype: str) -> None:
    out = dropped(np.ones((30, 2 * TILE), dtype), 0, probability)
    spread = 4 * np.sqrt(probability * (1 - probability) / out.size)
    assert np.mean(out == 0) == pytest.approx(probability, abs=spread)
    assert np.unique(out[out != 0]) == pytest.approx(1 / (1 - probability), rel=1e-6)
