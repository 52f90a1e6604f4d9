"""Attention by cuDNN, of 16 bits and without dropout, whose masks are ours.

Its "stats" are the logarithms of sums of exponentials that our kernels keep too, so that either can
go backward from the other's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpcml.backend import Array, is_half
from hpcml.kernels import is_repeatable
from hpcml.kernels.cuda.cudnn.library import left, run
from hpcml.kernels.cuda.launch import aligned

_NAME = "attention"
_STEP = 64
"""Positions are a multiple of this: who makes text longer by one token at a time would otherwise
have a plan made for each length, which takes longer than the attention."""


def attention(
    q: Array, k: Array, v: Array, scale: float, causal: bool, threshold: int, out: Array, lse: Array
) -> bool:
    """`attention` with no mask of dropout if `threshold` is 0."""
    if not q.size:
        return False
    if reason := _refused(q, k, threshold, q, k, v, out) or _loose(lse):
        return left(_NAME, reason)
    sums = lse.reshape(*lse.shape, 1)
    return run(_NAME, sdpa, (q, k, v), (out, sums), float(scale), bool(causal))


def attention_backward(
    q: Array, k: Array, v: Array, out: Array, lse: Array, g: Array, scale: float, causal: bool,
    threshold: int, more: bool, dq: Array, dk: Array, dv: Array,
) -> bool:  # fmt: skip
    """`attention_backward`, where nothing is to be added to (`more`)."""
    if not q.size:
        return False
    reason = _refused(q, k, threshold, q, k, v, out, g, dq, dk, dv) or _loose(lse)
    if reason or more:
        return left(_NAME, reason or "gradients are added to others")
    inputs = q, k, v, out, g, lse.reshape(*lse.shape, 1)
    how = float(scale), bool(causal), is_repeatable()
    return run(_NAME, sdpa_backward, inputs, (dq, dk, dv), *how)


def _refused(q: Array, k: Array, threshold: int, *arrays: Array) -> str:
    """Why this is not for cuDNN, or nothing."""
    if not is_half(q.dtype):
        return f"{q.dtype.name}, not 16 bits"
    if threshold:
        return "dropout draws masks of its own"
    for count in q.shape[2], k.shape[2]:
        if count % _STEP:
            return f"{count} positions, no multiple of {_STEP}"
    if not aligned(*arrays) or any(s % 16 for x in arrays for s in x.strides[:3]):
        return "arrays that are not aligned to 16 bytes"
    return ""


def _loose(lse: Array) -> str:
    return "" if lse.flags.c_contiguous else "sums that are part of a larger array"


def sdpa(graph: Any, tensors: Sequence[Any], scale: float, causal: bool) -> Sequence[Any]:
    """Compose the graph of attention; its results are the output and the sums."""
    q, k, v = tensors
    result: Sequence[Any] = graph.sdpa(
        q=q, k=k, v=v, generate_stats=True, attn_scale=scale, use_causal_mask=causal
    )
    return result


def sdpa_backward(
    graph: Any, tensors: Sequence[Any], scale: float, causal: bool, repeatable: bool
) -> Sequence[Any]:
    """Compose the graph of its gradients.

    repeatable: sums in one order, in memory that grows with the square of the positions.
    """
    q, k, v, out, g, stats = tensors
    result: Sequence[Any] = graph.sdpa_backward(
        q=q, k=k, v=v, o=out, dO=g, stats=stats, attn_scale=scale, use_causal_mask=causal,
        use_deterministic_algorithm=repeatable,
    )  # fmt: skip
    return result
