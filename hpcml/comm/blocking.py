"""The collective operations among a group of ranks: their arguments checked and made fit."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from hpcml import memory
from hpcml.comm.algorithms import span
from hpcml.comm.buffers import (
    blocks_of,
    check_counts,
    elements,
    operands,
    stacked,
    unchanged,
)
from hpcml.comm.pairs import Pairs
from hpcml.comm.reduction import reduction
from hpcml.comm.transport import Array

T = TypeVar("T")

_NOTHING = np.dtype(np.uint8)


class Blocking(Pairs):
    """The collective operations of one stream; see `Axis` for their use."""

    def allreduce(
        self,
        x: Any,
        op: str = "sum",
        out: Any = None,
        *,
        accumulate: bool = False,
        algorithm: str | None = None,
    ) -> Any:
        """Combine `x` element-wise over the ranks: sum, prod, min or max. All get the result.

        `accumulate` combines the result with what `out` (the same on all ranks) holds already:
        ((out op x of rank 0) op x of rank 1) ... in deterministic mode.
        """
        key = ("allreduce", id(x), id(out), op, accumulate) if algorithm is None else None
        if key and self._again(key, x, out):
            return out
        if accumulate and (out is None or out is x):
            raise ValueError("accumulate=True adds to `out`: pass one that is not x")
        arrays = operands(x, out, unchanged, op)
        source, target = arrays.flat()
        call = self._combine("allreduce", source, target, op, accumulate, algorithm)
        self._known.keep(key, x, out, arrays, call)
        return arrays.finish()

    def reduce_scatter(
        self,
        x: Any,
        op: str = "sum",
        out: Any = None,
        *,
        counts: Sequence[int] | None = None,
        accumulate: bool = False,
        algorithm: str | None = None,
    ) -> Any:
        """Combine `x` of shape (size * k, ...); rank r gets rows r*k to (r+1)*k of the result.

        `counts`: rows for each rank, the same on all; `accumulate`: as for `allreduce`. `out` may
        be this rank's rows of `x`: then nothing else of it changes.
        Raises `ValueError` if the rows cannot be cut so.
        """
        plain = algorithm is None and counts is None
        key = ("reduce_scatter", id(x), id(out), op, accumulate) if plain else None
        if key and self._again(key, x, out):
            return out
        if accumulate and out is None:
            raise ValueError("accumulate=True adds to `out`: pass one")
        rule = blocks_of("reduce_scatter", self.size, counts, self.rank)
        home = self._home(counts, whole=True)
        arrays = operands(x, out, rule, op, home=home, keep_source=True)
        source, target = arrays.flat()
        cut = elements(arrays.source.shape, self.size, counts)
        call = self._combine(
            "reduce_scatter", source, target, op, accumulate, algorithm, cut, even=counts is None
        )
        self._known.keep(key, x, out, arrays, call)
        return arrays.finish()

    def reduce(
        self, x: Any, op: str = "sum", root: int = 0, out: Any = None, algorithm: str | None = None
    ) -> Any:
        """As `allreduce`, but only rank `root` gets the result; the others get None."""
        self._check_rank("root", root)
        arrays = operands(x, out, unchanged, op, receives=self.rank == root)
        source: Array = arrays.source.reshape(-1)
        target: Array | None = None
        if arrays.target is not None:
            source, target = arrays.flat()
        how = reduction(op, self.deterministic)
        self._run("reduce", source, source.nbytes, algorithm, source, target, how, root)
        return arrays.finish()

    def allgather(
        self,
        x: Any,
        out: Any = None,
        *,
        counts: Sequence[int] | None = None,
        algorithm: str | None = None,
    ) -> Any:
        """Join the equal-shaped `x` (k, ...) of all ranks along dim 0 to (size * k, ...).

        `counts`: rows of each rank, where they differ. `x` may be this rank's own block of `out`:
        then nothing is copied.
        """
        plain = algorithm is None and counts is None
        key = ("allgather", id(x), id(out), "", False) if plain else None
        if key and self._again(key, x, out):
            return out
        rule = stacked("allgather", self.size, counts, self.rank)
        arrays = operands(x, out, rule, home=self._home(counts))
        source, target = arrays.flat()
        assert arrays.target is not None
        cut = elements(arrays.target.shape, self.size, counts)
        arguments = source, target, cut
        payload = target.nbytes
        call = self._run("allgather", target, payload, algorithm, *arguments, even=counts is None)
        self._known.keep(key, x, out, arrays, call)
        return arrays.finish()

    def gather(
        self,
        x: Any,
        root: int = 0,
        out: Any = None,
        *,
        counts: Sequence[int] | None = None,
        algorithm: str | None = None,
    ) -> Any:
        """As `allgather`, but only rank `root` gets the result; the others get None."""
        self._check_rank("root", root)
        rule = stacked("gather", self.size, counts, self.rank)
        arrays = operands(x, out, rule, receives=self.rank == root, home=self._home(counts))
        source = arrays.source.reshape(-1)
        target = None if arrays.target is None else arrays.target.reshape(-1)
        cut = elements(rule(arrays.source.shape), self.size, counts)
        payload = sum(cut) * source.itemsize
        even = counts is None
        self._run("gather", source, payload, algorithm, source, target, cut, root, even=even)
        return arrays.finish()

    def scatter(
        self,
        x: Any,
        root: int = 0,
        out: Any = None,
        *,
        counts: Sequence[int] | None = None,
        algorithm: str | None = None,
    ) -> Any:
        """Rank r gets rows r*k to (r+1)*k of the root's `x` of shape (size * k, ...).

        Every rank passes an array of that shape and type, whose values count on the root alone.
        `counts`: rows for each rank. Raises `ValueError` if the rows cannot be cut so.
        """
        self._check_rank("root", root)
        rule = blocks_of("scatter", self.size, counts, self.rank)
        arrays = operands(x, out, rule)
        source, target = arrays.flat()
        cut = elements(arrays.source.shape, self.size, counts)
        given = source if self.rank == root else None
        even = counts is None
        self._run("scatter", target, source.nbytes, algorithm, given, target, cut, root, even=even)
        return arrays.finish()

    def broadcast(
        self, x: Any, root: int = 0, out: Any = None, algorithm: str | None = None
    ) -> Any:
        """All ranks get the root's `x`; `out is x` overwrites it in place.

        Every rank passes an array of the same shape and type, whose values count on the root alone.
        """
        self._check_rank("root", root)
        arrays = operands(x, out, unchanged)
        source, target = arrays.flat()
        if self.rank == root and target is not source:
            target[...] = source
        self._run("broadcast", target, target.nbytes, algorithm, target, root)
        return arrays.finish()

    def alltoall(
        self,
        x: Any,
        out: Any = None,
        *,
        sends: Sequence[int] | None = None,
        receives: Sequence[int] | None = None,
        algorithm: str | None = None,
    ) -> Any:
        """Cut dim 0 into `size` blocks; block s of rank r becomes block r of rank s.

        Equal blocks, or of `sends` rows to each rank and `receives` rows from each; all ranks give
        both or none. Raises `ValueError` if the rows cannot be cut so.
        """
        if (sends is None) != (receives is None):
            raise ValueError("alltoall takes sends and receives together, or neither")
        cut = blocks_of("alltoall", self.size, sends, self.rank)
        check_counts("alltoall", self.size, receives)

        def exchanged(shape: tuple[int, ...]) -> tuple[int, ...]:
            cut(shape)
            return shape if receives is None else (sum(receives), *shape[1:])

        arrays = operands(x, out, exchanged)
        source, target = arrays.flat()
        leaving = elements(arrays.source.shape, self.size, sends)
        coming = elements(exchanged(arrays.source.shape), self.size, receives)
        if source is target and self.size > 1:
            source = source.copy()
        arguments = source, target, leaving, coming
        self._run("alltoall", target, source.nbytes, algorithm, *arguments, even=sends is None)
        return arrays.finish()

    def barrier(self) -> None:
        """Return when all ranks of the axis have come here."""
        if self.size > 1:
            self._enter("barrier", 0, _NOTHING)
            try:
                if self._sanitizer:
                    self._sanitizer.agree("barrier", self._sequence, 0, _NOTHING, "")
                self.transport.barrier()
            finally:
                self._leave("barrier", 0)
            self._record("barrier", 0)

    def allgather_object(self, value: T) -> list[T]:
        """The small Python values of all ranks, pickled, in the order of the ranks.

        No limit of memory refuses them: it may be its own refusal that is told.
        """
        text = np.frombuffer(pickle.dumps(value), np.uint8)
        with memory.uncounted():
            lengths = self.allgather(np.array([text.size])).tolist()
            texts = self.allgather(text, counts=lengths)
        return [pickle.loads(texts[span(lengths, rank)].tobytes()) for rank in range(self.size)]

    def broadcast_object(self, value: T, root: int = 0) -> T:
        """The root's small Python value, pickled."""
        self._check_rank("root", root)
        text = np.frombuffer(pickle.dumps(value if self.rank == root else None), np.uint8)
        length = self.broadcast(np.array([text.size]), root)
        if self.rank != root:
            text = np.empty(int(length[0]), np.uint8)
        received: T = pickle.loads(self.broadcast(text, root).tobytes())
        return received

    def _home(
        self, counts: Sequence[int] | None, whole: bool = False
    ) -> Callable[[tuple[int, ...]], int]:
        """First row of this rank's block, by the shape of the block (or of the whole)."""

        def row(shape: tuple[int, ...]) -> int:
            if counts is not None:
                return sum(counts[: self.rank])
            return self.rank * (shape[0] // self.size if whole else shape[0])

        return row
