"""Every message tag of the package, so that no two kinds of message can be mistaken."""

from __future__ import annotations

from enum import IntEnum


class Tag(IntEnum):
    """Tags of point-to-point messages and of communicators made by their members alone."""

    MESSAGE = 0
    """`Axis.send` and `Axis.recv` when the caller names no tag."""

    GROUP = 1
    """The agreement in which the members of a group make their communicator."""
