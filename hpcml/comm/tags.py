"""Every message tag of the package, so that no two kinds of message can be mistaken."""

from __future__ import annotations

from enum import IntEnum

LAST_MESSAGE = 999
"""The largest tag of a caller's own message."""


class Tag(IntEnum):
    """Tags of point-to-point messages and of communicators made by their members alone.

    A caller's own tags, given to `Axis.send` and `Axis.recv`, are 0 to 999.
    """

    MESSAGE = 0
    """`Axis.send` and `Axis.recv` when the caller names no tag."""

    GROUP = 1001
    """The agreement in which the members of a group make their communicator."""

    COLLECTIVE = 1002
    """Messages of our collective algorithms: all calls of one axis come in one order."""

    HALO = 1003
    """Ghost cells, all that one rank has for another in one message."""

    AGREE = 1040
    """The sanitizer's comparison before a collective."""
