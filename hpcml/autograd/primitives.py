"""Primitives: an operation with one adjoint for each input.

A primitive's forward works on arrays and saves what its adjoints need; each adjoint maps the
gradient of the output to the gradient of one input, so that the gradients of weights can be asked
for later than those of activations.

    @primitive
    def mul(ctx, a, b):
        ctx.save(a, b)
        return a * b

    @mul.adjoint
    def mul_a(ctx, g):
        a, b = ctx.saved
        return ctx.fit(g * b, 0)

Both see 16-bit floats in float32: `autograd.halves` widens and rounds around them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hpcml.autograd.halves import HALVES, through_float32
from hpcml.autograd.mode import mode
from hpcml.autograd.record import Context, apart
from hpcml.backend import Array
from hpcml.errors import MemoryLimitError, UserError

if TYPE_CHECKING:
    from hpcml.autograd.tensor import Tensor


def _no_halves(dtype: np.dtype[Any]) -> bool:
    return False


class Primitive:
    """A differentiable operation; call it with tensors, arrays or numbers, get a tensor."""

    tensor: ClassVar[type[Tensor]]  # the class of inputs and results, which imports this module
    made: ClassVar[weakref.WeakSet[Primitive]] = weakref.WeakSet()  # all there are

    def __init__(self, forward: Callable[..., Array]) -> None:
        self.forward = forward
        self.name = forward.__name__
        self.moves = False  # see `movement`
        self.hands_on = False  # whether the result is the first input itself
        self.joint = False  # whether all adjoints of a use must be called one after the other
        # Whether adjoints may call backward() themselves: of those from elsewhere it is not known.
        self.nests = not str(getattr(forward, "__module__", "")).startswith("hpcml.")
        self.takes: Callable[[np.dtype[Any]], bool] = _no_halves
        """Which 16-bit types it and its adjoints take as they are, on the CPU."""
        self.on_device = False
        """Whether on a GPU these take all 16-bit types as they are."""
        self.adjoints: list[Callable[[Context, Array], Array]] = []
        self.remake: Callable[[Context], Array] | None = None
        """Makes the result again from what was saved: those who need it in backward keep none."""
        self.__doc__ = forward.__doc__
        self.made.add(self)

    def adjoint(self, function: Callable[[Context, Array], Array]) -> Any:
        """Register the adjoint of the next input: (context, gradient of the output) -> gradient."""
        self.adjoints.append(function)
        return function

    def remade(self, function: Callable[[Context], Array]) -> Any:
        """Register what makes the result again: to the bit, in less time than memory is worth."""
        self.remake = function
        return function

    def __call__(self, *inputs: Any, **attributes: Any) -> Tensor:
        """Compute the result and, if an input requires a gradient, record the use."""
        kind, recording = self.tensor, mode.recording
        arrays, needs, shapes, dtypes, gathered = [], [], [], [], []
        for x in inputs:
            if isinstance(x, kind):
                array = x.data
                shapes.append(array.shape)
                dtypes.append(array.dtype)
                needs.append(recording and x.requires_grad)
                if x.unit is not None:
                    gathered.append(x)
            else:
                array = x
                shapes.append(getattr(array, "shape", ()))
                dtypes.append(getattr(array, "dtype", None))
                needs.append(False)
            arrays.append(array)
        ctx = Context(self, inputs, tuple(needs))
        ctx.shapes, ctx.dtypes = tuple(shapes), tuple(dtypes)
        noted = None if mode.watch is None else mode.watch(self.name, inputs, attributes)
        try:
            if self.moves or HALVES.isdisjoint(dtypes) or self._takes(arrays, dtypes):
                out = self.forward(ctx, *arrays, **attributes)
            else:
                out = through_float32(ctx, arrays, attributes)
        except MemoryLimitError:
            raise  # it is not about the arguments
        except (ValueError, IndexError, TypeError) as error:
            raise self._explain(error, ctx.shapes) from error
        if noted is not None:
            noted(out)
        for x in gathered:
            out = apart(out, x)
        if True not in needs:
            return kind(out)
        # What needs no gradient is not kept: what was saved of it may be in another form.
        ctx.sources = tuple([x.ctx or x if n else None for x, n in zip(inputs, needs, strict=True)])
        ctx._inputs, ctx._handed = (), None  # or the record would keep every result
        result = kind(out, True)
        result.ctx = ctx
        return result

    def _takes(self, arrays: list[Any], dtypes: list[np.dtype[Any] | None]) -> bool:
        if self.on_device and not isinstance(arrays[0], np.ndarray):
            return True
        return all(dtype is None or self.takes(dtype) for dtype in dtypes)

    def _explain(self, error: Exception, shapes: tuple[tuple[int, ...], ...]) -> Exception:
        text = str(error)
        if text.startswith(f"{self.name}("):
            return error
        # Not the type itself, unless ours: NumPy's own errors are made from other arguments.
        kinds: tuple[type[Exception], ...] = (type(error),) if isinstance(error, UserError) else ()
        kind: type[Exception] = next(
            k for k in (*kinds, IndexError, TypeError, ValueError) if isinstance(error, k)
        )
        return kind(f"{self.name}({', '.join(map(str, shapes))}): {text}")


def primitive(forward: Callable[..., Array]) -> Primitive:
    """Make a primitive of `forward(ctx, *arrays, **attributes)`; add adjoints in input order.

    Inputs beyond the adjoints (indices, targets) get no gradient.
    """
    return Primitive(forward)


def movement(forward: Callable[..., Array]) -> Primitive:
    """Make a primitive that only moves elements: it and its adjoints get 16-bit floats as they are.

    An adjoint that adds elements up widens its gradient first (`autograd.halves.widened`).
    """
    made = primitive(forward)
    made.moves = True
    return made
