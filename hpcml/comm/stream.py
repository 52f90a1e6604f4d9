"""One stream of calls among a group of ranks: how each is settled, carried out and counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcml.comm import alone, sanitizer
from hpcml.comm.algorithms import Algorithm
from hpcml.comm.algorithms.choosing import Chooser, Table
from hpcml.comm.board import Group
from hpcml.comm.choice import default
from hpcml.comm.inplace import InPlace, Plan
from hpcml.comm.known import Key, Known, Settled
from hpcml.comm.ledger import Ledger
from hpcml.comm.link import Link
from hpcml.comm.reduction import reduction
from hpcml.comm.request import Worker
from hpcml.comm.sanitizer import Sanitizer
from hpcml.comm.staging import on_device, room
from hpcml.comm.timeline import Call, clock
from hpcml.comm.transport import Array, Transport

LEDGER_NAMES = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "alltoall": "all_to_all",
}
"""Names in the ledger where they are not those of the methods."""


class Stream:
    """What all operations of one stream pass: from arguments of an algorithm to the ledger.

    All ranks make the same calls in the same order. Several streams over the same ranks, as a
    communication thread needs one, have transports of their own.
    """

    _worker: Worker | None = None
    _since: float | None = None
    """When the call began that the rank is in, if a timeline is kept."""

    def __init__(
        self,
        name: str,
        transport: Transport | None = None,
        ledger: Ledger | None = None,
        deterministic: bool = False,
        table: Table | None = None,
        stream: str = "",
    ) -> None:
        """Operations over a transport; without one, those of a rank that is alone.

        `table`: which algorithms are fastest, the same on all ranks (see `hpcml.comm.choice`).
        `stream`: what reports add to the name.
        """
        self.name = name
        self.transport: Transport = alone.Alone() if transport is None else transport
        self.ledger = Ledger() if ledger is None else ledger
        self.deterministic = deterministic
        self.size = self.transport.size
        self.rank = self.transport.rank
        self._beside = bool(stream)
        self._group = Group(f"{name}{stream}", self.transport.members)
        self._pairs = [Group(self._group.name, (member,)) for member in self.transport.members]
        self._sanitizer = Sanitizer(self.transport, self._group) if sanitizer.wanted() else None
        self.table = default() if table is None else table
        self._link = Link(self.transport, self.table)
        self._chooser = Chooser(self._link, deterministic)
        self._sequence = 0
        self._windows = InPlace(self._link, self._group, deterministic)
        self._known = Known()
        self._link.scratch = self._windows.scratch

    @property
    def shares_memory(self) -> bool:
        """Whether all ranks of several can share memory: on one node, with room. Collective."""
        return self._link.scratch() is not None

    @property
    def takes_gpu_memory(self) -> bool:
        """Whether MPI is given memory of GPUs as it is: see `hpcml.comm.direct`. Collective."""
        self._link.settle()
        return self._link.direct

    def _combine(
        self,
        operation: str,
        source: Array,
        target: Array,
        op: str,
        accumulate: bool,
        algorithm: str | None,
        *cut: tuple[int, ...],
        even: bool = True,
    ) -> Settled | None:
        """A reduction whose result all ranks get, or a part of it; how, if it was one call."""
        how = reduction(op, self.deterministic, accumulate)
        payload = source.nbytes
        arguments = source, target, *cut, how
        if accumulate and self.size > 1 and self._plan(operation, arguments, algorithm) is None:
            chosen = self._chooser.pick(operation, payload, source, even, algorithm, onto=True)
            if not (chosen.ordered or chosen.adds):
                result = room(target, target.size)
                self._combine(operation, source, result, op, False, algorithm, *cut, even=even)
                how.into(target, result)
                return None
        return self._run(
            operation, source, payload, algorithm, *arguments, even=even, onto=accumulate
        )

    def _run(
        self,
        operation: str,
        buffer: Array,
        payload: int,
        algorithm: str | None,
        *arguments: Any,
        even: bool = True,
        onto: bool = False,
    ) -> Settled:
        """Do one collective: where its memory is shared in there, else by an algorithm."""
        self._agree(operation, buffer, payload, algorithm, arguments)
        way: Plan | Algorithm | None = self._plan(operation, arguments, algorithm)
        if way is None and self.size > 1:
            way = self._chooser.pick(operation, payload, buffer, even, algorithm, onto)
        self._carry_out(operation, buffer, payload, way, arguments)
        return Settled(way, payload, arguments[2:])

    def _again(self, key: Key, x: Any, out: Any) -> bool:
        """Make a call as it was made before on the same arrays, if it was."""
        call = self._known.find(key, x, out)
        if call is None:
            return False
        flat = out if out.ndim == 1 else out.reshape(-1)
        source = flat if x is out else x if x.ndim == 1 else x.reshape(-1)
        buffer = out if key[0] == "allgather" else x
        arguments = (source, flat, *call.rest)
        if self._sanitizer is not None:
            self._agree(key[0], buffer, call.payload, None, arguments)
        self._carry_out(key[0], buffer, call.payload, call.way, arguments)
        return True

    def _carry_out(
        self,
        operation: str,
        buffer: Array,
        payload: int,
        way: Plan | Algorithm | None,
        arguments: tuple[Any, ...],
    ) -> None:
        """Do a collective in a way that is settled: noted on the board and in the ledger."""
        if self.size == 1:
            alone.run(operation, *arguments)
            return
        self._enter(operation, buffer.size, buffer.dtype)
        try:
            if isinstance(way, Plan):
                self._windows.run(way, *arguments)
            elif way is not None:
                way.run(self._link, *arguments)
        finally:
            self._leave(operation, payload)
        self._record(operation, payload)

    def _agree(
        self,
        operation: str,
        buffer: Array,
        payload: int,
        algorithm: str | None,
        arguments: tuple[Any, ...],
    ) -> None:
        """With HPCML_DEBUG=comm: make sure that all ranks make the same call, before anything."""
        if self._sanitizer is None or self.size == 1:
            return
        board, call = self.transport.board, self._sequence + 1
        board.enter(operation, self._group, call, buffer.size, buffer.dtype)
        try:
            inside = any(self._windows.window_of(given) for given in arguments[:2])
            where = "shared memory" if inside else "GPU messages" if on_device(buffer) else ""
            how = algorithm or where
            self._sanitizer.agree(operation, call, payload, buffer.dtype, how, arguments)
        finally:
            board.leave()

    def _plan(self, operation: str, arguments: Sequence[Any], algorithm: str | None) -> Plan | None:
        """How a call is done in the memory that its ranks share, if it lies there."""
        if algorithm not in (None, "window"):
            return None
        plan = self._windows.plan(operation, *arguments)
        if algorithm and plan is None:
            raise ValueError(
                f'algorithm="window": {operation} on {self.name} needs an array of Axis.empty of '
                "these ranks, which share memory"
            )
        return plan

    def _enter(
        self, operation: str, count: int, dtype: np.dtype[Any], peer: int | None = None
    ) -> None:
        """Note on the board that a collective begins, or the wait for one other rank.

        Goes on only if all that was started in the background has been well, as far as known.
        """
        if self._worker is not None:
            self._worker.check()
        if peer is None:
            self._sequence += 1
            self.transport.board.enter(operation, self._group, self._sequence, count, dtype)
        else:
            self.transport.board.enter(operation, self._pairs[peer], 0, count, dtype)
        self._since = None if self.ledger.timeline is None else clock()

    def _leave(self, operation: str, nbytes: int) -> None:
        """Note on the board, and on the timeline, that a call is over."""
        self.transport.board.leave()
        timeline = self.ledger.timeline
        if timeline is not None and self._since is not None:
            name = LEDGER_NAMES.get(operation, operation)
            timeline.calls.append(Call(name, self.name, nbytes, self._beside, self._since, clock()))

    def _record(self, operation: str, payload: int) -> None:
        link = self._link
        name = LEDGER_NAMES.get(operation, operation)
        self.ledger.record(self.name, name, payload, link.sent, link.sent_off_node)
        link.sent = link.sent_off_node = 0
