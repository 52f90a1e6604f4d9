"""The record: each use of a primitive, where its inputs came from and what it saved."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcml import backend, memory
from hpcml.autograd.halves import HALVES, narrowed, widened
from hpcml.autograd.mode import mode
from hpcml.autograd.ops.arrays import contiguous, unbroadcast
from hpcml.backend import Array

if TYPE_CHECKING:
    from hpcml.autograd.primitives import Primitive
    from hpcml.autograd.tensor import Tensor

_order = itertools.count()
_FLOAT32 = np.dtype(np.float32)


class Context:
    """One use of a primitive: where its inputs came from, and what it saved for its adjoints."""

    __slots__ = ("_handed", "_inputs", "_packed", "_pending", "_pending_ours", "_saved", "_shared",
                 "_target", "attributes", "dtypes", "needs", "order", "primitive", "shapes",
                 "sources", "units", "wide")  # fmt: skip

    def __init__(
        self, primitive: Primitive, inputs: tuple[Any, ...], needs: tuple[bool, ...]
    ) -> None:
        self.primitive = primitive
        self.needs = needs  # which inputs want a gradient
        self.order = next(_order)
        self.shapes: tuple[tuple[int, ...], ...] = ()
        self.dtypes: tuple[np.dtype[Any] | None, ...] = ()
        # Whose values adjoints will ask for: sharded parameters, fetched together (see `nn.Unit`).
        self.units: tuple[Any, ...] = ()
        self.attributes: Any = None  # small values an adjoint needs: axes, shapes, flags
        # The use that made an input, or the input itself if it is a leaf. Not the tensors between:
        # they would keep every activation alive, needed or not.
        self.sources: tuple[Context | Tensor | None, ...] = ()
        self._inputs = inputs
        self._saved: list[tuple[Any, Any]] | None = []
        self._shared: Any = None
        self._handed: Array | None = None
        self._target: Array | None = None
        self._pending: Array | None = None
        self._pending_ours = self._packed = False
        self.wide = False  # whether 16-bit floats are widened for the forward and the adjoints

    def save(self, *arrays: Array) -> None:
        """Keep arrays for the adjoints, which find them in `saved`; nothing unless recording.

        Give None for what only adjoints use that `needs` does not ask for: it is freed earlier.
        """
        if True not in self.needs:
            return
        assert self._saved is not None
        for array in arrays:
            # What is widened is exchanged for the 16 bits as soon as the result is there.
            self._saved.append((None, array) if self.wide else self.entry(array))

    def entry(self, array: Array) -> tuple[Any, Any]:
        """How an array is kept for the adjoints: the function that gets it back, and from what."""
        if array is None:
            return None, None
        for x in self._inputs:
            if getattr(x, "_array", None) is not array:  # not this tensor's
                array = apart(array, x)
            elif x.is_parameter:
                if x.unit is not None:
                    self.units += (x.unit,)
                return _data, x  # its storage may be elsewhere by then: ask it again
            else:
                maker = x.ctx
                while isinstance(maker, Context) and maker.primitive.hands_on:
                    maker = maker.sources[0]
                if isinstance(maker, Context) and maker.primitive.remake:
                    self._packed = True
                    return _remade, maker
        if mode.pack is not None and backend.is_array(array):
            self._packed = True
            return _unpacking(mode.unpack, array.flags.c_contiguous), mode.pack(array)
        return None, array

    @property
    def saved(self) -> list[Array]:
        """The arrays given to `save`, in that order."""
        assert self._saved is not None
        if self._packed:
            for unpack, value in self._saved:
                if unpack is _data:
                    _data(value)  # is fetched before those that make something again
            for i, (unpack, value) in enumerate(self._saved):
                if unpack is not None and unpack is not _data:
                    self._saved[i] = (None, unpack(value))
            self._packed = False
        arrays = [value if unpack is None else unpack(value) for unpack, value in self._saved]
        if self.wide:
            arrays = [widened(array) for array in arrays]
            self._saved = [(None, array) for array in arrays]  # for the other adjoints
        return arrays

    def empty(self, shape: tuple[int, ...], like: Array) -> Array:
        """Return an uninitialised array for the result; may be the parameter's gradient itself.

        Ask once per call and return that very array, of which nobody else may keep a view.
        """
        target = self._target
        if (
            target is not None
            and target.shape == shape
            and target.dtype == like.dtype
            and target.flags.c_contiguous  # what kernels write to
        ):
            self._handed = target
        else:
            self._handed = empty(shape, like)
        return self._handed

    def like(self, array: Array) -> Array:
        """As `empty`, of the shape of `array` and with its elements in memory in its order."""
        if array.flags.c_contiguous:
            return self.empty(array.shape, array)
        return self.own(empty_like(array))

    def own(self, array: Array) -> Array:
        """Return `array`, the result, of which nobody else keeps a view: it may be added to."""
        self._handed = array
        return array

    def take_pending(self) -> Array | None:
        """Return what this input's gradient has got so far, or None; the result must include it.

        It may belong to others: read it, do not write it.
        """
        pending, self._pending = self._pending, None
        return widened(pending) if self.wide else pending

    def accumulator(self, shape: tuple[int, ...], like: Array) -> Array:
        """Return an array with what this input's gradient has got so far (zeros if nothing).

        Add to it in place and return it: for adjoints that touch few elements.
        """
        ours, pending, self._pending = self._pending_ours, self._pending, None
        if pending is not None and pending.dtype in HALVES and like.dtype not in HALVES:
            ours, pending = True, widened(pending)
        if pending is not None and ours and pending.flags.c_contiguous:
            self._handed = pending
            return pending
        result = self.empty(shape, like)
        result[...] = 0 if pending is None else pending
        return result

    def shared(self, compute: Callable[[], Any]) -> Any:
        """Return `compute()`, evaluated once for all adjoints of this use."""
        if self._shared is None:
            self._shared = compute()
        return self._shared

    def fit(self, gradient: Array, which: int) -> Array:
        """Sum `gradient` over the axes along which input `which` was broadcast."""
        return unbroadcast(gradient, self.shapes[which])

    def release(self) -> None:
        """Forget what was saved and where inputs came from: the gradients are computed."""
        self._saved = self._shared = self._handed = None
        self.sources, self.needs, self.units = (), (), ()

    @property
    def released(self) -> bool:
        """Whether backward has already run through this use."""
        return self._saved is None


def empty(shape: tuple[int, ...], like: Array, dtype: Any = None) -> Array:
    """Return an uninitialised array of `like`'s device and dtype, counted by category."""
    dtype = like.dtype if dtype is None else dtype
    if isinstance(like, np.ndarray | np.generic):
        return memory.empty(shape, dtype)
    return memory.empty(shape, dtype, device="cuda")


