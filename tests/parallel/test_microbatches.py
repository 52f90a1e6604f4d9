"""Which samples of a batch a rank computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hpcml.parallel.data import microbatches


def parts(size: int, microbatch: int, ranks: int) -> list[list[slice]]:
    """By rank."""

    def axis(rank: int) -> Any:
        return SimpleNamespace(size=ranks, rank=rank)

    return [
        [part.samples for part in microbatches(size, microbatch, axis(rank))]
        for rank in range(ranks)
    ]


@given(st.integers(1, 60), st.integers(0, 70), st.integers(1, 9))
def test_each_sample_once(size: int, microbatch: int, ranks: int) -> None:
    found = parts(size, microbatch, ranks)
    samples = [k for own in found for part in own for k in range(part.start, part.stop)]
    assert sorted(samples) == list(range(size))


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 9))
def test_microbatches_are_dealt_out_in_turn(size: int, microbatch: int, ranks: int) -> None:
    """Microbatch j goes to rank j mod ranks; all but the last have the asked size."""
    found = parts(size, microbatch, ranks)
    in_turn = sorted(
        (part.start, part.stop, rank) for rank, own in enumerate(found) for part in own
    )
    for j, (start, stop, rank) in enumerate(in_turn):
        assert (start, rank) == (j * microbatch, j % ranks)
        assert stop == min(start + microbatch, size)


@given(st.integers(1, 60), st.integers(1, 9))
def test_a_share_at_once(size: int, ranks: int) -> None:
    found = parts(size, 0, ranks)
    assert all(len(own) <= 1 for own in found)
    assert max(part.stop - part.start for own in found for part in own) == -(-size // ranks)


def test_examples() -> None:
    assert parts(5, 0, 4) == [[slice(0, 2)], [slice(2, 4)], [slice(4, 5)], []]
    assert parts(5, 1, 2) == [[slice(0, 1), slice(2, 3), slice(4, 5)], [slice(1, 2), slice(3, 4)]]
    assert parts(1, 3, 2) == [[slice(0, 1)], []]
