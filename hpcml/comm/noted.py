"""The board of a rank that is a process: its positions, on the sheet of its node."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import logging
import os
import platform
import re
import tempfile
import threading
import uuid
from sys import _getframe
from threading import get_ident
from time import monotonic
from types import CodeType, FrameType

from hpcml.comm import sheet
from hpcml.comm.ambient import here
from hpcml.comm.blocking import Blocking
from hpcml.comm.board import Board, Group
from hpcml.comm.sheet import INSIDE, OUTSIDE, Call, Sheet, pack_call, pack_left
from hpcml.comm.transport import Transport

_COMM = os.path.dirname(os.path.abspath(__file__)) + os.sep
_PACKAGE = os.path.dirname(_COMM[:-1]) + os.sep
_DEPTH = range(10)
"""Frames of the package that are looked through for the program that uses it."""
_KEPT = 4096
"""Places that are remembered; programs that make code as they go would fill the memory."""
_PATIENCE = 5.0
"""Seconds that an ended job has to be gone."""

_OURS, _OTHERS, _PROGRAM = 1, 2, 3
_Key = tuple[int, int, int, int]


def open_board(transport: Transport, pipe: tuple[int, int] | None = None) -> NodeBoard:
    """The board of this rank of the job; the ranks of a node share a sheet. Collective.

    The sheet is a file, deleted as soon as all have opened it, so that nothing is left behind.
    Where none can be had, each rank has a sheet of its own and knows of no other. `pipe`: one that
    was made early, see `NodeBoard`.
    """
    nodes = transport.nodes()
    here_, count = nodes[transport.rank], 1 + max(node.index for node in nodes)
    job = Blocking("world", transport)
    name = f"hpcml-{job.broadcast_object(uuid.uuid4().hex)}-{here_.index}.sheet"
    if here_.local_rank == 0:
        _make(name, here_.local_size)
    transport.barrier()
    file = _open(name)
    shared = all(job.allgather_object(file is not None))
    if here_.local_rank == 0:
        for folder in _folders():
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(folder, name))
    if shared and file is not None:
        return NodeBoard(Sheet.of_file(file), here_.local_rank, transport.rank, count, pipe)
    if file is not None:
        os.close(file)
    logging.getLogger("hpcml").debug("no file that the ranks of a node share: each tells of itself")
    return NodeBoard(Sheet.private(1), 0, transport.rank, count, pipe)


def _folders() -> tuple[str, str]:
    return "/dev/shm", tempfile.gettempdir()


def _make(name: str, ranks: int) -> None:
    """Make the file where there is room for it; leave none where there is none."""
    for folder in _folders():
        path = os.path.join(folder, name)
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:
            continue
        try:
            # Written, not only made longer: memory that cannot be had would be a SIGBUS later.
            os.write(file, bytes(sheet.size_for(ranks)))
            Sheet.of_file(file).begin(ranks)
            return
        except OSError:
            os.unlink(path)
        finally:
            os.close(file)


def _open(name: str) -> int | None:
    for folder in _folders():
        with contextlib.suppress(OSError):
            return os.open(os.path.join(folder, name), os.O_RDWR | os.O_CLOEXEC)
    return None


_FRAME = re.compile(r'  File "(.*)", line (\d+) in ')
"""A frame in faulthandler's words."""


