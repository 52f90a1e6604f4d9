"""The three passes of a convolution by cuDNN: channels last, sums in float32, no TF32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpcml.backend import Array, xp
from hpcml.kernels.cuda.cudnn.library import left, run
from hpcml.kernels.cuda.launch import share

Sizes = tuple[int, ...]
_NAME = "convolution"


def convolve(
    x: Array, weight: Array, start: Array, stride: Sizes, before: Sizes, dilation: Sizes, out: Array
) -> bool:
    """`convolve`: x (N, *S, C), weight (F, C / groups, *K), out (N, *S', F)."""
    if not x.size or not out.size:
        return False
    how = _how(x, weight.shape, out, stride, before, dilation)
    if isinstance(how, str):
        return left(_NAME, how)
    done = run(_NAME, conv_fprop, (_first(x), _filters(weight)), (_first(out),), *how)
    return done and _begun(out, start)


def convolve_input_gradient(
    g: Array, weight: Array, start: Array, stride: Sizes, before: Sizes, dilation: Sizes, out: Array
) -> bool:
    """`convolve_input_gradient`: g (N, *S', F), weight (F, C / groups, *K), out (N, *S, C)."""
    if not out.size or not g.size:
        return False
    how = _how(out, weight.shape, g, stride, before, dilation)
    if isinstance(how, str):
        return left(_NAME, how)
    done = run(_NAME, conv_dgrad, (_first(g), _filters(weight)), (_first(out),), *how)
    return done and _begun(out, start)


def convolve_weight_gradient(
    g: Array, x: Array, stride: Sizes, before: Sizes, dilation: Sizes, out: Array
) -> bool:
    """`convolve_weight_gradient`: g (N, *S', F), x (N, *S, C), out (F, C / groups, *K)."""
    if not x.size or not g.size:
        return False
    how = _how(x, out.shape, g, stride, before, dilation)
    if isinstance(how, str):
        return left(_NAME, how)
    made = share((out.shape[0], *out.shape[2:], out.shape[1]), out, out.dtype)
    if not run(_NAME, conv_wgrad, (_first(g), _first(x)), (_first(made),), *how):
        return False
    out[...] = made.transpose(0, made.ndim - 1, *range(1, made.ndim - 1))
    return True


def _begun(out: Array, start: Array) -> bool:
    if start.size:
        out += start
    return True


def _first(x: Array) -> Array:
    """(N, *S, C) as cuDNN has it, (N, C, *S) with two spatial dimensions at least: a view."""
    if x.ndim == 3:
        x = x.reshape(len(x), 1, *x.shape[1:])
    return x.transpose(0, x.ndim - 1, *range(1, x.ndim - 1))


def _filters(weight: Array) -> Array:
    """Weights (F, C / groups, *K) as cuDNN has them, in a copy whose channels lie last."""
    last = weight.transpose(0, *range(2, weight.ndim), 1)
    return _first(xp(weight).ascontiguousarray(last))


def _how(
    image: Array, weight: Sizes, result: Array, stride: Sizes, before: Sizes, dilation: Sizes
) -> tuple[Sizes, Sizes, Sizes, Sizes] | str:
    """Padding before and after, stride and dilation for cuDNN, or why that is not for it."""
    if image.dtype.name == "float64":
        return "float64"
    after = []
    every = zip(image.shape[1:-1], result.shape[1:-1], weight[2:], stride, before, dilation,
                strict=True)  # fmt: skip
    for size, count, kernel, step, pad, apart in every:
        extent = (kernel - 1) * apart + 1
        least = max((count - 1) * step + extent - size - pad, 0)
        # As much as before, if that makes no window more: engines for that are the most common.
        most = pad if (size + 2 * pad - extent) // step + 1 == count else least
        if pad < 0 or (size + pad + most - extent) // step + 1 != count:
            return "windows that end before the image does"
        after.append(most)
    zero, one = ((0,), (1,)) if image.ndim == 3 else ((), ())  # for what `_first` puts in front
    return (*zero, *before), (*zero, *after), (*one, *stride), (*one, *dilation)


def _options(before: Sizes, after: Sizes, stride: Sizes, dilation: Sizes) -> dict[str, Any]:
    return {"pre_padding": list(before), "post_padding": list(after), "stride": list(stride),
            "dilation": list(dilation)}  # fmt: skip


def conv_fprop(graph: Any, tensors: Sequence[Any], *how: Sizes) -> Sequence[Any]:
    """Compose the graph of a convolution."""
    x, weight = tensors
    return [graph.conv_fprop(image=x, weight=weight, **_options(*how))]


def conv_dgrad(graph: Any, tensors: Sequence[Any], *how: Sizes) -> Sequence[Any]:
    """Compose the graph of the gradient of its image."""
    g, weight = tensors
    return [graph.conv_dgrad(loss=g, filter=weight, **_options(*how))]


def conv_wgrad(graph: Any, tensors: Sequence[Any], *how: Sizes) -> Sequence[Any]:
    """Compose the graph of the gradient of its filters."""
    g, x = tensors
    return [graph.conv_wgrad(image=x, loss=g, **_options(*how))]
