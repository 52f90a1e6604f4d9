"""The sanitizer: with `HPCML_DEBUG=comm` the ranks agree on each collective before they begin it.

What each is about to call goes to all others, under a tag of its own, so that it cannot be mistaken
for data: operation, number in the order of the axis, type, payload, algorithm, root and counts, and
the line of the program. The line counts too: two equal calls in different places are the trace of
one that a rank has left out. A message of some hundred bytes between any two ranks for each call:
for finding errors, not for running.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
from typing import Any

import numpy as np

from hpcml.backend import is_array
from hpcml.comm.ambient import here
from hpcml.comm.board import Group
from hpcml.comm.positions import place_of
from hpcml.comm.reduction import Reduction
from hpcml.comm.tags import Tag
from hpcml.comm.transport import Transport
from hpcml.errors import UserError

VARIABLE = "HPCML_DEBUG"
_SIZE = 1024
"""Bytes of a message."""
_PAIR = struct.Struct("<qq")
_LONG = 200
"""Characters of the counts and options of a call that are shown."""


class MismatchError(RuntimeError):
    """The ranks of an axis do not call the same collective; raised on all of them."""


def wanted() -> bool:
    """Whether `HPCML_DEBUG` asks for the sanitizer; raises `UserError` for an unknown value."""
    text = os.environ.get(VARIABLE, "").strip()
    if text not in ("", "comm"):
        raise UserError(f"{VARIABLE}={text!r} is not known: set comm, or unset it")
    return text == "comm"


class Sanitizer:
    """The agreement among the ranks of one stream of collectives."""

    def __init__(self, transport: Transport, group: Group) -> None:
        self._transport = transport
        self._group = group

    def agree(
        self,
        operation: str,
        sequence: int,
        payload: int,
        dtype: np.dtype[Any],
        algorithm: str,
        arguments: tuple[Any, ...] = (),
    ) -> None:
        """Return if all ranks call this; raise `MismatchError`, which shows what each calls.

        `arguments` are those of the algorithm: the root, the operator and the counts among them
        must agree, and the blocks of an all-to-all have the length that both ends expect.
        """
        options = [_spelled(given) for given in arguments if not is_array(given)]
        pairs = [(0, 0)] * self._transport.size
        if operation == "alltoall":  # differs by rank: what must fit are the two ends of a block
            sends, receives = arguments[2:4]
            pairs, options, payload = list(zip(sends, receives, strict=True)), [], 0
        count = payload // dtype.itemsize
        what = f"{count} {dtype.name}" if count else ""
        number = f"{operation} #{sequence}"
        place = here.place or place_of(sys._getframe(1))
        how = algorithm and f"by {algorithm}"
        mine = ", ".join(filter(None, [number, what, *options, how, f"at {place}"]))
        calls, fits = self._exchange(mine, pairs)
        if not fits or len(set(calls)) > 1:
            raise MismatchError(self._report(calls, fits))

    def _exchange(self, mine: str, pairs: list[tuple[int, int]]) -> tuple[list[str], bool]:
        """What all ranks call, and whether the blocks between this one and each other fit."""
        transport = self._transport
        peers = [rank for rank in range(transport.size) if rank != transport.rank]
        told = {peer: np.zeros(_SIZE, np.uint8) for peer in peers}
        waiting = [transport.irecv(told[peer], peer, Tag.AGREE) for peer in peers]
        text = mine.encode()[: _SIZE - _PAIR.size]
        for peer in peers:
            raw = (_PAIR.pack(*pairs[peer]) + text).ljust(_SIZE, b"\0")
            waiting.append(transport.isend(np.frombuffer(raw, np.uint8), peer, Tag.AGREE))
        for message in waiting:
            message.wait()
        calls, fits = [mine] * transport.size, True
        for peer in peers:
            raw = told[peer].tobytes()
            calls[peer] = raw[_PAIR.size :].rstrip(b"\0").decode(errors="replace")
            fits = fits and _PAIR.unpack_from(raw) == pairs[peer][::-1]
        return calls, fits

    def _report(self, calls: list[str], fits: bool) -> str:
        members = self._group.members
        said = [f"  rank {member}: {call}" for member, call in zip(members, calls, strict=True)]
        what = "do not call the same" if len(set(calls)) > 1 else "expect blocks of other lengths"
        return "\n".join([f"the ranks of axis {self._group} {what}:", *said])


def _spelled(given: Any) -> str:
    """An argument in words, the same on all ranks if and only if it is."""
    if given is None:  # the array of a rank that gets no result
        return ""
    if isinstance(given, Reduction):
        return given.op + " onto" * given.onto + ", rounded stepwise" * given.stepwise
    text = f"root {given}" if isinstance(given, int) else f"counts {given}"
    if len(text) > _LONG:
        text = f"{text[:_LONG]}... ({hashlib.blake2b(text.encode(), digest_size=8).hexdigest()})"
    return text
