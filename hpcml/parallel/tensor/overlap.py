"""Linear layers that communicate beside their products, for sequence parallelism.

What sequence parallelism sends (Korthikanti et al. 2022, "Reducing activation recomputation in
large transformer models", section 4.2.2) goes into a product, or comes out of one. The batch is cut
into chunks, of which one travels while another is multiplied (Wang et al. 2023, "Overlap
communication with dependent computation via decomposition in large deep learning models"):

    gather 0 | gather 1  | gather 2  |
             | product 0 | product 1 | product 2 |

    product 0 | product 1 | product 2 |
              | scatter 0 | scatter 1 | scatter 2 |

The bytes are those of one all-gather or reduce-scatter, and every element is the same sum over the
ranks. The gradients of weight and bias, sums over rows, are made of all chunks at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from math import prod

from hpcml import kernels
from hpcml.autograd import Context, Tensor
from hpcml.autograd.halves import narrowed, widened
from hpcml.autograd.ops import linear as products
from hpcml.autograd.ops.arrays import contiguous, same_type
from hpcml.autograd.primitives import movement
from hpcml.backend import Array
from hpcml.comm import Axis
from hpcml.comm.request import Request
from hpcml.comm.shards import Shards, new
from hpcml.nn.part import blocks

CHUNKS = 4
"""At most. The first gather and the last scatter are beside nothing: the more chunks the shorter
these, but small products are slow."""


def gathered_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, counts: Sequence[int]
) -> Tensor:
    """weight times the positions of all ranks, plus bias: x in S(-2) -> as of x gathered to `R`.

    x (..., n, in), counts: the n of each rank; weight (out, in), bias (out) or None ->
    (..., sum of counts, out). The x of all ranks is kept for backward. Adjoint: the gradient of x
    is reduce-scattered beside the products for it, and beside those for weight and bias. Raises
    `ValueError` before anything is sent if sizes do not fit.
    """
    return _gathered_linear(weight, bias, x, axis=axis, counts=counts)


def scattered_linear(x: Tensor, weight: Tensor, axis: Axis, counts: Sequence[int]) -> Tensor:
    """weight times x, summed over the ranks: each gets its positions, S(-2).

    x (..., sum of counts, in), counts: the positions of each rank; weight (out, in) ->
    (..., n, out). Adjoint: the gradient is all-gathered beside the products for that of x. Raises
    `ValueError` before anything is sent if sizes do not fit.
    """
    return _scattered_linear(weight, x, axis=axis, counts=counts)


# --- the primitives -----------------------------------------------------------------------------

# The weight is the first input: its adjoint, which is called first, does its work while the
# gradient of x travels. 16-bit floats are to travel as they are, so these are movements.


@movement
def _gathered_linear(
    ctx: Context, weight: Array, bias: Array | None, x: Array, *, axis: Axis, counts: Sequence[int]
) -> Array:
    same_type(ctx, "weight", "bias", "x")
    products.check(x, weight, bias)
    cut = Shards.of("gathered_linear", x.shape, axis, -2, counts, whole=False)
    whole = new(cut.whole(x.shape), x.dtype, x)
    out = ctx.empty((*whole.shape[:-1], len(weight)), x)
    factor, added = _wide(weight), None if bias is None else _wide(bias)
    with _Chunks(axis, counts) as chunks:
        for chunk in chunks.gather(x, whole):
            here = _wide(_matrices(whole)[chunk])
            _into(_matrices(out)[chunk], products.product, here, factor, added)
    ctx.save(whole if ctx.needs[0] else None, weight if ctx.needs[2] else None)
    ctx.attributes = axis, counts
    return out


_gathered_linear.joint = True  # the weight's gradient is computed beside the way of that of x


@_gathered_linear.adjoint
def _gathered_linear_weight(ctx: Context, g: Array) -> Array:
    out = ctx.empty(ctx.shapes[0], _wide(g))
    ctx.shared(lambda: _gathered_backward(ctx, g, out))
    return out


@_gathered_linear.adjoint
def _gathered_linear_bias(ctx: Context, g: Array) -> Array:
    return ctx.shared(lambda: _gathered_backward(ctx, g))[0]


@_gathered_linear.adjoint
def _gathered_linear_x(ctx: Context, g: Array) -> Array:
    return ctx.shared(lambda: _gathered_backward(ctx, g))[1]


def _gathered_backward(ctx: Context, g: Array, out: Array = None) -> tuple[Array, Array]:
    """The gradients of bias and x, as far as they are needed; in `out` that of the weight."""
    (x, weight), wide = ctx.saved, _wide(g)
    bias_gradient = own = None
    with _Chunks(*ctx.attributes) as chunks:
        if ctx.needs[2]:
            own, factor = new(ctx.shapes[2], g.dtype, g), _wide(weight)
            rows = _matrices(wide)
            for chunk in chunks.of(rows):
                part = new((*rows[chunk].shape[:-1], weight.shape[1]), g.dtype, g, "buffers")
                _into(part, products.input_gradient, rows[chunk], factor)
                chunks.scatter(part, own, chunk)
        if out is not None:
            products.weight_gradient(wide, _wide(x), out)
        if ctx.needs[1]:
            wide = widened(wide)
            bias_gradient = new(ctx.shapes[1], wide.dtype, g)
            products.bias_gradient(wide, bias_gradient)
    return bias_gradient, own


@movement
def _scattered_linear(
    ctx: Context, weight: Array, x: Array, *, axis: Axis, counts: Sequence[int]
) -> Array:
    same_type(ctx, "weight", "x")
    products.check(x, weight, None)
    cut = Shards.of("scattered_linear", x.shape, axis, -2, counts, whole=True)
    out = ctx.empty((*cut.own(x.shape)[:-1], len(weight)), x)
    rows, factor = _matrices(x), _wide(weight)
    with _Chunks(axis, counts) as chunks:
        for chunk in chunks.of(rows):
            part = new((*rows[chunk].shape[:-1], len(weight)), x.dtype, x, "buffers")
            _into(part, products.product, _wide(rows[chunk]), factor, None)
            chunks.scatter(part, out, chunk)
    ctx.save(x if ctx.needs[0] else None, weight if ctx.needs[1] else None)
    ctx.attributes = axis, counts
    return out


_scattered_linear.joint = True


@_scattered_linear.adjoint
def _scattered_linear_weight(ctx: Context, g: Array) -> Array:
    out = ctx.empty(ctx.shapes[0], _wide(g))
    ctx.shared(lambda: _scattered_backward(ctx, g, out))
    return out


@_scattered_linear.adjoint
def _scattered_linear_x(ctx: Context, g: Array) -> Array:
    return ctx.shared(lambda: _scattered_backward(ctx, g))[0]


def _scattered_backward(ctx: Context, g: Array, out: Array = None) -> tuple[Array]:
    """The gradient of x, if it is needed; in `out` that of the weight."""
    (x, weight), (axis, counts) = ctx.saved, ctx.attributes
    whole = new((*ctx.shapes[1][:-1], g.shape[-1]), g.dtype, g)
    gradient = factor = None
    if ctx.needs[1]:
        gradient, factor = new(ctx.shapes[1], g.dtype, g), _wide(weight)
    with _Chunks(axis, counts) as chunks:
        for chunk in chunks.gather(g, whole):
            if gradient is not None:
                here = _wide(_matrices(whole)[chunk])
                _into(_matrices(gradient)[chunk], products.input_gradient, here, factor)
    if out is not None:
        products.weight_gradient(_wide(whole), _wide(x), out)
    return (gradient,)


# --- chunks on their way ------------------------------------------------------------------------


class _Chunks:
    """Parts of a batch that travel in the background, one after the other.

    Arrays are of (..., positions, width). None travels any more when the block is left, by an
    error too.
    """

    def __init__(self, axis: Axis, counts: Sequence[int]) -> None:
        self.cut = Shards(axis, 1, tuple(counts))  # of what `_matrices` gives
        self._on_way: deque[tuple[Request, Callable[[], None]]] = deque()

    def __enter__(self) -> _Chunks:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            for request, _then in self._on_way:
                with suppress(Exception):  # the first error counts
                    request.wait()

    def of(self, matrices: Array) -> list[slice]:
        """The chunks: the same on all ranks, and one at least."""
        batch = len(matrices)
        return [slice(*part) for part in blocks(batch, max(1, min(batch, CHUNKS)))]

    def gather(self, x: Array, whole: Array) -> Iterator[slice]:
        """Bring the positions of all ranks into `whole`, chunk by chunk.

        A chunk is there when it is given, and the next one on its way.
        """
        x, whole = _matrices(x), _matrices(whole)
        chunks = self.of(x)
        for chunk, before in zip([*chunks, None], [None, *chunks], strict=True):
            if chunk is not None:
                own, room = x[chunk], self.cut.room(whole[chunk])
                counts = self.cut.elements(own.shape)
                request = self.cut.axis.iallgather(own.reshape(-1), out=room, counts=counts)
                self._on_way.append((request, partial(self.cut.join, room, whole[chunk])))
            if before is not None:
                self._finish(but=0 if chunk is None else 1)
                yield before

    def scatter(self, part: Array, out: Array, chunk: slice) -> None:
        """Begin to sum a chunk over the ranks, each its positions, into that chunk of `out`."""
        own, flat = _matrices(out)[chunk].reshape(-1), self.cut.in_order(part)
        counts = self.cut.elements(part.shape)
        request = self.cut.axis.ireduce_scatter(flat, out=own, counts=counts)
        self._on_way.append((request, _nothing))
        self._finish(but=1)

    def _finish(self, but: int = 0) -> None:
        """Wait for all but the last of what is on its way."""
        while len(self._on_way) > but:
            request, then = self._on_way.popleft()
            request.wait()
            then()


def _nothing() -> None:
    """What is left to do when a sum is there."""


# --- arrays -------------------------------------------------------------------------------------


def _matrices(x: Array) -> Array:
    """x (..., positions, width) as (batch, positions, width), in one piece."""
    return contiguous(x).reshape(prod(x.shape[:-2]), *x.shape[-2:])


def _wide(x: Array) -> Array:
    """x as it can be multiplied: most 16-bit floats in float32."""
    return x if kernels.multiplies(x.dtype) else widened(x)


def _into(out: Array, product: Callable[..., None], *factors: Array) -> None:
    """Put a product into `out`, rounded if that has 16 bits and its factors have not."""
    if factors[0].dtype == out.dtype:
        product(*factors, out)
    else:
        result = new(out.shape, factors[0].dtype, out)
        product(*factors, result)
        narrowed(result, out.dtype, out)
