"""The order in which buckets are reduced, and what each waits for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from hpcml.comm import Axis, Mesh
from hpcml.nn import Parameter
from hpcml.optim.buckets import Bucket, Sharding, plan
from hpcml.parallel.turns import Turns

Uses = Sequence[Parameter | None]


def bucketed(*sizes: int, each: int = 1) -> tuple[list[Bucket], list[Parameter]]:
    """Buckets of one unit each, of `each` parameters of these sizes, in the model's order."""
    members = [[(Parameter(shape=(size,)), 0) for _ in range(each)] for size in sizes]
    parameters = [parameter for unit in members for parameter, _ in unit]
    for number, parameter in enumerate(parameters):
        parameter.name = f"p{number}"
    return plan(members, 1 << 30, Sharding()), parameters


def turns_of(buckets: Sequence[Bucket], ranks: Axis | None = None, *, alike: bool = True) -> Turns:
    """All in one stage."""
    return Turns(ranks or Axis("solo"), {0: buckets}, set(), alike)


def anything(size: int) -> bool:
    """There is a place for all."""
    return True


def go_back(
    turns: Turns,
    told: Uses,
    came: Uses | None = None,
    *,
    stage: int = 0,
    fits: Callable[[int], bool] = anything,
) -> tuple[list[tuple[int, Bucket]], list[Bucket]]:
    """A backward: those whose turn came, each after how many contributions, and the rest."""
    turns.expect(stage, told, fits)
    when = [(0, bucket) for bucket in turns.ready()]
    contributions = [one for one in (told if came is None else came) if one is not None]
    left = Counter(map(id, contributions))
    for number, parameter in enumerate(contributions, 1):
        left[id(parameter)] -= 1
        if not left[id(parameter)]:
            turns.came(parameter)
            when += [(number, bucket) for bucket in turns.ready()]
    rest = list(turns.rest())
    assert not list(turns.ready()), "all turns are over"
    return when, rest


def test_each_comes_when_its_last_gradient_has() -> None:
    """From the first backward on, in the order in which they are used, not defined."""
    (first, second, third), (a, b, c) = bucketed(8, 8, 8)
    turns = turns_of([first, second, third])
    for _ in range(2):  # b is used twice, and last
        when, rest = go_back(turns, [b, a, c, b])
        assert when == [(2, first), (3, third), (4, second)] and not rest
    assert turns.all() == [first, third, second]


def test_nothing_waits_for_what_gets_no_gradient() -> None:
    """It has its turn between those beside which it was defined."""
    buckets, (a, _, c, d) = bucketed(8, 8, 8, 8)
    turns = turns_of(buckets)
    when, rest = go_back(turns, [d, c, a])
    assert when == [(1, buckets[3]), (2, buckets[2]), (2, buckets[1]), (3, buckets[0])]
    assert not rest
    del turns.ranks  # there is nothing to agree on, whatever else is left out
    when, rest = go_back(turns, [d, a])
    assert [bucket for _, bucket in when] == buckets[::-1] and not rest
    when, rest = go_back(turns, [])
    assert [bucket for _, bucket in when] == buckets[::-1] and not rest


def test_parameters_of_a_bucket_count_once_each() -> None:
    """However often each is used."""
    (low, high), (a, b, c, d) = bucketed(8, 8, each=2)
    when, rest = go_back(turns_of([low, high]), [d, c, d, b, a, b])
    assert when == [(3, high), (6, low)] and not rest


def test_other_layers_in_another_order() -> None:
    """It is agreed on where all ranks use the same; else what was learned stays, and they wait."""
    buckets, (a, b, c) = bucketed(8, 8, 8)
    for alike in (True, False):
        turns = turns_of(buckets, alike=alike)
        go_back(turns, [c, b, a])
        when, rest = go_back(turns, [a, c, b])
        assert not rest
        if alike:
            assert [number for number, _ in when] == [1, 2, 3]
        else:
            assert [number for number, _ in when] == [2, 3, 3]


def test_where_more_may_come_all_parameters_are_waited_for() -> None:
    """What comes shows the order of the next backward; what does not is the rest."""
    (first, second, third), (a, b, _) = bucketed(8, 8, 8)
    turns = turns_of([first, second, third])
    when, rest = go_back(turns, [None, a], came=[b, a])
    assert not when and rest == [third, second, first]
    assert turns.all() == [second, first, third]
    when, rest = go_back(turns, [None, a], came=[b, a])
    assert when == [(1, second), (2, first)] and rest == [third]


def test_an_order_is_observed_once() -> None:
    """A bucket comes with its last gradient; later backwards that may bring more change nothing."""
    (first, second), (a, b, c, d) = bucketed(8, 8, each=2)
    turns = turns_of([first, second])
    go_back(turns, [None], came=[a, c, d, b])
    assert turns.all() == [second, first]
    when, rest = go_back(turns, [None, a, c], came=[a, b, c, d])
    assert when == [(4, second), (4, first)] and not rest
    assert turns.all() == [second, first]


