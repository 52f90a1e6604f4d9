"""Whether MPI takes memory of a GPU: found out by trying, and agreed by the ranks.

What an MPI library says of itself does not decide, nor does its version: a job of two ranks sends
arrays of the GPU and looks at what has come. It is a job of its own, for a library that takes such
memory for the host's dies of it. `HPCML_GPU_MPI` decides instead, if it is set.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpcml.comm import child
from hpcml.comm.board import Group
from hpcml.comm.child import Outcome
from hpcml.comm.launch import APART, apart
from hpcml.errors import UserError

if TYPE_CHECKING:
    from hpcml.comm.link import Link

VARIABLE = "HPCML_GPU_MPI"
WAYS = ("auto", "device", "staged")
"""What it may be: found out by trying; given to MPI as it is; by way of the host."""

RANKS = 2
_LAYER = "OMPI_MCA_pml"
"""What Open MPI sends messages by."""
_STAGED, _UNKNOWN, _DIRECT = range(3)
_log = logging.getLogger("hpcml")


class _Known:
    """What this process has found out."""

    verdict = _UNKNOWN
    lock = threading.Lock()


def asked() -> str:
    """What `HPCML_GPU_MPI` asks for; raises `UserError` for what it cannot be."""
    text = os.environ.get(VARIABLE, "").strip() or "auto"
    if text not in WAYS:
        raise UserError(f"{VARIABLE}={text!r} is not known: set one of {', '.join(WAYS)}")
    return text


def likely(wish: str, processes: bool) -> bool:
    """Whether messages go direct among ranks that have not agreed on it (see `settle`).

    `wish`: as `asked` gives it. Between threads of one process there is no MPI to ask.
    """
    if wish == "auto" and processes:
        return _Known.verdict == _DIRECT
    return wish != "staged"


def settle(link: Link, wish: str) -> bool:
    """Whether messages among these ranks go direct. Collective.

    All go direct if no rank knows better: one that is told, or has found out, that they cannot,
    decides for all. If none knows, the first one tries, and says why if that fails.
    """
    if not link.transport.processes:
        return likely(wish, False)
    own = {"staged": _STAGED, "device": _DIRECT}.get(wish, _Known.verdict)
    board = link.transport.board
    board.enter("trying of GPU messages", Group("GPU", link.members), 0, 0, "")
    try:
        verdict = _least(link, own)
        if verdict == _UNKNOWN:
            verdict = _least(link, _tried() if link.rank == 0 else _DIRECT)
    finally:
        board.leave()
    link.take_counts()  # no part of the first call
    _Known.verdict = verdict
    return verdict == _DIRECT


def _least(link: Link, own: int) -> int:
    """The least of what the ranks say."""
    from hpcml.comm.algorithms import find

    said = np.empty(link.size, np.uint8)
    mine = np.array([own], np.uint8)
    find("allgather", "ring").run(link, mine, said, (1,) * link.size)
    return int(said.min())


def _tried() -> int:
    with _Known.lock:  # threads of a rank may ask for several axes at once
        if _Known.verdict == _UNKNOWN:
            found = probe()
            if not found.found:
                _log.warning(
                    "MPI does not take memory of the GPU (%s): messages go through the host; "
                    "hpcml doctor says what may help",
                    found.failure,
                )
            _Known.verdict = _DIRECT if found.found else _STAGED
        return _Known.verdict


def probe(env: Mapping[str, str] | None = None, limit: float = child.LIMIT) -> Outcome:
    """Have a job of two ranks send arrays of the GPU; what it found, or why it failed.

    `env`: what is added to the environment. `limit`: seconds that it may take.
    """
    mpiexec = child.find_mpiexec()
    if not mpiexec:
        return Outcome(failure=f"no mpiexec to try it with: set {VARIABLE}=device if it does")
    # MPICH's launcher would go by way of the batch system, in whose job step this may be.
    extra = child.PERMISSIVE | {"HYDRA_LAUNCHER": "fork"} | dict(env or {})
    program = [sys.executable, "-m", "hpcml.comm.direct_probe"]
    return child.run([mpiexec, "-n", str(RANKS), *program], limit, extra)


def recipe() -> dict[str, str]:
    """The environment in which MPI from a wheel loads a UCX from a wheel that knows CUDA.

    The wheels of MPICH and Open MPI look for UCX in LD_LIBRARY_PATH first; that of libucx-cu13 (or
    -cu12) is built with CUDA. Empty if it is not installed, or asked for already.

    Within a node both go past UCX, by memory that knows no CUDA, unless they are told.
    """
    found = importlib.util.find_spec("libucx")
    folders = list(found.submodule_search_locations or []) if found else []
    folder = next((str(Path(name, "lib")) for name in folders if Path(name, "lib").is_dir()), "")
    paths = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    told = apart() or os.environ.get(_LAYER) == "ucx"
    if not folder or (folder in paths and told):
        return {}
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(dict.fromkeys(filter(None, [folder, *paths]))),
        APART: "1",
        _LAYER: "ucx",
        "OMPI_MCA_opal_common_ucx_tls": "any",
        "OMPI_MCA_opal_common_ucx_devices": "any",
    }
