"""The threads of a rank: they share the work of a kernel, each takes ranges of its rows.

The thread that calls a kernel posts a job on a board; members of the team that wait there take
ranges from it, as the caller does itself, until none is left (`board`). All of that is compiled: a
member needs neither the interpreter nor its lock, and between the kernels of a training step it
stays awake. Who comes late finds the work done, so that a busy machine costs speed only.

The BLAS has one thread (`blas.register`): products are divided here, like everything else.
"""

from __future__ import annotations

import atexit
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numba import types
from numba.np.numpy_support import as_dtype

from hpcml import backend
from hpcml.kernels.cpu import jit
from hpcml.kernels.cpu.board import empty, launch, serve
from hpcml.kernels.cpu.jit import kernel

LEAST = 1 << 14
"""Work that is worth a thread's while; a unit is one element of simple arithmetic."""
RANGES = 4
"""Ranges for each thread: who was kept from work leaves some to the others."""
MULTIPLE = 16
"""Ranges begin at multiples of so many rows, where there are many: whole vectors, cache lines."""
SPINS, YIELDS = 2000, 2000
"""How long a member looks for the next job before it sleeps: about a millisecond."""

Over = Callable[..., tuple[int, int]]
"""From the arguments of a kernel to the number of its rows and the work in all."""


def elements(x: Any, *_: Any) -> tuple[int, int]:
    """A kernel over the elements of its first argument."""
    return x.size, x.size


def rows(x: Any, *_: Any) -> tuple[int, int]:
    """A kernel over the rows of its first argument."""
    return x.shape[0], x.size


def columns(x: Any, *_: Any) -> tuple[int, int]:
    """A kernel over the columns of its first argument: it sums over the rows.

    Parts of rows are slow to read: it takes more of them for a thread to be worth it.
    """
    return x.shape[1], x.size // 4


def divided(
    signature: str, over: Over, ranges: int = RANGES
) -> Callable[[Callable[..., Any]], Divided]:
    """Make a kernel (`jit.kernel`) that the threads of a rank divide among them.

    The function has two arguments more than it is called with, `low` and `high`: it does the rows
    from `low` to before `high`. over: how many there are. ranges: for each thread.
    """
    types_of = signature.removeprefix("void(").removesuffix(")")

    def make(function: Callable[..., Any]) -> Divided:
        jit.register(launch, f"boolean(int64[::1], int64, int64, int64, int64, Job(({types_of},)))")
        return Divided(kernel(f"void({types_of}, int64, int64)")(function), over, ranges)

    return make


class Divided:
    """A kernel of which the team does what is worth it, and this thread alone the rest."""

    def __init__(self, compiled: Any, over: Over, ranges: int) -> None:
        self.compiled, self.over, self.ranges = compiled, over, ranges
        self._addresses: dict[Any, int] = {}
        functools.update_wrapper(self, compiled.py_func)

    def __call__(self, *args: Any) -> None:
        """Do all rows."""
        count, work = self.over(*args)
        shares = work // LEAST
        if shares < 2 or (threads := backend.threads()) < 2:
            self.compiled(*args, 0, count)
            return
        shares = min(shares, threads, backend.MOST_THREADS)
        step = max(-(-count // (shares * self.ranges)), 1)
        if count >= MULTIPLE * shares * self.ranges:
            step = -(-step // MULTIPLE) * MULTIPLE
        with _team.for_this_thread(shares) as board:
            if board is None:  # the same ranges: a BLAS may sum other ones otherwise
                for low in range(0, count, step):
                    self.compiled(*args, low, min(low + step, count))
            elif not launch(board, self._address(args), count, step, shares, args):
                name = self.compiled.py_func.__name__
                raise MemoryError(f"{name}: no memory for what a thread notes down")

    def _address(self, args: tuple[Any, ...]) -> int:
        """Where the machine code for such arguments is: for the type of the first float array."""
        arrays = (a for a in args if type(a) is np.ndarray)
        dtype = next((a.dtype for a in arrays if a.dtype.kind == "f"), None)
        if dtype not in self._addresses:
            self._addresses = {
                _float_of(types): jit.address(made)
                for types, made in self.compiled.overloads.copy().items()
            }
        return self._addresses[dtype]


class Team:
    """Threads that wait for jobs on their board; one thread at a time may post there."""

    def __init__(self) -> None:
        self._reset()
        atexit.register(self._end)
        if hasattr(os, "register_at_fork"):  # a fork has none of its parent's other threads
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self.board = empty(backend.MOST_THREADS)
        self._members: list[_Member] = []
        self._taken = threading.Lock()

    @contextmanager
    def for_this_thread(self, threads: int) -> Iterator[Any]:
        """The board, with members awake for so many threads; None if another thread has it."""
        if not self._taken.acquire(blocking=False):
            yield None
            return
        try:
            with suppress(RuntimeError):  # the system gives no more threads: fewer will do
                while len(self._members) < threads - 1:
                    self._members.append(_Member(self.board, len(self._members) + 1))
            for member in self._members[: threads - 1]:
                member.wake()
            yield self.board
        finally:
            self._taken.release()

    def _end(self) -> None:
        for member in self._members:
            member.end()


class _Member:
    """A thread that serves at a board while there is work, and sleeps when there is none."""

    def __init__(self, board: Any, number: int) -> None:
        self.board, self.number = board, number
        self._asleep, self._over = False, False
        self._bell = threading.Lock()
        self._bell.acquire()
        self._thread = threading.Thread(target=self._live, name="hpcml-team", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """See that it looks at the board."""
        if self._asleep and self._bell.locked():
            self._bell.release()

    def end(self) -> None:
        """Let the thread end, and wait for that: it must not outlive the board."""
        self._over = True
        self.wake()
        self._thread.join(timeout=1)

    def _live(self) -> None:
        while not self._over:
            serve(self.board, self.number, SPINS, YIELDS)
            self._asleep = True
            if not self._over:
                self._bell.acquire()
            self._asleep = False


def _float_of(arguments: tuple[Any, ...]) -> np.dtype[Any] | None:
    """The type of the elements of the first float array, of numba's types of arguments."""
    arrays = (t for t in arguments if isinstance(t, types.Array))
    return next((as_dtype(t.dtype) for t in arrays if isinstance(t.dtype, types.Float)), None)


_team = Team()
