"""Parts of the check of the GPU: the ways of messages, and collectives between processes.

`python scripts/gpu_messages.py ways` finds out, once for all parts, whether MPI takes memory of the
GPU; `... collectives` looks at values in every type and measures bandwidth, each way.
"""

from __future__ import annotations

import sys
import time
from functools import partial

from gpu_rows import Row, in_turn, ranks, say, shares, tell

from hpcml.comm import child, direct

RANKS = (2, 4)
OPERATIONS = ("allreduce", "reduce_scatter", "allgather", "broadcast", "alltoall")
VALUES = "values of "
TODO = (*(VALUES + operation for operation in OPERATIONS), *OPERATIONS)
"""What jobs do: who has no time to measure has at least looked at all values."""
DTYPES = ("float32", "float64", "bfloat16", "float16", "int32")
SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 27)
CHECKED = (96, 12 << 16)
"""Elements of the arrays whose values are looked at: one message, and more than a chunk."""
ROUNDS = 5
DIRECT = "messages given to MPI as they are"
WORLD = """
from mpi4py import MPI
world = MPI.COMM_WORLD
library = MPI.Get_library_version().split(chr(10))[0].strip(chr(0))
assert world.size == 2, f"a world of {world.size} rank: mpiexec is not that of {library}"
if world.rank == 0:
    import json
    print(json.dumps({"row": {"what": "two ranks start", "agrees": True, "says": library}}))
"""


def ways() -> None:
    """Tell whether ranks start and whether MPI takes memory of the GPU; the answer for all others.

    An answer that the environment has already is taken.
    """
    print(f"mpiexec: {child.find_mpiexec()}", flush=True)
    known = direct.asked()
    trials = {"as it is": {}, "with the UCX of a wheel": direct.recipe()}
    tried = [name for name, env in trials.items() if env or name == "as it is"]
    limits = shares(["start", *tried], [2, *(3 for _ in tried)])  # CuPy is slow to begin
    why = [f"{direct.VARIABLE}={known}"] if known != "auto" else []
    failure = ranks(2, ["-c", WORLD], next(limits)[1], {})
    if failure:
        tell({"what": "two ranks start", "error": failure[:300]})
        why.append("ranks do not start")
    for name, limit in limits:
        if known != "auto" or failure:
            break
        start = time.monotonic()
        trial = direct.probe(trials[name], limit)
        # That MPI does not take it is an answer, and no failure: messages are staged.
        tell({"what": f"memory of the GPU given to MPI, {name}",
              "says": "right" if trial.found else trial.failure,
              "seconds": round(time.monotonic() - start, 1)})  # fmt: skip
        if trial.found:
            say(environment={**trials[name], direct.VARIABLE: "device"})
            return
        why.append(f"{name}: {trial.failure}")
    if known != "device":
        tell({"what": DIRECT, "agrees": "not shown", "because": "; ".join(why)[:300]})
    say(environment={direct.VARIABLE: "device" if known == "device" else "staged"})


def possible() -> list[str]:
    """The ways that messages may take here, as the environment says: see `ways`."""
    return ["staged", "device"] if direct.asked() == "device" else ["staged"]


def jobs() -> list[tuple[int, str]]:
    """The jobs of a part: how many ranks, and which way messages take; tells a way left out."""
    ways = possible()
    if "device" not in ways:
        tell({"what": DIRECT, "agrees": "not shown", "because": "see the part mpi"})
    return [(count, way) for count in RANKS for way in ways]


def collectives() -> None:
    """Tell a row for each operation, way, number of ranks and payload."""
    todo = jobs()
    for (count, way), limit in shares(todo, [2 + count for count, _ in todo]):
        about = {"ranks": count, "way": way}
        env = {direct.VARIABLE: way}
        in_turn(count, [__file__, "rank"], TODO, about, limit, env)


def rank(todo: list[str]) -> None:
    """What each rank of a job does: operations to be looked at, or measured. Collective."""
    import cupy

    import hpcml
    from hpcml import backend
    from hpcml.bench.collectives import Case

    mesh = hpcml.Mesh()
    axis = mesh["dp"]
    backend.use_device("cuda", mesh.node.local_rank)
    wait = cupy.cuda.get_current_stream().synchronize

    def speak(row: Row) -> None:
        if axis.rank == 0:
            tell(row)

    def look(name: str) -> None:
        for dtype in DTYPES:
            for count in CHECKED:
                empty = partial(cupy.empty, dtype=backend.dtype(dtype))
                case = Case(name.removeprefix(VALUES), axis, count, empty)
                case.check(f"messages of {dtype}", case.call(None))
        speak({"name": name, "values": f"right in {len(DTYPES)} types", "agrees": True})

    def measure(operation: str) -> None:
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
            speak({"name": operation, "bytes": case.payload, "us": round(1e6 * seconds, 1),
                   "GB/s": round(case.payload / seconds / 1e9, 3)})  # fmt: skip

    for name in todo:
        (look if name.startswith(VALUES) else measure)(name)
        speak({"name": name, "done": True})


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank(sys.argv[2:])
    else:
        {"ways": ways, "collectives": collectives}[sys.argv[1]]()
