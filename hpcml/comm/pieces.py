"""Long messages in pieces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpcml.comm.transport import Array, Pending


class Several:
    """Several messages as one."""

    def __init__(self, messages: Sequence[Pending]) -> None:
        self.messages = messages

    def wait(self) -> None:
        """Wait for all of them."""
        for message in self.messages:
            message.wait()

    def test(self) -> bool:
        """Whether all of them are done."""
        done = [message.test() for message in self.messages]  # of each, for it makes progress
        return all(done)


def pieces(buffer: Array, limit: int) -> list[Array]:
    """The buffer as bytes, cut where it is longer than `limit`; none of an empty one."""
    if not buffer.size:
        return []
    raw = buffer.reshape(-1).view(np.uint8)
    if raw.size <= limit:
        return [raw]
    return [raw[start : start + limit] for start in range(0, raw.size, limit)]