class NodeBoard(Board):
    """What a rank writes on the sheet of its node."""

    def __init__(
        self,
        page: Sheet,
        index: int,
        rank: int,
        nodes: int,
        pipe: tuple[int, int] | None = None,
    ) -> None:
        """The place `index` on this sheet, for rank `rank` of a job on so many nodes.

        `pipe`: that by which the sentinel sees this process die.
        """
        self.sheet = page
        self.index = index
        self.rank = rank
        self._slots: dict[int, int] = {}
        self._texts: dict[tuple[int, str, object], tuple[Group, bytes]] = {}
        self._places: dict[_Key, tuple[bytes, CodeType, CodeType]] = {}
        self._layers: dict[str, int] = {}
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the rank lives)
        # Closed by the system when this process dies, before it counts as dead: see the sentinel.
        self._pipe = pipe or os.pipe()
        page.join(index, rank, platform.node(), nodes, self._pipe[0], monotonic())
        mine = os.getpid()
        # A child made by fork must not speak for its parent.
        atexit.register(lambda: self.mark(sheet.LEFT) if os.getpid() == mine else None)

    def enter(self, operation: str, group: Group, sequence: int, count: int, dtype: object) -> None:
        """Note a call, with the line that makes it. A microsecond: one store of a fixed record."""
        known = self._texts.get((id(group), operation, dtype))
        if known is None:
            text = sheet.call_text(operation, group.name, group.members, str(dtype))
            known = self._texts[id(group), operation, dtype] = (group, text)
        place = here.place
        pack_call(
            self.sheet.memory,
            self._slots.get(get_ident()) or self._slot(),
            INSIDE,
            monotonic(),
            sequence,
            count,
            known[1],
            self._place(_getframe(2)) if place is None else place.encode()[:319],
        )

    def leave(self) -> None:
        """Note that the call has come back."""
        at = self._slots.get(get_ident()) or self._slot()
        pack_left(self.sheet.memory, at, OUTSIDE, monotonic())

    def end_job(self) -> None:
        """Have the sentinel kill what is left of the job on this node in a while."""
        self.sheet.end_by(monotonic() + _PATIENCE)

    def mark(self, state: int) -> None:
        """Note that the rank ends."""
        self.sheet.mark(self.index, state)

    def waiting(self) -> Call | None:
        """The call that this rank has been in for the longest time."""
        return next(iter(self.sheet.position(self.index).inside), None)

    def look(self) -> None:
        """Note where the main thread is, for those who wonder what a rank computes so long.

        By way of faulthandler, which holds the interpreter all the while: to walk the frames of a
        running thread in Python, which may be interrupted in between, has crashed Python 3.11.
        """
        self._stacks.seek(0)
        self._stacks.truncate()
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._stacks.seek(0)
        text = self._stacks.read().decode(errors="replace")
        main = text.partition(f"Thread 0x{threading.main_thread().ident or 0:016x}")[2]
        stack = _FRAME.findall(main.partition("\n\n")[0])
        layers = [self._layers.get(name) or self._layer(name) for name, _ in stack]
        inner = next((at for at, layer in enumerate(layers) if layer != _OURS), None)
        if inner is None:
            return
        outer = next((at for at, layer in enumerate(layers) if layer == _PROGRAM), inner)
        place = ":".join(stack[outer])
        if inner != outer:
            name, line = stack[inner]
            place += f" ({os.path.relpath(name, _PACKAGE)}:{line})"
        self.sheet.note_line(self.index, place.encode()[:319])

    def _slot(self) -> int:
        """The place of a thread that communicates for the first time."""
        slot = len(self._slots) % sheet.THREADS
        at = self._slots[get_ident()] = sheet.call_of(self.index, slot)
        return at

    def _place(self, frame: FrameType | None) -> bytes:
        """The line of the program, and the line of this package that it has called for this."""
        known_layer = self._layers.get
        inner = None
        for _ in _DEPTH:
            if frame is None:
                break
            name = frame.f_code.co_filename
            layer = known_layer(name) or self._layer(name)
            if layer != _OURS:
                inner = inner or frame
                if layer == _PROGRAM:
                    break
            frame = frame.f_back
        else:  # so deep in the package that its own line tells more
            frame = None
        outer = frame or inner
        if outer is None or inner is None:
            return b"unknown place"
        key = (id(outer.f_code), outer.f_lasti, id(inner.f_code), inner.f_lasti)
        known = self._places.get(key)
        return known[0] if known else self._new_place(key, outer, inner)

    def _new_place(self, key: _Key, outer: FrameType, inner: FrameType) -> bytes:
        text = f"{outer.f_code.co_filename}:{outer.f_lineno}"
        if inner is not outer:
            text += f" ({os.path.relpath(inner.f_code.co_filename, _PACKAGE)}:{inner.f_lineno})"
        if len(self._places) >= _KEPT:
            self._places.clear()
        # The code is kept too, so that no other gets its number.
        self._places[key] = text.encode()[:319], outer.f_code, inner.f_code
        return self._places[key][0]

    def _layer(self, name: str) -> int:
        """What a file belongs to: communication, other parts of this package, or the program.

        contextlib, which begins and ends everybody's blocks, is passed over like communication.
        """
        ours = name.startswith(_COMM) or name == contextlib.__file__
        layer = _OURS if ours else _OTHERS if name.startswith(_PACKAGE) else _PROGRAM
        self._layers[name] = layer
        return layer
