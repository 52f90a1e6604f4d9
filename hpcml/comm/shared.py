"""Memory that the ranks of a node share: a file in memory that all of them map.

MPI has windows for this (`MPI_Win_allocate_shared`). They are not used, because freeing one is
collective, while arrays die on each rank when they like; because one library grants more than there
is and dies of SIGBUS on first touch; and because some leave files behind when a job is killed. Here
every page is reserved before use, and the file has no name any more as soon as all have mapped it.
"""

from __future__ import annotations

import logging
import mmap
import os
import uuid
from contextlib import suppress
from pathlib import Path

import numpy as np

from hpcml.comm.algorithms import find
from hpcml.comm.link import Link
from hpcml.comm.transport import Array

FOLDER = Path("/dev/shm")
_CGROUP = Path("/sys/fs/cgroup")
_PAGE = mmap.PAGESIZE
_log = logging.getLogger("hpcml")


def share(link: Link, nbytes: int) -> mmap.mmap | None:
    """Map memory of `size` times `nbytes` (whole pages), that of rank 0 first. Collective.

    Ranks that are not all on one node, or cannot all have the memory, all get None. The rank that
    lacks it says why, once.
    """
    assert nbytes % _PAGE == 0, nbytes
    refusal = _refusal(link, nbytes)
    name = np.frombuffer(uuid.uuid4().bytes, np.uint8).copy()
    find("broadcast", "binomial").run(link, name, 0)
    path = FOLDER / f"hpcml-{name.tobytes().hex()}"
    if not _all_agree(link, refusal):
        return None
    region: mmap.mmap | None = None
    try:
        region = _reserve(path, link, nbytes)
    except OSError as error:
        refusal = f"{FOLDER} gives no {_size(link.size * nbytes)} ({error.strerror})"
    agreed = _all_agree(link, refusal)  # all have opened it, or will not
    if link.rank == 0:
        with suppress(OSError):
            path.unlink()
    if agreed:
        return region
    if region is not None:
        region.close()
    return None


def _reserve(path: Path, link: Link, nbytes: int) -> mmap.mmap:
    """Map the file, and have the pages of this rank's part set aside."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        # Reserving, unlike growing the file, fails at once where there is no room.
        os.posix_fallocate(descriptor, link.rank * nbytes, nbytes)
        total = link.size * nbytes
        if os.fstat(descriptor).st_size < total:
            os.posix_fallocate(descriptor, total - 1, 1)
        return mmap.mmap(descriptor, total)
    finally:
        os.close(descriptor)


def _refusal(link: Link, nbytes: int) -> str:
    """Why this rank cannot share memory with the others, or an empty string."""
    if not FOLDER.is_dir():
        return f"there is no {FOLDER}"
    needed = link.size * nbytes
    room = os.statvfs(FOLDER).f_bavail * os.statvfs(FOLDER).f_frsize
    if needed > room:
        return f"{FOLDER} has {_size(room)} left, but {_size(needed)} are needed"
    allowed = _cgroup_room()
    if allowed is not None and needed > allowed:
        return f"the memory limit leaves {_size(allowed)}, but {_size(needed)} are needed"
    return ""


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


def _cgroup_room() -> int | None:
    """Bytes that the job's memory limit leaves, if it has one."""
    try:
        most = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = (_CGROUP / "memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return None if most == "max" else max(int(most) - int(used), 0)


def _all_agree(link: Link, refusal: str) -> bool:
    """Whether no rank refuses; the first that does says why."""
    flags: Array = np.zeros(link.size, np.uint8)
    flags[link.rank] = bool(refusal)
    find("allgather", "ring").run(link, flags[link.rank : link.rank + 1], flags, (1,) * link.size)
    if refusal and int(flags.argmax()) == link.rank:
        _log.warning("no shared memory for collectives: %s; they go by messages, slower", refusal)
    return not flags.any()
