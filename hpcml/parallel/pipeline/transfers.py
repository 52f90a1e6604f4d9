"""Activations and their gradients on the way between the stages of a pipeline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcml import backend, memory
from hpcml.backend import Array
from hpcml.comm import Axis
from hpcml.comm.request import Request
from hpcml.errors import UserError

_HEADER = 1024
"""Bytes of the message that tells shapes, the first time."""

Shapes = list[tuple[tuple[int, ...], str]]


class Incoming:
    """Arrays that are on their way here."""

    def __init__(self, arrays: list[Array], requests: list[Request]) -> None:
        self._arrays, self._requests = arrays, requests

    def wait(self) -> list[Array]:
        """The arrays, once all are here."""
        for request in self._requests:
            request.wait()
        return self._arrays


class Transfers:
    """Sends and receives lists of arrays; between two ranks in one order, so without tags.

    A receiver must know shapes. They come ahead the first time that something of a kind is sent;
    what makes the same kind (`key`) both ends know alike.
    """

    def __init__(self, axis: Axis, device: str = "cpu") -> None:
        self.axis, self.device = axis, device
        self._told: set[Any] = set()
        self._known: dict[Any, Shapes] = {}
        self._going: list[Request] = []

    def send(self, arrays: Sequence[Array], peer: int, key: Any) -> None:
        """Begin to send; the arrays must not change any more."""
        if key not in self._told:
            self._told.add(key)
            self._tell([(array.shape, array.dtype.name) for array in arrays], peer)
        self._going = [request for request in self._going if not request.test()]
        self._going += [self.axis.isend(array, peer) for array in arrays]

    def fail(self, peer: int, key: Any, why: str) -> None:
        """Send why there is nothing to send, where the receiver asks for shapes first."""
        if key not in self._told:
            self._tell(why[: _HEADER // 8], peer)
            self.finish()

    def _tell(self, what: Shapes | str, peer: int) -> None:
        text = json.dumps(what).encode()
        assert len(text) <= _HEADER, "too many arrays between two stages"
        header = np.zeros(_HEADER, np.uint8)
        header[: len(text)] = np.frombuffer(text, np.uint8)
        self._going.append(self.axis.isend(header, peer))

    def receive(self, peer: int, key: Any) -> Incoming:
        """Begin to receive what the peer sends next; raises UserError if there is nothing."""
        if key not in self._known:
            header = self.axis.recv(np.empty(_HEADER, np.uint8), peer)
            found = json.loads(header.tobytes().rstrip(b"\0"))
            if isinstance(found, str):
                raise UserError(found)
            self._known[key] = [(tuple(shape), name) for shape, name in found]
        arrays = [
            memory.empty(shape, backend.dtype(name), device=self.device)
            for shape, name in self._known[key]
        ]
        return Incoming(arrays, [self.axis.irecv(array, peer) for array in arrays])

    def finish(self) -> None:
        """Until all has been sent."""
        for request in self._going:
            request.wait()
        self._going = []
