"""Which rank a thread belongs to, where ranks are threads of one process (`hpcml.run`)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from hpcml.comm.transport import Transport


@dataclass
class Rank:
    """A rank that is a thread of this process."""

    world: Transport
    """All ranks of its job: what `hpcml.Mesh` takes when it is given no communicator."""
    at_end: list[Callable[[], None]] = field(default_factory=list)
    """What ends the threads that the rank has started; called when its function is over."""


class _Here(threading.local):
    rank: Rank | None = None
    place: str | None = None


here = _Here()
"""`here.place`, in a communication thread: the line of the program that started the operation.

`here.rank` is the rank that this thread belongs to: None in a process that is a rank, or none.

A thread that a rank starts takes over the rank of its maker, as communication threads do.
"""
