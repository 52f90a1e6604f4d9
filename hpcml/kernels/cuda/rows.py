"""Kernels over the rows of a matrix: layer norm, softmax cross-entropy, embedding gradient.

Means, logarithms of sums and losses are of the type of sums: float32 beside 16-bit elements.
"""

from __future__ import annotations

import numpy as np

from hpcml.backend import Array, xp
from hpcml.kernels.cuda.launch import WARP, launch, sum_type

_SOURCE = "rows.cu"
_WARPS = 8  # of a block: rows at once


def layer_norm(
    x: Array, weight: Array, bias: Array, eps: float, out: Array, mean: Array, inverse: Array
) -> None:
    """out = (x - mean) * inverse * weight + bias for each row; empty weight or bias for none."""
    rows, n = x.shape
    launch(
        _SOURCE, "layer_norm", x, (-(-rows // _WARPS),), (_WARPS * WARP,),
        x, weight, bias, np.int64(rows), np.int64(n), np.bool_(weight.size), np.bool_(bias.size),
        sum_type(x).type(eps), out, mean, inverse,
    )  # fmt: skip


def layer_norm_backward(
    g: Array, x: Array, weight: Array, mean: Array, inverse: Array, pending: Array, out: Array
) -> None:
    """out = pending + inverse * (gw - mean(gw) - n mean(gw n)), n the normalised row."""
    rows, n = x.shape
    launch(
        _SOURCE, "layer_norm_backward", x, (-(-rows // _WARPS),), (_WARPS * WARP,),
        g, x, weight, mean, inverse, pending, np.int64(rows), np.int64(n), np.bool_(weight.size),
        np.bool_(pending.shape[0]), out,
    )  # fmt: skip


def _threads(n: int) -> int:
    """Threads for a row of n elements: whole warps, at most 256."""
    return min(-(-n // WARP) * WARP, 256)


def cross_entropy(logits: Array, target: Array, ignore: int, loss: Array, lse: Array) -> None:
    """loss[r] = lse[r] - logits[r, target[r]], lse = log sum exp; 0 where target is `ignore`."""
    rows, n = logits.shape
    launch(
        _SOURCE, "cross_entropy", logits, (rows,), (_threads(n),),
        logits, target, np.int64(n), np.int64(ignore), loss, lse,
    )  # fmt: skip


def cross_entropy_backward(
    logits: Array, target: Array, ignore: int, lse: Array, g: Array, out: Array
) -> None:
    """out[r] = g[r] * (softmax(logits[r]) - onehot(target[r])); 0 where target is `ignore`."""
    rows, n = logits.shape
    launch(
        _SOURCE, "cross_entropy_backward", logits, (rows,), (_threads(n),),
        logits, target, np.int64(n), np.int64(ignore), lse, g, out,
    )  # fmt: skip


def embedding_backward(g: Array, index: Array, table: Array) -> None:
    """table[index[r]] += g[r], row after row: the same bits every time.

    Nothing of rows that the table has not.
    """
    rows, n = g.shape
    order = xp(index).argsort(index, kind="stable")
    launch(
        _SOURCE, "embedding_backward", g, (rows,), (min(-(-n // WARP) * WARP, 128),),
        g, index, order, np.int64(rows), np.int64(n), np.int64(len(table)), table,
    )  # fmt: skip
