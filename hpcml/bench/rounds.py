"""How collective calls are timed: in turns, on all ranks at once, and memory beside them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hpcml.comm import Axis

Call = Callable[[], Any]
Times = dict[str, np.ndarray[Any, np.dtype[np.float64]]]
"""Seconds of a call by contender, a number for each round."""

_LEAST = 1e-3
"""Seconds that are timed at once: as many calls as that takes, at most `_MOST`."""
_MOST = 200
_BUDGET = 1.0
"""Seconds for the rounds of one case, between `_FEW` and `_MANY` of them."""
_FEW, _MANY = 5, 40


def alternate(
    axis: Axis, contenders: Mapping[str, Call], rounds: int = 0, rest: float = 0.0
) -> Times:
    """Time calls of all ranks in turns, so that a machine that drifts drifts for all. Collective.

    In each round every contender has its turn, beginning with another one each time. A turn is a
    barrier, then calls one after the other; its time is that of the slowest rank, by the number of
    calls. Without `rounds` there are as many as a second allows, 5 to 40.

    rest: seconds to sleep before a turn, so that nothing of the one before is still busy; then a
    call is not timed, which finds the contender's own threads asleep.
    """
    names = list(contenders)
    first = {name: _turn(axis, contenders[name], 1, rest) for name in names}
    once = {name: _turn(axis, contenders[name], 1, rest) for name in first}  # the first warms up
    slowest = axis.allreduce(np.array(list(once.values())), "max")
    repeat = int(np.clip(_LEAST / slowest.min(), 1, _MOST))
    if not rounds:
        rounds = int(np.clip(_BUDGET / (slowest.sum() * repeat), _FEW, _MANY))
    seconds = np.empty((len(names), rounds))
    for number in range(rounds):
        for turn in range(len(names)):
            index = (number + turn) % len(names)
            seconds[index, number] = _turn(axis, contenders[names[index]], repeat, rest)
    return dict(zip(names, axis.allreduce(seconds, "max"), strict=True))


def _turn(axis: Axis, call: Call, repeat: int, rest: float) -> float:
    if rest:
        time.sleep(rest)
        call()
    axis.transport.barrier()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


def ratio(times: Times, name: str, base: str) -> float:
    """How many times as fast as `base`: the median over rounds of the ratio within a round."""
    return float(np.median(times[base] / times[name]))


def geometric_mean(values: list[float]) -> float | None:
    """None of no values."""
    return statistics.geometric_mean(values) if values else None


def memory_bandwidth(axis: Axis, nbytes: int = 1 << 26) -> dict[str, float]:
    """Bytes per second of this node's memory with all its ranks at once. Collective.

    As STREAM counts them (McCalpin 1995): `copy` reads n bytes and writes n, `add` reads 2 n and
    writes n; a write that first fetches its cache line counts once. Each rank has arrays of
    `nbytes`, beyond its share of the cache. The sum over the ranks of a node, the best of 10.
    """
    a, b, c = (np.full(nbytes // 8, 1.0) for _ in range(3))
    kinds: dict[str, tuple[Call, int]] = {
        "copy": (lambda: np.copyto(a, b), 2),
        "add": (lambda: np.add(a, b, out=c), 3),
    }
    times = alternate(axis, {kind: call for kind, (call, _) in kinds.items()}, rounds=10)
    nodes = axis.transport.nodes()
    ranks = nodes[axis.rank].local_size
    return {kind: ranks * kinds[kind][1] * a.nbytes / float(times[kind].min()) for kind in kinds}
