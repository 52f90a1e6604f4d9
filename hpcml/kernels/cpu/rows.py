"""Kernels over the rows of a matrix: layer norm, softmax cross-entropy, embedding gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hpcml.kernels.cpu.functions import exp, row_dot, row_max, row_sum
from hpcml.kernels.cpu.team import columns, divided, rows


@divided("void(R[:, ::1], R[::1], R[::1], T, T[:, ::1], T[::1], T[::1])", rows)
def layer_norm(
    x: Any, weight: Any, bias: Any, eps: Any, out: Any, mean: Any, inverse: Any,
    low: int, high: int,
) -> None:  # fmt: skip
    """out = (x - mean) * inverse * weight + bias for each row; inverse = 1 / sqrt(var + eps).

    x, out (R, C); weight, bias (C) or empty for none; mean, inverse (R) are kept for backward.
    """
    n = x.shape[1]
    one = x.dtype.type(1)
    count = x.dtype.type(n)
    centred = np.empty(n, x.dtype)
    for r in range(low, high):
        row, y = x[r], out[r]
        mu = row_sum(row, 0, n) / count
        for j in range(n):
            centred[j] = row[j] - mu
        rstd = one / np.sqrt(row_dot(centred, centred, n) / count + eps)
        mean[r], inverse[r] = mu, rstd
        if weight.size == 0:
            for j in range(n):
                y[j] = centred[j] * rstd
        else:
            for j in range(n):
                y[j] = centred[j] * rstd * weight[j]
        if bias.size > 0:
            for j in range(n):
                y[j] += bias[j]


@divided("void(R[:, ::1], R[:, ::1], R[::1], R[::1], R[::1], R[:, ::1], T[:, ::1])", rows)
def layer_norm_backward(
    g: Any, x: Any, weight: Any, mean: Any, inverse: Any, pending: Any, out: Any,
    low: int, high: int,
) -> None:  # fmt: skip
    """out = pending + inverse * (gw - mean(gw) - n mean(gw n)); n = normalised x, gw = g weight.

    `pending` (R, C), or no rows for none, is the gradient that x has got from elsewhere: the
    residual branch. Adding it here saves a pass over memory.
    """
    n = x.shape[1]
    count = x.dtype.type(n)
    gw, normal = np.empty(n, x.dtype), np.empty(n, x.dtype)
    for r in range(low, high):
        row, gradient, y, mu, rstd = x[r], g[r], out[r], mean[r], inverse[r]
        for j in range(n):
            normal[j] = (row[j] - mu) * rstd
        if weight.size == 0:
            for j in range(n):
                gw[j] = gradient[j]
        else:
            for j in range(n):
                gw[j] = gradient[j] * weight[j]
        a = row_sum(gw, 0, n) / count
        b = row_dot(gw, normal, n) / count
        if pending.shape[0] == 0:
            for j in range(n):
                y[j] = rstd * (gw[j] - a - normal[j] * b)
        else:
            base = pending[r]
            for j in range(n):
                y[j] = base[j] + rstd * (gw[j] - a - normal[j] * b)


@divided("void(R[:, ::1], R[:, ::1], R[::1], R[::1], T[::1])", columns, ranges=1)
def layer_norm_weight_gradient(
    g: Any, x: Any, mean: Any, inverse: Any, out: Any, low: int, high: int
) -> None:
    """out[j] = sum over rows, in order, of g * (x - mean) * inverse."""
    total = out[low:high]
    total[:] = out.dtype.type(0)
    for r in range(x.shape[0]):
        row, gradient, mu, rstd = x[r, low:high], g[r, low:high], mean[r], inverse[r]
        for j in range(row.size):
            total[j] += gradient[j] * ((row[j] - mu) * rstd)


@divided("void(R[:, ::1], I[::1], int64, T[::1], T[::1])", rows)
def cross_entropy(
    logits: Any, target: Any, ignore: int, loss: Any, lse: Any, low: int, high: int
) -> None:
    """loss[r] = lse[r] - logits[r, target[r]], lse = log sum exp; 0 where target is `ignore`."""
    n = logits.shape[1]
    scratch = np.empty(n, logits.dtype)
    for r in range(low, high):
        row = logits[r]
        most = row_max(row, 0, n)
        for j in range(n):
            scratch[j] = exp(row[j] - most)
        rest = math.log(row_sum(scratch, 0, n))
        lse[r] = most + rest
        t = target[r]
        # not lse - logit: of two large numbers, rounded, a small loss would not survive
        loss[r] = logits.dtype.type(0) if t == ignore else (most - row[t]) + rest


@divided("void(R[:, ::1], I[::1], int64, R[::1], R[::1], T[:, ::1])", rows)
def cross_entropy_backward(
    logits: Any, target: Any, ignore: int, lse: Any, g: Any, out: Any, low: int, high: int
) -> None:
    """out[r] = g[r] * (softmax(logits[r]) - onehot(target[r])); 0 where target is `ignore`.

    A target beyond the classes has them on another rank, which subtracts its one there.
    """
    n = logits.shape[1]
    for r in range(low, high):
        row, y, t = logits[r], out[r], target[r]
        scale = logits.dtype.type(0) if t == ignore else g[r]
        shift = lse[r]
        for j in range(n):
            y[j] = scale * exp(row[j] - shift)
        if t != ignore and t < n:
            y[t] -= scale


@divided("void(R[:, ::1], I[::1], T[:, ::1])", columns, ranges=1)
def embedding_backward(g: Any, index: Any, table: Any, low: int, high: int) -> None:
    """table[index[r]] += g[r], row after row."""
    for r in range(g.shape[0]):
        target, gradient = table[index[r], low:high], g[r, low:high]
        for j in range(gradient.size):
            target[j] += gradient[j]
