"""One axis of a mesh: a group of ranks and the operations among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from hpcml import memory
from hpcml.comm.blocking import Blocking
from hpcml.comm.reduction import scratch
from hpcml.comm.request import Done, Request, worker_of
from hpcml.comm.staging import beside, on_device
from hpcml.comm.transport import Array


class Axis(Blocking):
    """The ranks along one axis (or a product of axes), and the operations among them.

    All ranks of the axis call the same operation in the same order, with arrays of equal shape and
    type. Arrays are NumPy, CuPy or anything with `__dlpack__`, of float16, bfloat16, float32,
    float64 or an integer type, on all ranks on the host or on all on a GPU; bool is moved but not
    reduced. 16-bit floats are added in float32, in the order of the ranks, and rounded once.

    `out` receives the result and is returned; it must be C-contiguous and of the result's shape and
    type. `out is x` works in place where the shapes agree. Without `out` the result is a new array,
    on an axis of size 1 too, where every operation is a copy and nothing is counted in the ledger.

    `algorithm` names one of `hpcml.comm.algorithms`; by default the fastest known for the size, the
    ranks and where they are. In deterministic mode all reductions combine in the order of the
    ranks, and 16-bit floats are rounded at every step.

    A form with the prefix `i` returns a `Request` at once; `wait()` gives the result. Its arrays
    must not be touched until then. Collectives so started happen in their order, in a thread beside
    the caller; `overlaps` tells whether that is likely to gain anything. (Of a GPU's array without
    `out` the collective is over when the request is returned.)

    Raises `ValueError` for types that cannot be communicated, shapes that do not fit and an unfit
    `out`, before anything is sent; `TypeError` for what is no array.
    """

    _background: Blocking | None = None

    def __repr__(self) -> str:
        return f"Axis({self.name!r}, size={self.size}, rank={self.rank})"

    @property
    def overlaps(self) -> bool:
        """Whether what is started in the background is likely to be hidden by compute.

        The rule that `hpcml bench overlap` led to: yes if the axis spans several nodes. Within a
        node the reduction itself takes the memory's bandwidth and a core: nothing is hidden.
        """
        return len(set(self._link.nodes)) > 1

    def empty(
        self,
        shape: int | Sequence[int],
        dtype: DTypeLike = np.float32,
        category: str = "buffers",
    ) -> Array:
        """Memory, not initialised, that the axis can reduce in place. Collective.

        All ranks ask for the same shape and type and use the memory in the same calls. Among ranks
        of one node it lies in memory that they share: all-reduce, reduce-scatter, all-gather and
        broadcast then take place there, without messages. Where it cannot be shared (the first time
        says why), and on an axis of size 1, it is ordinary memory. Counted in `category`.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        kind = np.dtype(dtype)
        nbytes = math.prod(shape) * kind.itemsize
        window = None
        if self.size > 1 and nbytes:
            memory.account().require(category, nbytes)
            self._agree("empty", np.empty(0, kind), nbytes, None, ())
            window = self._windows.make(nbytes)
            self._record("share", 0)
        made: Array
        if window is None:
            made = memory.empty(shape, kind, category)
        else:
            made = memory.adopt(window.region, window.offset, shape, kind, category, window)
        return made

    def scratch(self, count: int, dtype: DTypeLike, device: str = "cpu") -> int:
        """Bytes of `buffers` that a reduce-scatter of `count` elements takes beside them, at most.

        With the algorithms chosen by default; the MPI library's own memory does not count.
        """
        kind, on_gpu = np.dtype(dtype), device != "cpu"
        messages = self._chooser.scratch(count * kind.itemsize, kind, on_gpu)
        return messages + scratch(-(-count // self.size), kind, on_gpu)

    def iallreduce(self, x: Any, op: str = "sum", out: Any = None, **options: Any) -> Request:
        """`allreduce`, beside the caller."""
        return self._start("allreduce", x, op, out, **options)

    def ireduce_scatter(self, x: Any, op: str = "sum", out: Any = None, **options: Any) -> Request:
        """`reduce_scatter`, beside the caller."""
        return self._start("reduce_scatter", x, op, out, **options)

    def iallgather(self, x: Any, out: Any = None, **options: Any) -> Request:
        """`allgather`, beside the caller."""
        return self._start("allgather", x, out, **options)

    def ibroadcast(self, x: Any, root: int = 0, out: Any = None, **options: Any) -> Request:
        """`broadcast`, beside the caller."""
        return self._start("broadcast", x, root, out, **options)

    def ialltoall(self, x: Any, out: Any = None, **options: Any) -> Request:
        """`alltoall`, beside the caller."""
        return self._start("alltoall", x, out, **options)

    def ireduce(
        self, x: Any, op: str = "sum", root: int = 0, out: Any = None, **options: Any
    ) -> Request:
        """`reduce`, beside the caller."""
        return self._start("reduce", x, op, root, out, **options)

    def igather(self, x: Any, root: int = 0, out: Any = None, **options: Any) -> Request:
        """`gather`, beside the caller."""
        return self._start("gather", x, root, out, **options)

    def iscatter(self, x: Any, root: int = 0, out: Any = None, **options: Any) -> Request:
        """`scatter`, beside the caller."""
        return self._start("scatter", x, root, out, **options)

    def ibarrier(self) -> Request:
        """`barrier`, beside the caller."""
        return self._start("barrier")

    def _start(self, operation: str, *arguments: Any, **options: Any) -> Request:
        x, out = (arguments[0], arguments[-1]) if arguments else (None, None)
        # A new array of a GPU belongs to the stream that asks for it: not to the thread's.
        if self.size == 1 or (on_device(x) and out is None):
            return Done(getattr(self, operation)(*arguments, **options))
        if self._background is None or self._worker is None:
            twin = self.transport.background(self.name)
            self._background = Blocking(
                self.name, twin, self.ledger, self.deterministic, self.table, " in the background"
            )
            self._worker = worker_of(twin, f"hpcml-{self.name}")
        call = getattr(self._background, operation)
        return self._worker.submit(beside(x, lambda: call(*arguments, **options)))
