"""What a rank communicated: calls, payload and bytes sent, by axis and operation.

Payload (`bytes`): the input of an all-reduce, reduce-scatter, reduce, all-to-all or broadcast, what
is added to a running sum (accumulate), the output of an all-gather, the message of a send; for
gather and scatter the whole gathered array.

`bytes_sent` is what this rank puts on the wire. What a vendor's library really sends cannot be
seen, so for its calls it is the volume of the standard bandwidth-optimal algorithm
(Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH",
2005): see `volume`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields

from hpcml.comm.timeline import Timeline

_NOT_KEPT = nullcontext()


@dataclass(frozen=True)
class Count:
    """Calls of one operation on one axis, their payload, what was sent, what of it left the node.

    All but the calls in bytes.
    """

    calls: int = 0
    bytes: int = 0
    bytes_sent: int = 0
    bytes_off_node: int = 0

    def __add__(self, other: Count) -> Count:
        return self._each(other, int.__add__)

    def __sub__(self, other: Count) -> Count:
        return self._each(other, int.__sub__)

    def _each(self, other: Count, combine: Callable[[int, int], int]) -> Count:
        names = [field.name for field in fields(self)]
        return Count(*(combine(getattr(self, name), getattr(other, name)) for name in names))


class Tally(dict[str, dict[str, Count]]):
    """Counts by axis, then by operation: `tally["dp"]["all_reduce"].bytes`."""

    def __sub__(self, earlier: Tally) -> Tally:
        """What happened since an earlier snapshot; operations that did not happen are absent."""
        later = Tally()
        for axis, operations in self.items():
            for operation, count in operations.items():
                change = count - earlier.get(axis, {}).get(operation, Count())
                if change.calls:
                    later.setdefault(axis, {})[operation] = change
        return later

    def plain(self) -> dict[str, dict[str, dict[str, int]]]:
        """The same as plain dictionaries and integers, ready for JSON."""
        return {
            axis: {op: dict(vars(count)) for op, count in ops.items()} for axis, ops in self.items()
        }


class Ledger:
    """Counts the calls of one mesh. Safe to use from several threads of a rank."""

    timeline: Timeline | None = None
    """Where to note what happens when; None: nowhere."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], list[int]] = {}

    def record(self, axis: str, operation: str, payload: int, sent: int, off_node: int = 0) -> None:
        """Count one call with its payload, the bytes it sent and those of them to other nodes."""
        with self._lock:
            row = self._counts.get((axis, operation))
            if row is None:
                row = self._counts[axis, operation] = [0, 0, 0, 0]
            row[0] += 1
            row[1] += payload
            row[2] += sent
            row[3] += off_node

    def snapshot(self) -> Tally:
        """All counts until now; subtract two snapshots for what happened between them."""
        tally = Tally()
        with self._lock:
            for (axis, operation), row in self._counts.items():
                tally.setdefault(axis, {})[operation] = Count(*row)
        return tally

    def span(
        self, kind: str, stage: int = -1, microbatch: int = -1
    ) -> AbstractContextManager[None]:
        """Within, the rank does a piece of work: noted where a timeline is kept."""
        if self.timeline is None:
            return _NOT_KEPT
        return self.timeline.span(kind, stage, microbatch)

    def reset(self) -> None:
        """Begin again at zero."""
        with self._lock:
            self._counts.clear()


@functools.lru_cache(1024)
def volume(operation: str, payload: int, size: int, forwards: bool) -> int:
    """Bytes that one of `size` ranks sends for this payload, by the standard algorithm.

    all_reduce: reduce-scatter, then all-gather, 2 (n-1)/n. reduce_scatter, all_gather, all_to_all:
    (n-1)/n. broadcast and reduce: a pipelined chain, in which each rank that `forwards` (all but
    the last of the chain) sends the payload once. gather: each rank but the root sends its n-th
    part; scatter: the root sends all parts but its own (`forwards` tells who sends). A send: the
    message. Rounded up to whole bytes.
    """
    if operation in ("send", "broadcast", "reduce"):
        return payload if forwards else 0
    if operation == "gather":
        return -(-payload // size) if forwards else 0
    rounds = 2 if operation == "all_reduce" else 1
    return -(-rounds * (size - 1) * payload // size) if forwards else 0
