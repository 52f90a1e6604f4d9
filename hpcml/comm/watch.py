"""The watch: no rank waits for others for ever, or without a word."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

from hpcml.comm.noted import NodeBoard
from hpcml.comm.rollcall import conclusion, roll_call
from hpcml.comm.sheet import Call
from hpcml.errors import UserError

VARIABLE = "HPCML_TIMEOUT"
_DEFAULT = 300.0
_GRACE = 1.0
"""Seconds for the ranks of other nodes, which wait as long, to call their rolls."""


def limit() -> float:
    """Seconds that a rank may wait for others, from `HPCML_TIMEOUT`; infinite for 0.

    Raises `UserError` for what is no such number.
    """
    text = os.environ.get(VARIABLE, "").strip()
    try:
        seconds = float(text) if text else _DEFAULT
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise UserError(
            f"{VARIABLE}={text!r} is no number of seconds that a rank may wait for others: "
            f"set for example {_DEFAULT:g}, or 0 for no limit"
        )
    return seconds or float("inf")


def start(board: NodeBoard, seconds: float, abort: Callable[[int], None]) -> None:
    """Watch this rank from a thread: if it is in one call for longer than `seconds`, end the job.

    The first rank of a node that finds itself waiting so long prints the roll-call. Then
    `abort(1)` ends the job.
    """
    watch = Watch(board, seconds, abort)
    threading.Thread(target=watch.serve, name="hpcml-watch", daemon=True).start()


class Watch:
    """What the thread does."""

    def __init__(self, board: NodeBoard, seconds: float, abort: Callable[[int], None]) -> None:
        self.board = board
        self.seconds = seconds
        self.abort = abort
        self.pause = min(1.0, seconds / 10)
        self.awake = time.monotonic()
        """Since when this process has not been held up, as all are when a job is stopped."""

    def serve(self) -> None:
        """Look from time to time, until the process ends."""
        while True:
            before = time.monotonic()
            time.sleep(self.pause)
            now = time.monotonic()
            if now - before > self.pause + max(1.0, self.seconds / 10):
                self.awake = now
            self.board.look()
            call = self.board.waiting()
            if call is not None and now - max(call.since, self.awake) > self.seconds:
                self.alarm(call, now)

    def alarm(self, call: Call, now: float) -> None:
        """Call the roll, if no other rank of the node does, and end the job."""
        if self.board.sheet.take():
            positions = self.board.sheet.positions()
            text = (
                f"hpcml: rank {self.board.rank} has waited for {now - call.since:.1f} s "
                f"({VARIABLE}={self.seconds:g}) in {call}\n"
                f"{conclusion(self.board.rank, call, positions, now)}\n"
                f"where the ranks of this node are:\n{roll_call(positions, now)}\n"
                "the job ends\n"
            )
            sys.stdout.flush()
            sys.stderr.write(text)
            sys.stderr.flush()
            time.sleep(_GRACE / 2 if positions[0].nodes > 1 else _GRACE / 10)
        else:
            time.sleep(_GRACE)
        self.abort(1)
