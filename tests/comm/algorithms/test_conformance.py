"""All registered algorithms, a user's own included, against what each of them must do."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcml.comm import Mesh, link
from hpcml.comm.algorithms import turns
from hpcml.comm.faults import Delay, Fault, Raise, Reorder, Synchronous, WrongCount
from hpcml.comm.threads import run
from tests.comm.algorithms.conformance import (
    REDUCTIONS,
    Case,
    check,
    everywhere,
    layouts,
    random_case,
)


def among(*sizes: int) -> pytest.MarkDecorator:
    """A test of every algorithm, among so many ranks."""
    return pytest.mark.parametrize(("operation", "name", "size"), everywhere(*sizes))


def check_all(name: str, cases: Sequence[Case], deterministic: bool) -> None:
    """The program of a rank."""
    axis = Mesh(deterministic=deterministic)["dp"]
    for case in cases:
        check(axis, name, case)


def among_threads(
    operation: str,
    name: str,
    size: int,
    random: Random,
    number: int = 6,
    deterministic: bool | None = None,
    **options: Any,
) -> None:
    """Check some cases among ranks that are threads, on nodes where the algorithm applies."""
    nodes = random.choice(layouts(operation, name, size))
    cases = [random_case(operation, size, random) for _ in range(number)]
    mode = random.choice([False, True]) if deterministic is None else deterministic
    run(check_all, name, cases, mode, ranks=size, nodes=nodes, **options)


@among(1, 2, 3, 4, 5, 8)
@settings(max_examples=5)
@given(random=st.randoms(use_true_random=False))
def test_values_among_threads(operation: str, name: str, size: int, random: Random) -> None:
    among_threads(operation, name, size, random)


@among(3, 4)
@pytest.mark.parametrize("faults", [[Synchronous()], [Delay(0.002), Reorder()]], ids=str)
def test_values_whatever_messages_do(
    operation: str, name: str, size: int, faults: list[Fault]
) -> None:
    among_threads(operation, name, size, Random(size), 4, faults=faults, timeout=30)


@among(3, 4)
def test_long_messages_go_in_pieces(
    operation: str, name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "LIMIT", 24)
    among_threads(operation, name, size, Random(size), 8)


@among(2, 3, 5)
@pytest.mark.parametrize("faults", [[], [Synchronous()], [Delay(0.001), Reorder()]], ids=str)
def test_long_blocks_go_in_turns(
    operation: str,
    name: str,
    size: int,
    faults: list[Fault],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if operation not in REDUCTIONS:
        pytest.skip("nothing is combined")
    monkeypatch.setattr(turns, "PIECE", 24)
    among_threads(operation, name, size, Random(size), 8, faults=faults, timeout=30)


def one_call(operation: str, name: str, size: int, fault: Fault) -> None:
    """One call of 8 elements a rank with a fault."""
    case = Case(operation, (8,) * size)
    nodes = layouts(operation, name, size)[0]
    run(check_all, name, [case], False, ranks=size, nodes=nodes, faults=[fault], timeout=30)


@among(4)
def test_no_rank_waits_for_one_that_failed(operation: str, name: str, size: int) -> None:
    with pytest.raises(RuntimeError, match="injected fault"):
        one_call(operation, name, size, Raise(rank=2, call=1))


@among(4)
def test_a_wrong_count_is_noticed(operation: str, name: str, size: int) -> None:
    sender = 0 if operation in ("broadcast", "scatter") else 3
    with pytest.raises(ValueError, match=r"a message of .* shapes and types must agree"):
        one_call(operation, name, size, WrongCount(rank=sender, call=1))
