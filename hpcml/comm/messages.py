"""Messages of MPI on their way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from hpcml.comm.transport import wrong_length

_LOOKS = 20
"""Looks without a pause before a patient wait begins to sleep."""
_NAP, _LONGEST = 50e-6, 2e-3
"""Seconds between looks of a patient wait, at first and at most: a socket's buffer holds what comes
meanwhile."""
_SHARE = 0.05
"""Naps as a part of the wait so far: they lengthen it by no more."""


class Sent:
    """A message that leaves."""

    def __init__(self, request: Any, patient: bool) -> None:
        """`patient`: sleep between looks; MPI's own wait takes all of a core."""
        self._request, self._patient = request, patient

    def wait(self) -> None:
        """`MPI_Wait`, or `MPI_Test` now and then."""
        if self._patient:
            _look(self.test)
        else:
            self._request.Wait()

    def test(self) -> bool:
        """`MPI_Test`."""
        return bool(self._request.Test())


class Received:
    """A message that comes, and must have the length that was expected."""

    def __init__(self, request: Any, patient: bool, nbytes: int, source: int, tag: int) -> None:
        """`nbytes` from rank `source`; `patient` as for `Sent`."""
        self._request, self._patient = request, patient
        self._nbytes, self._source, self._tag = nbytes, source, tag
        self._done = False

    def wait(self) -> None:
        """`MPI_Wait`, or `MPI_Test` now and then; raises `ValueError` for another length."""
        if self._patient:
            _look(self.test)
        elif not self._done:
            self._finish(self._request.Wait)

    def test(self) -> bool:
        """`MPI_Test`; raises like `wait`."""
        return self._done or self._finish(self._request.Test)

    def _finish(self, ask: Any) -> bool:
        from mpi4py import MPI

        status = MPI.Status()
        try:
            self._done = bool(ask(status))
            found: int | None = status.Get_count(MPI.BYTE) if self._done else self._nbytes
        except MPI.Exception as error:
            if error.Get_error_class() != MPI.ERR_TRUNCATE:
                raise
            found = None
        if found != self._nbytes:
            raise wrong_length(found, self._nbytes, self._source, self._tag)
        return self._done


def _look(over: Callable[[], bool]) -> None:
    for _ in range(_LOOKS):
        if over():
            return
    start = time.monotonic()
    while not over():
        time.sleep(min(max(_NAP, _SHARE * (time.monotonic() - start)), _LONGEST))
