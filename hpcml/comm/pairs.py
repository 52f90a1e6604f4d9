"""Messages from one rank of a group to another."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from hpcml import backend
from hpcml.comm.buffers import check_dtype, check_out, contiguous
from hpcml.comm.request import Done, Message, Request
from hpcml.comm.staging import as_array
from hpcml.comm.stream import Stream
from hpcml.comm.tags import LAST_MESSAGE, Tag
from hpcml.comm.transport import Array


class Pairs(Stream):
    """The messages of one stream; see `Axis` for their use."""

    @cached_property
    def _to_self(self) -> dict[int, deque[Array]]:
        """Messages of this rank to itself, by tag."""
        return defaultdict(deque)

    def send(self, x: Any, dest: int, tag: int = Tag.MESSAGE) -> None:
        """Send `x` to rank `dest`, which calls `recv`. May wait until it does.

        A message to oneself is kept until the `recv` that follows.
        """
        self._check_message("dest", dest, tag)
        source = contiguous(as_array(x))
        check_dtype(source.dtype)
        if dest == self.rank:
            self._to_self[tag].append(source.copy())
            return
        self._enter("send", source.size, source.dtype, dest)
        try:
            self._link.send(source.reshape(-1), dest, tag)
        finally:
            self._leave("send", source.nbytes)
        self._record("send", source.nbytes)

    def recv(self, out: Any, source: int, tag: int = Tag.MESSAGE) -> Any:
        """Receive into `out` the array of the same shape and type that rank `source` sends."""
        self._check_message("source", source, tag)
        place = as_array(out, read=False)
        check_dtype(place.dtype)
        check_out(place, place.shape, place.dtype)
        if source == self.rank:
            backend.put(self._from_self(place, tag), place)
        else:
            self._enter("recv", place.size, place.dtype, source)
            try:
                self._link.recv(place.reshape(-1), source, tag)
            finally:
                self._leave("recv", place.nbytes)
        return out

    def isend(self, x: Any, dest: int, tag: int = Tag.MESSAGE) -> Request:
        """`send`, without waiting for the receiver."""
        self._check_message("dest", dest, tag)
        if dest == self.rank:
            self.send(x, dest, tag)
            return Done(None)
        source = contiguous(as_array(x))
        check_dtype(source.dtype)
        pending = self._link.isend(source.reshape(-1), dest, tag)
        self.ledger.record(self.name, "send", source.nbytes, *self._link.take_counts())
        return Message(pending, _nothing, lambda: self._waiting("send", source, dest))

    def irecv(self, out: Any, source: int, tag: int = Tag.MESSAGE) -> Request:
        """`recv`, without waiting for the sender."""
        self._check_message("source", source, tag)
        if source == self.rank:
            return Done(self.recv(out, source, tag))
        place = as_array(out, read=False)
        check_dtype(place.dtype)
        check_out(place, place.shape, place.dtype)
        pending = self._link.irecv(place.reshape(-1), source, tag)
        return Message(pending, lambda: out, lambda: self._waiting("recv", place, source))

    @contextmanager
    def _waiting(self, operation: str, x: Array, peer: int) -> Iterator[None]:
        self._enter(operation, x.size, x.dtype, peer)
        try:
            yield
        finally:
            self._leave(operation, x.nbytes)

    def _from_self(self, place: Array, tag: int) -> Array:
        if not self._to_self[tag]:
            raise ValueError(
                f"rank {self.rank} receives from itself (tag {tag}) what it never sent"
            )
        message = self._to_self[tag].popleft()
        check_out(place, message.shape, message.dtype)
        return message

    def _check_rank(self, what: str, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"{what}={rank} is outside the axis {self.name}({self.size})")

    def _check_message(self, what: str, rank: int, tag: int) -> None:
        self._check_rank(what, rank)
        if not 0 <= tag <= LAST_MESSAGE:
            raise ValueError(f"tag={tag} is not one of 0 to {LAST_MESSAGE}")


def _nothing() -> None:
    """What comes of a send."""
