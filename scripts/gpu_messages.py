"""Collectives of a GPU's arrays between processes: values in every type, and bandwidth.

`python scripts/gpu_messages.py` starts jobs of 2 and 4 ranks, for each way that messages take on
this machine (`hpcml.comm.direct`), and prints a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from typing import Any

from hpcml.comm import child, direct

RANKS = (2, 4)
LIMIT = 20.0
"""Seconds for a job."""
OPERATIONS = ("allreduce", "reduce_scatter", "allgather", "broadcast", "alltoall")
DTYPES = ("float32", "float64", "bfloat16", "float16", "int32")
SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 27)
CHECKED = (96, 12 << 16)
"""Elements of the arrays whose values are looked at: one message, and more than a chunk."""
ROUNDS = 5


def ways() -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The environment of each way that works here, and what trials of MPI on GPU memory said."""
    found = {"staged": {direct.VARIABLE: "staged"}}
    said = {}
    for name, env in (("as it is", {}), ("with the UCX of a wheel", direct.recipe())):
        if name == "as it is" or env:
            trial = direct.probe(env)
            said[name] = trial.failure or "right"
            if trial.found and "device" not in found:
                found["device"] = {**env, direct.VARIABLE: "device"}
    return found, said


def collectives() -> dict[str, Any]:
    """All jobs: rows of payload per second, and what failed."""
    found, said = ways()
    rows: list[dict[str, Any]] = []
    failures = {}
    for way, env in found.items():
        for ranks in RANKS:
            command = [child.find_mpiexec(), "-n", str(ranks), sys.executable, __file__, "rank"]
            job = child.run(command, LIMIT, child.PERMISSIVE | env)
            if job.failure:
                failures[f"{way}, {ranks} ranks"] = job.failure
            rows += [{"ranks": ranks, "way": way, **row} for row in job.found.get("rows", [])]
    return {"mpi on GPU memory": said, "failures": failures, "rows": rows, "ok": not failures}


def rank() -> None:
    """What each rank of a job does. Collective."""
    import cupy

    import hpcml
    from hpcml import backend
    from hpcml.bench.collectives import Case

    mesh = hpcml.Mesh()
    axis = mesh["dp"]
    backend.use_device("cuda", mesh.node.local_rank)
    wait = cupy.cuda.get_current_stream().synchronize
    for dtype in DTYPES:
        for operation in OPERATIONS:
            for count in CHECKED:
                empty = partial(cupy.empty, dtype=backend.dtype(dtype))
                case = Case(operation, axis, count, empty)
                case.check(f"messages of {dtype}", case.call(None))
    rows = []
    for operation in OPERATIONS:
        for nbytes in SIZES:
            case = Case(operation, axis, nbytes // 4, partial(cupy.zeros, dtype="f4"))
            call = case.call(None)
            call()
            wait()
            axis.barrier()
            start = time.perf_counter()
            for _ in range(ROUNDS):
                call()
            wait()
            seconds = (time.perf_counter() - start) / ROUNDS
            rows.append(
                {"operation": operation, "bytes": case.payload, "us": round(1e6 * seconds, 1),
                 "GB/s": round(case.payload / seconds / 1e9, 3)}
            )  # fmt: skip
    if axis.rank == 0:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    if sys.argv[1:] == ["rank"]:
        rank()
    else:
        found = collectives()
        good = found.pop("ok")
        print(json.dumps(found))
        sys.exit(not good)
