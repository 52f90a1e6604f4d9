"""What the stand-in's cuDNN computes: attention and convolutions on arrays of NumPy, in float32.

x (N, C, *S), weight w (F, C / groups, *K), y (N, F, *S'); `how` has padding before and after,
strides and dilations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def attention(
    q: Array, k: Array, v: Array, *, scale: float, causal: bool, **_: Any
) -> tuple[Array, ...]:
    """softmax(scale q k^T) v, and the logarithms of the sums."""
    scores = _scores(q, k, scale, causal)
    most = scores.max(-1, keepdims=True)
    stats = most + np.log(np.exp(scores - most).sum(-1, keepdims=True))
    return np.exp(scores - stats) @ v, stats


def attention_gradients(
    q: Array, k: Array, v: Array, out: Array, g: Array, stats: Array, *, scale: float, causal: bool
) -> tuple[Array, ...]:
    """Of q, k and v, for the gradient g of `out`."""
    p = np.exp(_scores(q, k, scale, causal) - stats)
    ds = p * (g @ v.swapaxes(2, 3) - (g * out).sum(-1, keepdims=True)) * scale
    return ds @ k, ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ g


def _scores(q: Array, k: Array, scale: float, causal: bool) -> Array:
    scores = scale * (q @ k.swapaxes(2, 3))
    if causal:
        scores[..., np.triu(np.ones(scores.shape[2:], bool), 1)] = -np.inf
    return scores


def convolution(x: Array, w: Array, y: Array, how: Any) -> None:
    """y = the cross-correlation of x with the filters w."""
    y[...] = 0
    groups = x.shape[1] // w.shape[1]
    filters, made = _grouped(w, groups, 0), _grouped(y, groups, 1)
    for tap, window in _windows(_padded(x, how), w, y, how):
        made += np.einsum("ngc...,gfc->ngf...", window, filters[(..., *tap)])


def image_gradient(x: Array, w: Array, y: Array, how: Any) -> None:
    """x = the adjoint of it, at y."""
    x[...] = 0
    groups = x.shape[1] // w.shape[1]
    padded, filters, loss = _padded(x, how), _grouped(w, groups, 0), _grouped(y, groups, 1)
    for tap, window in _windows(padded, w, y, how):
        window += np.einsum("ngf...,gfc->ngc...", loss, filters[(..., *tap)])
    places = zip(how["pre_padding"], x.shape[2:], strict=True)
    x[...] = padded[(..., *[slice(first, first + n) for first, n in places])]


def weight_gradient(x: Array, w: Array, y: Array, how: Any) -> None:
    """w = the adjoint with respect to the filters, at y."""
    groups = x.shape[1] // w.shape[1]
    made, loss = _grouped(w, groups, 0), _grouped(y, groups, 1)
    for tap, window in _windows(_padded(x, how), w, y, how):
        flat = [array.reshape(*array.shape[:3], -1) for array in (loss, window)]
        made[(..., *tap)] = np.einsum("ngfp,ngcp->gfc", *flat)


def _padded(x: Array, how: Any) -> Array:
    pads = zip(how["pre_padding"], how["post_padding"], strict=True)
    return np.pad(np.ascontiguousarray(x), [(0, 0), (0, 0), *pads])


def _grouped(x: Array, groups: int, dim: int) -> Array:
    """x with its filters, which `dim` has, by group: a view."""
    return x.reshape(*x.shape[:dim], groups, -1, *x.shape[dim + 1 :])


def _windows(padded: Array, w: Array, y: Array, how: Any) -> Iterator[tuple[Any, Array]]:
    """Each tap of a filter and what it sees of the image, (N, groups, C / groups, *S'): a view."""
    image = padded.reshape(len(padded), -1, w.shape[1], *padded.shape[2:])
    for tap in np.ndindex(*w.shape[2:]):
        every = zip(tap, how["dilation"], how["stride"], y.shape[2:], strict=True)
        where = [slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, s, n in every]
        yield tap, image[(..., *where)]