def sums(shape: tuple[int, ...], like: Array) -> Array:
    """As `empty`, for sums and means of such elements: float32 where they have 16 bits."""
    return empty(shape, like, sum_type(like))


def sum_type(like: Array) -> np.dtype[Any]:
    """The type of sums of such elements: float32 where they have 16 bits."""
    return _FLOAT32 if like.dtype in HALVES else like.dtype


def empty_like(array: Array) -> Array:
    """Return an uninitialised array of the shape of `array`, its elements in the same order."""
    if isinstance(array, np.ndarray | np.generic):
        return memory.empty_like(array)
    return memory.empty_like(array, device="cuda")


def apart(array: Array, source: Any) -> Array:
    """Return `array`, or a copy if it is a view of a parameter's values that will be let go."""
    if getattr(source, "unit", None) is None or not backend.is_array(array):
        return array
    return array.copy() if backend.xp(array).may_share_memory(array, source.data) else array


def _data(parameter: Tensor) -> Array:
    return parameter.data


def _remade(maker: Context) -> Array:
    kind = maker.dtypes[0]
    assert maker.primitive.remake is not None and kind is not None
    made = maker.primitive.remake(maker)
    return narrowed(made, kind) if maker.wide else made


def _unpacking(unpack: Any, in_order: bool) -> Callable[[Any], Array]:
    """What gets an array back as adjoints take it: they know other orders only from forward."""

    def get(value: Any) -> Array:
        array: Array = unpack(value)
        dense = not in_order and backend.in_order(array).flags.c_contiguous
        return array if dense else contiguous(array)

    return get
