"""Where each rank is: its current call of communication, readable by the other ranks of its node."""

from __future__ import annotations


class Board:
    """The positions of the ranks of a job that this process can see; this one keeps none."""

    def enter(self, operation: str, axis: str, sequence: int, count: int, dtype: str) -> None:
        """Note that this thread enters a call that waits for other ranks."""

    def leave(self) -> None:
        """Note that the call has come back."""
