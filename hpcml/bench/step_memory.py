"""The memory of a GPT training step, beside PyTorch's: what the system gives, not an account.

Measured is the peak of the resident size (VmHWM) over `STEPS` steps, less the resident size (VmRSS)
before the model is built, both of /proc/self/status, each time in a fresh process. Before that
either library has been imported and has done a step of a tiny model, so that kernels are loaded,
BLAS has its buffers and threads have begun; what was freed until then is given back to the system,
because memory that lies ready would not show in the peak.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from hpcml import backend
from hpcml.bench.step import SIZES, VOCAB, Row, Size, batch_of, begin, our_step
from hpcml.errors import UserError

STEPS = 5
ROUNDS = 3
TINY = Size(1, 2, 16, 8, 2)
"""What has run before the baseline."""

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def run(sizes: Sequence[str], peer: str = "", threads: int = 1, rounds: int = 0) -> dict[str, Any]:
    """Measure one rank; the report as plain values. The arguments are those of `step.run`.

    Raises UserError where the system does not tell, or the peer is not installed.
    """
    if not _CLEAR.exists():
        raise UserError(f"--part memory: {_CLEAR} is missing: run this part on Linux")
    report = begin("memory", peer, threads, 1)
    rows = [measure(SIZES[name], peer, threads, rounds or ROUNDS) for name in sizes]
    return report | {"steps": STEPS, "rows": rows}


def measure(size: Size, peer: str, threads: int, rounds: int) -> Row:
    """Medians in bytes; `ratio` is the peer's by ours."""
    found: dict[str, list[int]] = {who: [] for who in ("ours", *filter(None, [peer]))}
    for _ in range(rounds):
        for who, peaks in found.items():
            peaks.append(_in_a_process(who, size, threads))
    row: Row = {"size": str(size), "ours": statistics.median(found["ours"])}
    if peer:
        row["peer"] = statistics.median(found[peer])
        row["ratio"] = row["peer"] / row["ours"]
    return row


def _in_a_process(who: str, size: Size, threads: int) -> int:
    arguments = json.dumps({"who": who, "size": asdict(size), "threads": threads})
    command = [sys.executable, "-m", __name__, arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=True, text=True
    )
    return int(done.stdout)


def main(arguments: str) -> None:
    """Print the bytes that this process has taken at most: the other end of `run`."""
    given = json.loads(arguments)
    backend.set_threads(given["threads"])
    make = _ours if given["who"] == "ours" else partial(_torchs, given["threads"])
    make(TINY)()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")  # the peak begins anew: imports and compilers have had theirs
    before = _status("VmRSS")
    step = make(Size(**given["size"]))
    for _ in range(STEPS):
        step()
    print(_status("VmHWM") - before)


def _ours(size: Size) -> Callable[[], float]:
    return partial(our_step(size), batch_of(size))


def _torchs(threads: int, size: Size) -> Callable[[], float]:
    from hpcml.bench import torch_peer

    torch_peer.set_threads(threads)
    return torch_peer.step(size, None, batch_of(size), VOCAB)


def _status(name: str) -> int:
    """A value of /proc/self/status in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    main(sys.argv[1])
