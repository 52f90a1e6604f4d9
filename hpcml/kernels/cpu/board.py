"""The board on which threads share the rows of a kernel: compiled, and without locks.

Who calls a kernel posts it as a job (`launch`) and works at it; who serves at the board meanwhile
(`serve`) works at it too. Each takes ranges of rows, of its own share first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hpcml.kernels.cpu import jit
from hpcml.kernels.cpu.atomics import add, exchange, load, relax, sched_yield, store
from hpcml.kernels.cpu.jit import inline, kernel

# Words of the board: is there a job, how many are at it, what it is; then, for each thread, the
# next row of its share. What several threads write has cache lines of its own.
OPEN, USERS, FUNCTION, JOB, COUNT, SHARES, STEP, FAILED, NEXT = 0, 16, 32, 33, 34, 35, 36, 48, 64
LINE = 16

_WORD = ir.IntType(64)
_PART = ir.FunctionType(_WORD, [ir.IntType(8).as_pointer(), _WORD, _WORD])


def empty(threads: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A board without a job, for at most so many threads."""
    return np.zeros(NEXT + LINE * threads, np.int64)


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
