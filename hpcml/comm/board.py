"""Where each rank is: its calls of communication, as it notes them for whoever reports."""

from __future__ import annotations


class Group:
    """The ranks that meet in a call, by the name of their axis and their numbers in the job."""

    __slots__ = ("members", "name")

    def __init__(self, name: str, members: tuple[int, ...]) -> None:
        self.name = name
        self.members = members

    def __str__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Group):
            return NotImplemented
        return (self.name, self.members) == (other.name, other.members)

    def __hash__(self) -> int:
        return hash((self.name, self.members))


class Board:
    """The position of a rank; this one is of a rank that is alone and keeps none.

    Calls do not nest: within one, a thread enters no other.
    """

    def enter(self, operation: str, group: Group, sequence: int, count: int, dtype: object) -> None:
        """Note that this thread enters a call that waits for other ranks.

        `sequence`: number of the call among the collectives of this group; 0 for messages between
        two ranks. `group` is kept, so that it should be the same object each time.
        """

    def leave(self) -> None:
        """Note that the call has come back."""

    def end_job(self) -> None:
        """Note that this rank ends the job, for whoever makes sure that it does end."""
