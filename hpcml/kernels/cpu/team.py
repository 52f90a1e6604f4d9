"""The threads of a rank: they share the work of a kernel, each takes ranges of its rows.

The thread that calls a kernel posts a job on a board; members of the team that wait there take
ranges from it, as the caller does itself, until none is left. All of that is compiled: a member
needs neither the interpreter nor its lock, and between the kernels of a training step it stays
awake. Who comes late finds the work done, so that a busy machine costs speed only.

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
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import as_dtype

from hpcml import backend
from hpcml.kernels.cpu import jit
from hpcml.kernels.cpu.atomics import add, exchange, load, relax, sched_yield, store
from hpcml.kernels.cpu.jit import inline, kernel

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

# Words of the board: is there a job, how many are at it, what it is; then, for each thread, the
# next row of its share. What several threads write has cache lines of its own.
OPEN, USERS, FUNCTION, JOB, COUNT, SHARES, STEP, FAILED, NEXT = 0, 16, 32, 33, 34, 35, 36, 48, 64
LINE = 16

_WORD = ir.IntType(64)
_PART = ir.FunctionType(_WORD, [ir.IntType(8).as_pointer(), _WORD, _WORD])


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
                for types, made in self.compiled.overloads.items()
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
        self.board = np.zeros(NEXT + LINE * backend.MOST_THREADS, np.int64)
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


def _borrowed(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """An array without its owner: threads would all count their slices of it in one word."""
    if not isinstance(kind, types.Array):
        return value
    array = context.make_array(kind)(context, builder, value)
    array.meminfo = cgutils.get_null_value(array.meminfo.type)
    array.parent = cgutils.get_null_value(array.parent.type)
    return array._getvalue()


@intrinsic
def _job(typingctx: Any, kernel: Any, args: Any) -> Any:
    """Addresses of a function (job, low, high) that calls a kernel by address, and of the job.

    They are valid until the caller returns.
    """
    inner_types = (*args, types.int64, types.int64)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        job = cgutils.pack_struct(builder, values)
        place = builder.alloca(job.type)
        builder.store(job, place)
        function = ir.Function(builder.module, _PART, "hpcml_part")
        function.linkage = "internal"
        inner = ir.IRBuilder(function.append_basic_block())
        given = inner.load(inner.bitcast(function.args[0], place.type))
        form = context.call_conv.get_function_type(types.none, inner_types)
        target = inner.inttoptr(inner.extract_value(given, 0), form.as_pointer())
        each = zip(args, cgutils.unpack_tuple(inner, inner.extract_value(given, 1)), strict=True)
        whole = [_borrowed(context, inner, kind, value) for kind, value in each]
        status, _ = context.call_conv.call_function(
            inner, target, types.none, inner_types, [*whole, *function.args[1:]]
        )
        inner.ret(inner.zext(status.is_error, _WORD))
        pair = [builder.ptrtoint(function, _WORD), builder.ptrtoint(place, _WORD)]
        return context.make_tuple(builder, signature.return_type, pair)

    return types.UniTuple(types.int64, 2)(types.int64, args), generate


@intrinsic
def _call(typingctx: Any, function: Any, arguments: Any, low: Any, high: Any) -> Any:
    """Call what `_job` made; 1 if the kernel raised an error, else 0."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        target = builder.inttoptr(values[0], _PART.as_pointer())
        return builder.call(target, [builder.inttoptr(values[1], _PART.args[0]), *values[2:]])

    return types.int64(types.int64, types.int64, types.int64, types.int64), generate


@inline
def _bound(board: Any, share: int) -> Any:
    """The first row of a share, a multiple of the step."""
    steps = -(-board[COUNT] // board[STEP])
    return min(steps * share // board[SHARES] * board[STEP], board[COUNT])


@inline
def _work(board: Any, mine: int) -> None:
    """Take ranges of my share of the job and do them, then of the others', until none is left.

    A thread has the same share of each kernel, and finds what it made itself in its cache.
    """
    for turn in range(board[SHARES]):
        share = (mine + turn) % board[SHARES]
        place, end = NEXT + share * LINE, _bound(board, share + 1)
        while load(board, place) < end:
            low = add(board, place, board[STEP])
            if low < end:
                high = min(low + board[STEP], end)
                if _call(board[FUNCTION], board[JOB], low, high) != 0:
                    board[FAILED] = 1


@jit.compiled
def launch(board: Any, kernel: int, count: int, step: int, shares: int, args: Any) -> Any:
    """Post a job, a kernel at an address with its arguments, see it done, say whether it was."""
    board[FUNCTION], board[JOB] = _job(kernel, args)
    board[COUNT], board[STEP], board[SHARES] = count, step, shares
    board[FAILED] = 0
    for share in range(shares):
        store(board, NEXT + share * LINE, _bound(board, share))
    store(board, OPEN, 1)
    _work(board, 0)
    exchange(board, OPEN, 0)
    while load(board, USERS) > 0:
        relax()
    return board[FAILED] == 0


@kernel("void(int64[::1], int64, int64, int64)")
def serve(board: Any, mine: int, spins: int, yields: int) -> None:
    """Work at jobs as they are posted; return when there has been none for a while.

    Who counts itself in before it looks whether the job is open is waited for: the job's arguments
    exist as long as somebody may read them.
    """
    looks = 0
    while looks < spins + yields:
        looks += 1
        if load(board, OPEN) != 0:
            add(board, USERS, 1)
            if load(board, OPEN) != 0:
                _work(board, mine)
                looks = 0
            add(board, USERS, -1)
        if looks <= spins:
            relax()
        else:
            sched_yield()


_team = Team()
