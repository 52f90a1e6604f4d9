"""The calls of the communication that the doctor tries; `hpcml.cli.doctor.trial` makes them."""

from __future__ import annotations

from typing import NamedTuple

DTYPES = ("float16", "bfloat16", "float32", "float64", "int32", "int64")
COLLECTIVES = (
    "allreduce", "reduce_scatter", "allgather", "broadcast", "reduce", "gather", "scatter",
    "alltoall",
)  # fmt: skip


class Cell(NamedTuple):
    """One call to try."""

    operation: str
    """A method of `Axis`; "send" with its "recv"; or one of `EXTRAS`."""
    dtype: str
    memory: str = "host"
    """"host", "shared" (from `Axis.empty`) or "device" (of a GPU)."""
    form: str = "blocking"
    """"blocking" or "non-blocking"."""

    def __str__(self) -> str:
        return f"{self.operation} of {self.dtype}, {self.memory} memory, {self.form}"


EXTRAS = (
    Cell("background", "float32"),
    Cell("vendor", "float16"),
    Cell("vendor", "bfloat16"),
)
"""A call beside one of the communication thread, and the MPI library's own 16-bit sums. These come
last: libraries have died of them."""


def plan(device: bool) -> list[Cell]:
    """The cells of one job: those on host memory, or those on memory of a GPU."""
    memories = ["device"] if device else ["host", "shared"]
    cells = [
        Cell(operation, dtype, memory, form)
        for operation in (*COLLECTIVES, "send")
        for dtype in DTYPES
        for memory in memories
        for form in ("blocking", "non-blocking")
        if not (operation == "send" and memory == "shared")
    ]
    return cells if device else [*cells, *EXTRAS]
