"""Notes of calls and work, and clocks of ranks brought together."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest

import hpcml
from hpcml.comm import Ledger, Mesh, timeline
from hpcml.comm.timeline import Timeline, offset


def test_a_piece_of_a_piece_is_not_noted_and_nothing_without_a_timeline() -> None:
    ledger = Ledger()
    with ledger.span("F", 0, 1):
        pass
    kept = ledger.timeline = Timeline()
    with ledger.span("F", 0, 1), ledger.span("U"):
        pass
    with pytest.raises(ValueError), ledger.span("B", 2, 3):
        raise ValueError
    with ledger.span("U"):
        pass
    assert [work[:3] for work in kept.work] == [("F", 0, 1), ("B", 2, 3), ("U", -1, -1)]
    assert all(work.start <= work.end for work in kept.work)
    assert all(a.end <= b.start for a, b in pairwise(kept.work))


@pytest.mark.mpi
def test_every_call_that_may_wait_is_noted() -> None:
    mesh = Mesh()
    axis = mesh.world
    if axis.size == 1:
        pytest.skip("one rank calls nobody")
    after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    mesh.ledger.timeline = kept = Timeline()
    axis.allreduce(np.ones(3, np.float32))
    axis.barrier()
    request = axis.isend(np.ones(5), after)
    axis.recv(np.empty(5), before)
    request.wait()
    axis.iallreduce(np.ones(2)).wait()
    mesh.ledger.timeline = None
    axis.allreduce(np.ones(3))
    calls = [call for call in kept.calls if call.operation != "send"]  # it may be gone at once
    assert [call[:4] for call in calls] == [
        ("all_reduce", "world", 12, False),
        ("barrier", "world", 0, False),
        ("recv", "world", 40, False),
        ("all_reduce", "world", 16, True),
    ]
    assert all(a.end <= b.start for a, b in pairwise(calls[:3]))
    assert all(call.start <= call.end for call in kept.calls)


def test_clocks_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    own, real = threading.local(), timeline.clock
    monkeypatch.setattr(timeline, "clock", lambda: real() + own.ahead)

    def program() -> tuple[float, float]:
        axis = Mesh().world
        own.ahead = (0.0, 1000.0, -3.5)[axis.rank]
        return offset(axis)

    found = hpcml.run(program, ranks=3)
    assert found[0] == (0.0, 0.0)
    for (shift, uncertainty), wanted in zip(found[1:], (-1000.0, 3.5), strict=True):
        assert 0 < uncertainty < 0.1
        assert shift == pytest.approx(wanted, abs=uncertainty + 1e-9)
