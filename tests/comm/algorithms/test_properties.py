"""Adjoints, bits and bytes of all registered algorithms; that these checks find what is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import numpy as np
import pytest

from hpcml.comm import Mesh, algorithm
from hpcml.comm.algorithms import algorithms, ordered, registry, turns
from hpcml.comm.algorithms.allreduce import ring
from hpcml.comm.faults import Fault, Synchronous
from hpcml.comm.link import Link
from hpcml.comm.reduction import Reduction
from hpcml.comm.threads import run
from hpcml.comm.transport import Array
from tests.comm.algorithms import test_conformance as conformance
from tests.comm.algorithms.conformance import Case, everywhere, layouts, random_case, registered
from tests.comm.algorithms.properties import (
    ROUNDED,
    check_adjoint,
    check_order,
    check_same_bits,
)

SIZES = (1, 2, 3, 4, 5, 8)
EVERY = everywhere(*SIZES)
NAMES = ("operation", "name", "size")


def among(size: int, program: Callable[..., None], operation: str, name: str, *rest: Any) -> None:
    """Run a check on the first two layouts on which the algorithm applies."""
    for nodes in layouts(operation, name, size)[:2]:
        run(program, name, *rest, ranks=size, nodes=nodes, timeout=60)


def adjoints(name: str, cases: list[Case]) -> None:
    axis = Mesh()["dp"]
    for case in cases:
        check_adjoint(axis, name, case)


@pytest.mark.parametrize(NAMES, EVERY)
def test_adjoint(operation: str, name: str, size: int) -> None:
    random = Random(size)
    cases = [random_case(operation, size, random) for _ in range(4)]
    among(size, adjoints, operation, name, cases)


def orders(name: str, operation: str) -> None:
    for deterministic in (False, True):
        axis = Mesh(deterministic=deterministic)["dp"]
        counts = tuple(range(5, 5 + axis.size))
        for dtype in ROUNDED:
            for accumulate in (False, True):
                case = Case(operation, counts, dtype, root=axis.size - 1, accumulate=accumulate)
                check_order(axis, name, case)


@pytest.mark.parametrize(NAMES, [key for key in EVERY if algorithms(key[0])[key[1]].ordered])
def test_ordered_algorithms_add_in_the_order_of_the_ranks(
    operation: str, name: str, size: int
) -> None:
    among(size, orders, operation, name, operation)


@pytest.mark.parametrize("operation", ["reduce_scatter", "allreduce", "reduce"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_they_do_so_in_turns(operation: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PIECE", 8)
    among(size, orders, operation, "ordered", operation)


def same_bits(name: str) -> None:
    axis = Mesh()["dp"]
    for count in (1, 7, 100):
        check_same_bits(axis, name, count)


@pytest.mark.parametrize(("name", "size"), [key[1:] for key in EVERY if key[0] == "allreduce"])
def test_all_ranks_get_the_same_bits(name: str, size: int) -> None:
    among(size, same_bits, "allreduce", name)


def bytes_sent(operation: str, name: str, count: int) -> tuple[int, int]:
    """What this rank sends, and of that off its node, for `count` bytes a rank."""
    mesh = Mesh()
    axis = mesh["dp"]
    x = np.zeros(count * axis.size, np.uint8)
    mine = x[:count] if operation in ("allgather", "gather") else x
    getattr(axis, operation)(mine, algorithm=name)
    (counts,) = mesh.ledger.snapshot()["dp"].values()
    return counts.bytes_sent, counts.bytes_off_node


def lg(p: int) -> int:
    return (p - 1).bit_length()


SENT: dict[tuple[str, str], Callable[[int, int], float]] = {
    ("allreduce", "ring"): lambda n, p: 2 * n * (p - 1) / p,
    ("allreduce", "ordered"): lambda n, p: 2 * n * (p - 1) / p,
    ("allreduce", "recursive_doubling"): lambda n, p: n * lg(p),
    ("allreduce", "rabenseifner"): lambda n, p: 2 * n * (p - 1) / p,
    ("reduce_scatter", "recursive_halving"): lambda n, p: n * (p - 1) / p,
    ("reduce_scatter", "pairwise"): lambda n, p: n * (p - 1) / p,
    ("reduce_scatter", "ring"): lambda n, p: n * (p - 1) / p,
    ("reduce_scatter", "ordered"): lambda n, p: n * (p - 1) / p,
    ("allgather", "recursive_doubling"): lambda n, p: n * (p - 1) / p,
    ("allgather", "bruck"): lambda n, p: n * (p - 1) / p,
    ("allgather", "ring"): lambda n, p: n * (p - 1) / p,
    ("alltoall", "pairwise"): lambda n, p: n * (p - 1) / p,
    ("alltoall", "bruck"): lambda n, p: n / 2 * lg(p),
}
ANY_SIZE = [key for key in SENT if key[1] in ("ring", "pairwise", "ordered")] + [
    ("allgather", "bruck")
]
"""Those whose formula holds for any number of ranks, not only for powers of two."""


@pytest.mark.parametrize(
    ("key", "size"),
    [(key, p) for key in SENT for p in (2, 3, 4, 5, 8) if p in (2, 4, 8) or key in ANY_SIZE],
    ids=str,
)
def test_every_rank_sends_what_the_formula_says(key: tuple[str, str], size: int) -> None:
    found = run(bytes_sent, *key, 16, ranks=size)
    assert found == [(SENT[key](16 * size, size), 0)] * size


@pytest.mark.parametrize(("nodes", "per_rank"), [([0, 0, 1, 1], 32), ([0, 1, 0, 1], 32)])
def test_hierarchical_puts_the_payload_on_the_link_once(nodes: list[int], per_rank: int) -> None:
    """2 nodes of 2 ranks: n = 64 bytes leave each node, half of them from each of its ranks."""
    found = run(bytes_sent, "allreduce", "hierarchical", 16, ranks=4, nodes=nodes)
    assert [off_node for _, off_node in found] == [per_rank] * 4


def test_hierarchical_uses_as_many_slices_as_the_smallest_node_has_ranks() -> None:
    found = run(bytes_sent, "allreduce", "hierarchical", 12, ranks=5, nodes=[0, 0, 1, 1, 1])
    assert [off_node for _, off_node in found] == [30, 30, 30, 30, 0]


@pytest.fixture
def own_name() -> Iterator[str]:
    """A name under which a test may register an all-reduce."""
    yield "mine"
    registry._algorithms["allreduce"].pop("mine", None)


def cost(n: int, p: int, machine: registry.Machine) -> float:
    return 0.0


def test_a_users_algorithm_is_checked_with_the_others(own_name: str) -> None:
    calls = []

    @algorithm("allreduce", own_name, cost=cost)
    def mine(link: Link, x: Array, out: Array, reduction: Reduction) -> None:
        calls.append(link.rank)
        ring(link, x, out, reduction)

    assert ("allreduce", own_name) in registered()
    conformance.among_threads("allreduce", own_name, 3, Random(0))
    test_adjoint("allreduce", own_name, 3)
    assert set(calls) == {0, 1, 2}


def unlike_on_ranks(link: Link, x: Array, out: Array, reduction: Reduction) -> None:
    """Each rank begins with its own contribution: not the same bits everywhere."""
    rows = np.empty(x.size * link.size, x.dtype)
    algorithms("allgather")["ring"].run(link, x, rows, [x.size] * link.size)
    parts = [rows[r * x.size :][: x.size] for r in range(link.size)]
    reduction.fold(parts[link.rank :] + parts[: link.rank], out)


def wrong_values(link: Link, x: Array, out: Array, reduction: Reduction) -> None:
    ring(link, x, out, reduction)
    out[-1:] += out[-1:]


def input_changed(link: Link, x: Array, out: Array, reduction: Reduction) -> None:
    ring(link, x, x, reduction)
    out[...] = x


def in_place_forgotten(link: Link, x: Array, out: Array, reduction: Reduction) -> None:
    out[...] = 0
    ring(link, x, out, reduction)


def only_one_rank_works(link: Link, x: Array, out: Array, reduction: Reduction) -> None:
    if link.rank == 0:
        link.send(x, 1)
    ring(link, x, out, reduction)


def needs_buffers(link: Link, x: Array, out: Array, reduction: Reduction) -> None:
    """Right, as long as sends do not wait for their receivers."""
    rows = np.empty((link.size, x.size), x.dtype)
    for rank in range(link.size):
        if rank != link.rank:
            link.send(x, rank)
    for rank in range(link.size):
        if rank != link.rank:
            link.recv(rows[rank], rank)
    rows[link.rank] = x
    reduction.fold(list(rows), out)


def values(name: str, faults: Sequence[Fault] = ()) -> None:
    random = Random(3)
    conformance.among_threads("allreduce", name, 3, random, 30, False, timeout=1, faults=faults)


@pytest.mark.parametrize(
    "broken", [wrong_values, input_changed, in_place_forgotten, only_one_rank_works]
)
def test_a_broken_algorithm_is_found(broken: Callable[..., None], own_name: str) -> None:
    algorithm("allreduce", own_name, cost=cost)(broken)
    with pytest.raises((AssertionError, ValueError)):
        values(own_name)


def test_bits_that_differ_between_ranks_are_found(own_name: str) -> None:
    algorithm("allreduce", own_name, cost=cost)(unlike_on_ranks)
    values(own_name)
    with pytest.raises(AssertionError):
        test_all_ranks_get_the_same_bits(own_name, 3)


def test_an_order_that_is_not_kept_is_found(own_name: str) -> None:
    algorithm("allreduce", own_name, cost=cost, ordered=True)(ring)
    with pytest.raises(AssertionError):
        test_ordered_algorithms_add_in_the_order_of_the_ranks("allreduce", own_name, 3)
    algorithm("allreduce", own_name, cost=cost, ordered=True)(ordered.allreduce)
    test_ordered_algorithms_add_in_the_order_of_the_ranks("allreduce", own_name, 3)


def test_reliance_on_buffered_sends_is_found(own_name: str) -> None:
    algorithm("allreduce", own_name, cost=cost)(needs_buffers)
    values(own_name)
    with pytest.raises(TimeoutError, match="rank 0"):
        values(own_name, faults=[Synchronous()])