def test_what_comes_late_is_refused() -> None:
    """Its bucket has been reduced without it."""
    (low, high), (a, b) = bucketed(8, 8)
    turns = turns_of([low, high])
    turns.expect(0, [b, a], anything)
    turns.came(b)
    assert list(turns.ready()) == [high]
    with pytest.raises(RuntimeError, match="p1: a gradient came after it had been reduced"):
        turns.came(b)


def test_what_is_filled_beside_others_lies_apart() -> None:
    """Unless there is a place for the two: more than one come and go, or one that is too large."""
    (first, second, third), (a, b, c) = bucketed(64, 64, 640)
    for uses in ([a, b, c], [b, a, b]):
        turns = turns_of([first, second, third])
        go_back(turns, uses)
        assert not turns.apart
    turns = turns_of([first, second, third])
    go_back(turns, [b, a, c, b])
    assert turns.apart == {second}
    turns = turns_of([first, second, third])
    go_back(turns, [b, c, b], fits=lambda size: size < 640)
    assert turns.apart == {second}
    turns = Turns(Axis("solo"), {0: [first, second, third]}, {first}, alike=True)
    go_back(turns, [b, a, c, b])
    assert turns.apart == {first, second}


def test_stages_have_orders_of_their_own() -> None:
    """Of what another one has nothing is waited for."""
    buckets, (a, b, c, d) = bucketed(8, 8, 8, 8)
    turns = Turns(Axis("solo"), {0: buckets[:2], 3: buckets[2:]}, set(), alike=True)
    assert go_back(turns, [c, d], stage=3) == ([(1, buckets[2]), (2, buckets[3])], [])
    assert go_back(turns, [b, a], stage=0) == ([(1, buckets[1]), (2, buckets[0])], [])
    assert turns.all() == [buckets[1], buckets[0], buckets[2], buckets[3]]
    go_back(turns, [a, d, c], stage=3)
    assert turns.all() == [buckets[1], buckets[0], buckets[3], buckets[2]]


@pytest.mark.parametrize("seed", range(30))
def test_whatever_is_used(seed: int) -> None:
    """Each bucket once, as soon as its own and those before it have come, and nothing is left."""
    rng = np.random.default_rng(seed)
    buckets, parameters = bucketed(*rng.integers(1, 50, rng.integers(1, 8)), each=2)
    home = {id(p): bucket for bucket in buckets for p in bucket.parameters}
    turns = turns_of(buckets, alike=bool(seed % 2))
    for _ in range(4):
        used = [parameters[n] for n in rng.integers(0, len(parameters), rng.integers(0, 20))]
        when, rest = go_back(turns, used)
        assert not rest and Counter(bucket for _, bucket in when) == Counter(buckets)
        last = {home[id(p)]: number for number, p in enumerate(used, 1)}
        done = 0
        for number, bucket in when:
            done = max(done, last.get(bucket, 0))
            assert number == done
        if turns.alike:  # then none waits for another that comes later
            assert all(number == last[bucket] for number, bucket in when if bucket in last)


@pytest.mark.mpi
@pytest.mark.parametrize("alike", [True, False])
def test_ranks_that_use_other_layers_have_one_order(alike: bool) -> None:
    """That of the first; each waits for what it uses itself."""
    axis = Mesh()["dp"]
    buckets, parameters = bucketed(8, 16, 24, 32, 40)
    turns = turns_of(buckets, axis, alike=alike)
    own = np.random.default_rng(axis.rank).permutation(5)[: 5 - axis.rank % 2].tolist()
    when, rest = go_back(turns, [parameters[number] for number in own])
    assert not rest
    orders = axis.allgather_object([buckets.index(bucket) for _, bucket in when])
    assert all(order == orders[0] for order in orders)
    assert axis.rank > 0 or orders[0] == own


@pytest.mark.mpi
def test_an_order_that_one_rank_does_not_know_is_observed_by_all() -> None:
    """One rank's adjoints may call backward() themselves: then that of the first counts."""
    axis = Mesh()["dp"]
    buckets, (a, b, c) = bucketed(8, 8, 8)
    turns = turns_of(buckets, axis, alike=False)
    nests = axis.rank == axis.size - 1
    go_back(turns, [None, c] if nests else [c, b, a], came=[a, c, b])
    assert [buckets.index(bucket) for bucket in turns.all()] == [0, 2, 1]


@pytest.mark.mpi
def test_reductions_meet_while_the_order_is_observed() -> None:
    """A bucket has its turn in backward on a rank that uses it, at the end on one that does not."""
    axis = Mesh()["dp"]
    buckets, (a, b, c) = bucketed(8, 16, 24)
    turns = turns_of(buckets, axis, alike=False)
    sums = list[np.ndarray]()

    def reduce(bucket: Bucket) -> None:
        sums.append(axis.allreduce(np.ones(bucket.size)))

    turns.expect(0, [None], anything)
    for parameter in (c, b, a) if axis.rank == 0 else (c, a):
        turns.came(parameter)
        for bucket in turns.ready():
            reduce(bucket)
    for bucket in turns.rest():
        reduce(bucket)
    assert [total.tolist() for total in sums] == [[axis.size] * b.size for b in buckets[::-1]]
