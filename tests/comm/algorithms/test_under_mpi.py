"""The same checks of all registered algorithms between processes, the vendor's calls included."""

from __future__ import annotations

import os
from random import Random
from typing import Any

import numpy as np
import pytest

from hpcml.comm import Axis, Mesh
from hpcml.comm.algorithms import algorithms, turns
from hpcml.comm.transport import Array, Pending, Transport
from hpcml.comm.world import world
from tests.comm.algorithms.conformance import Case, check, random_case, registered, serves
from tests.comm.algorithms.properties import ROUNDED, check_adjoint, check_order, check_same_bits

every = pytest.mark.parametrize(("operation", "name"), registered())


class Synchronous:
    """A transport whose sends wait for their receivers."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def isend(self, buffer: Array, dest: int, tag: int, synchronous: bool = False) -> Pending:
        return self._transport.isend(buffer, dest, tag, synchronous=True)


@pytest.mark.mpi
@every
@pytest.mark.parametrize(("synchronous", "piece"), [(False, turns.PIECE), (True, 24)])
def test_values(
    operation: str, name: str, synchronous: bool, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "PIECE", piece)
    transport = Synchronous(world()) if synchronous else world()
    random = Random(11)
    for deterministic in (False, True):
        axis = Axis("mpi", transport, deterministic=deterministic)
        for _ in range(15):
            check(axis, name, random_case(operation, axis.size, random))


@pytest.mark.mpi
@every
def test_adjoint(operation: str, name: str) -> None:
    axis = Mesh()["dp"]
    random = Random(12)
    for _ in range(5):
        check_adjoint(axis, name, random_case(operation, axis.size, random))


@pytest.mark.mpi
@pytest.mark.parametrize("name", algorithms("allreduce"))
def test_all_ranks_get_the_same_bits(name: str) -> None:
    for count in (1, 7, 1000):
        check_same_bits(Mesh()["dp"], name, count)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("operation", "name"), [pair for pair in registered() if algorithms(pair[0])[pair[1]].ordered]
)
def test_ordered_algorithms_add_in_the_order_of_the_ranks(operation: str, name: str) -> None:
    for deterministic in (False, True):
        axis = Mesh(deterministic=deterministic)["dp"]
        for dtype in ROUNDED:
            for accumulate in (False, True):
                counts = tuple(range(5, 5 + axis.size))
                check_order(axis, name, Case(operation, counts, dtype, accumulate=accumulate))


@pytest.mark.mpi(min_size=2)
@pytest.mark.skipif(
    "HPCML_TEST_LARGE" not in os.environ,
    reason="12 GiB a rank: set HPCML_TEST_LARGE=1",
)
@every
def test_more_than_2_to_the_31_elements(operation: str, name: str) -> None:
    """Bytes, whose ends and middle would show a count that wrapped or a message that was cut."""
    axis = Mesh()["dp"]
    each = -(-(2**31 + 4096) // axis.size)
    counts = (each,) * axis.size
    if not serves(axis, name, Case(operation, counts, np.dtype(np.uint8))):
        return
    x = np.ones(each if operation in ("allgather", "gather") else each * axis.size, np.uint8)
    x[-1] += axis.rank
    result = getattr(axis, operation)(x, algorithm=name)
    if result is None:
        return
    total = axis.size if operation in ("allreduce", "reduce", "reduce_scatter") else 1
    assert result[0] == total
    assert result[result.size // 2] == total
    assert np.count_nonzero(result != total) <= axis.size
