"""A job of the doctor's that tries calls of the communication, one small one after the other.

`mpiexec -n 2 python -m hpcml.cli.doctor.trial '[[operation, dtype, memory, form], ...]'` makes the
calls in this order. Each rank prints a line of JSON for a call that raises or computes wrongly and
then ends the job; the first rank prints one when a call begins and one when it is done. So whatever
a call does to the process, the last one that began is the one that did it.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from hpcml.cli.doctor.cells import Cell
from hpcml.cli.doctor.probe import native_sum

LIMIT = 30.0
"""Seconds for a call; the first of a type may compile kernels."""
_LAST_WORDS = 0.5
"""Seconds for the launcher to pass on what was said: some drop it when a rank ends the job."""
_COUNTS = (96, 1 << 16)
"""Elements: a short message and one that takes another way through the MPI library."""


def main() -> None:
    """Try the cells that the command line names. Collective."""
    from hpcml.comm import Mesh

    cells = [Cell(*given) for given in json.loads(sys.argv[1])]
    mesh = Mesh()
    axis = mesh.world
    if any(cell.memory == "device" for cell in cells):
        _use_device(mesh.node.local_rank)
    for number, cell in enumerate(cells):
        # A thread of C, which ends the process even while that is blocked in MPI.
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        if axis.rank == 0:
            _say(began=number)
        axis.transport.barrier()
        try:
            found = _try(axis, cell)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is the finding)
            _say(cell=number, failed=f"{type(error).__name__}: {error}".splitlines()[0][:200])
            time.sleep(_LAST_WORDS)
            axis.transport.abort(1)
        axis.transport.barrier()
        if axis.rank == 0:
            _say(cell=number, found=found)
    faulthandler.cancel_dump_traceback_later()


def _say(**what: Any) -> None:
    # One write, begun on a new line: ranks share the pipe.
    sys.stdout.write(f"\n{json.dumps(what)}\n")
    sys.stdout.flush()


def _try(axis: Any, cell: Cell) -> str:
    """Make the calls of a cell; what is to be said about it. Raises if it does not work."""
    if cell.operation == "send":
        _send(axis, cell)
    elif cell.operation == "background":
        _background(axis)
    elif cell.operation == "vendor":
        return native_sum(cell.dtype)
    else:
        return _collective(axis, cell)
    return ""


def _collective(axis: Any, cell: Cell) -> str:
    from hpcml.bench.collectives import Case

    empty, refusals = _allocator(axis, cell)
    for count in _COUNTS:
        case = Case(cell.operation, axis, count, empty)
        call = case.call(None)
        if cell.form == "non-blocking":
            start = getattr(axis, f"i{cell.operation}")
            call = partial(lambda start, case: start(case.x, out=case.out).wait(), start, case)
        case.check("this call", call)
    reasons = [text for texts in axis.allgather_object(refusals) for text in texts]
    return reasons[0] if reasons else ""


def _allocator(axis: Any, cell: Cell) -> tuple[Callable[[int], Any], list[str]]:
    """What makes the arrays of a cell, and the list in which it says why they are not as wished."""
    from hpcml import backend, memory

    dtype, refusals = backend.dtype(cell.dtype), list[str]()
    if cell.memory == "device":
        return partial(backend.device_module("cuda").empty, dtype=dtype), refusals
    if cell.memory == "host":
        return partial(np.empty, dtype=dtype), refusals

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            refusals.append(record.getMessage())

    log = logging.getLogger("hpcml")
    log.handlers, log.propagate = [Note()], False

    def shared(count: int) -> Any:
        array = axis.empty(count, dtype)
        if memory.owner_of(array) is None and not refusals:
            refusals.append("no shared memory for collectives")
        return array

    return shared, refusals


def _send(axis: Any, cell: Cell) -> None:
    empty, _ = _allocator(axis, cell)
    to, source = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    for count in _COUNTS:
        x, out = empty(count), empty(count)
        x[...] = axis.rank + 1
        if cell.form == "non-blocking":
            requests = axis.irecv(out, source), axis.isend(x, to)
            for request in requests:
                request.wait()
        elif axis.rank % 2 == 0:
            axis.send(x, to)
            axis.recv(out, source)
        else:
            axis.recv(out, source)
            axis.send(x, to)
        if not bool((out == source + 1).all()):
            raise RuntimeError("wrong values")


def _background(axis: Any) -> None:
    """Collectives of the main thread while the communication thread has one under way."""
    x, y = np.ones(1 << 18, np.float32), np.ones(1 << 10, np.float32)
    for _ in range(5):
        request = axis.iallreduce(x)
        sums = [axis.allreduce(y) for _ in range(10)]
        sums.append(request.wait())
        if not all((found == axis.size).all() for found in sums):
            raise RuntimeError("wrong sums")


def _use_device(local_rank: int) -> None:
    from hpcml import backend

    cuda = backend.device_module("cuda").cuda
    cuda.Device(local_rank % cuda.runtime.getDeviceCount()).use()


if __name__ == "__main__":
    main()
