"""Functions of tensors, under PyTorch's names and argument orders."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hpcml.autograd import Tensor
from hpcml.autograd.operators import array_of
from hpcml.autograd.ops import attention, fused, norm, pointwise, shape
from hpcml.autograd.ops import linear as products
from hpcml.errors import UserError
from hpcml.nn.images import (
    batch_norm,
    check_padding,
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from hpcml.nn.part import Part, Range
from hpcml.nn.pools import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    interpolate,
    max_pool1d,
    max_pool2d,
    max_pool3d,
)

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "attention_weights",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "interpolate",
    "layer_norm",
    "linear",
    "log_softmax",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "mse_loss",
    "packed_self_attention",
    "pad",
    "relu",
    "scaled_dot_product_attention",
    "sigmoid",
    "softmax",
    "tanh",
]


def linear(input: Any, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input weight^T + bias: (..., in), (out, in), (out) -> (..., out)."""
    return products.linear(input, weight, bias)


def relu(input: Tensor) -> Tensor:
    """max(input, 0)."""
    return pointwise.relu(input)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """input Phi(input), or with approximate="tanh" its tanh form (Hendrycks, Gimpel 2016)."""
    return fused.gelu(input, approximate=approximate)


def tanh(input: Tensor) -> Tensor:
    """Hyperbolic tangent."""
    return pointwise.tanh(input)


def sigmoid(input: Tensor) -> Tensor:
    """1 / (1 + exp(-input))."""
    return pointwise.sigmoid(input)


def softmax(input: Tensor, dim: int) -> Tensor:
    """exp(input), normalised to sum 1 along `dim`."""
    return fused.softmax(input, dim=dim)


def log_softmax(input: Tensor, dim: int) -> Tensor:
    """Logarithm of the softmax along `dim`."""
    return fused.log_softmax(input, dim=dim)


def layer_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...] | list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise over the last dimensions, of sizes `normalized_shape` (Ba et al. 2016)."""
    sizes = tuple(normalized_shape)
    if tuple(input.shape[-len(sizes) :]) != sizes:
        raise ValueError(f"layer_norm({input.shape}): the last sizes must be {sizes}")
    return norm.layer_norm(input, weight, bias, size=math.prod(sizes), eps=eps)


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    name: str = "dropout",
    part: Part | None = None,
) -> Tensor:
    """Zero elements with probability p and scale the rest by 1 / (1 - p); nothing in evaluation.

    Dimension 0 counts samples; a sample's mask depends on its number in the run and on `name`.
    part: which part of a whole tensor `input` is, divided along another dim: its mask is the one
    that the whole has there. Raises ValueError if `input` has not the shape of the part.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p={p} must lie between 0 and 1")
    runs = None if part is None else _runs(part, input.shape)
    if not training or p == 0:
        return input
    if p == 1:
        return input * 0.0
    return fused.dropout(input, p=p, name=name, part=runs)


def _runs(part: Part, shape: tuple[int, ...]) -> tuple[list[Range], int]:
    """Where the elements of a sample of a part lie: (first, count) of neighbours, and a period."""
    whole = part.shape[part.dim]
    within = all(0 <= first <= end <= whole for first, end in part.ranges)
    if part.dim < 1 or part.own != shape or not within:
        raise ValueError(
            f"dropout({shape}): this is not {part}: a part has the shape {part.own} of its ranges, "
            "which lie within the whole, and its dim is not 0, which counts samples"
        )
    inner = math.prod(part.shape[part.dim + 1 :])
    return [(first * inner, (end - first) * inner) for first, end in part.ranges], whole * inner


def embedding(input: Any, weight: Tensor) -> Tensor:
    """weight[input]: integers of any shape -> (..., width)."""
    return fused.embedding(weight, np.asarray(input) if isinstance(input, int) else array_of(input))


def cross_entropy(
    input: Tensor, target: Any, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """-log softmax(input)[target]: input (N, C) or (N, C, d...), target (N) or (N, d...)."""
    target = array_of(target)
    if input.ndim == 2:
        return fused.cross_entropy(input, target, ignore_index=ignore_index, reduction=reduction)
    if input.ndim < 2:
        raise ValueError(f"cross_entropy({input.shape}): needs (N, C) or (N, C, d...)")
    if target.shape != (*input.shape[:1], *input.shape[2:]):
        raise ValueError(
            f"cross_entropy: input {input.shape} needs a target of shape "
            f"{(*input.shape[:1], *input.shape[2:])}, not {target.shape}"
        )
    order = (0, *range(2, input.ndim), 1)
    rows = input.permute(order).reshape(target.size, input.shape[1])
    loss = fused.cross_entropy(
        rows, target.reshape(-1), ignore_index=ignore_index, reduction=reduction
    )
    return loss.reshape(target.shape) if reduction == "none" else loss


def mse_loss(input: Tensor, target: Any, *, reduction: str = "mean") -> Tensor:
    """(input - target)^2; reduction "mean", "sum" or "none". Shapes must be equal."""
    target = target if isinstance(target, Tensor) else array_of(target)
    if np.shape(target) != input.shape:
        raise ValueError(f"mse_loss: input {input.shape}, target {np.shape(target)}: must be equal")
    square: Tensor = (input - target) ** 2
    if reduction == "none":
        return square
    if reduction not in ("mean", "sum"):
        raise ValueError(f'mse_loss: reduction="{reduction}": use "mean", "sum" or "none"')
    total: Tensor = square.mean() if reduction == "mean" else square.sum()
    return total


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    name: str = "attention",
) -> Tensor:
    """softmax(scale query key^T + mask) value; query (B, H, T, D), key and value (B, H, S, D).

    attn_mask broadcasts to (B, H, T, S): booleans (True takes part) or numbers to add. scale is
    1 / sqrt(D) by default. Without a mask the probabilities are never stored.
    """
    if attn_mask is None:
        return attention.attention(
            query, key, value, causal=is_causal, scale=scale, p=dropout_p, name=name
        )
    if is_causal:
        raise ValueError("scaled_dot_product_attention: give either attn_mask or is_causal")
    weights = attention_weights(query, key, attn_mask, scale)
    return dropout(weights, dropout_p, dropout_p > 0, name=name) @ value


def packed_self_attention(
    qkv: Tensor,
    num_heads: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    name: str = "attention",
    *,
    first_head: int = 0,
) -> Tensor:
    """Self-attention of projections [q | k | v] side by side: (B, T, 3 E) -> (B, T, E).

    Reads and writes the packed array directly, without splitting or transposing it. first_head: the
    number of the first of these heads among those of all ranks, which dropout goes by.
    """
    return attention.packed_attention(
        qkv, heads=num_heads, causal=is_causal, p=dropout_p, name=name, head=first_head
    )


def attention_weights(
    query: Tensor, key: Tensor, attn_mask: Any = None, scale: float | None = None
) -> Tensor:
    """softmax(scale query key^T + mask): (B, H, T, S), stored; 0 where a query sees no key."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query @ key.transpose(-2, -1)) * scale
    if attn_mask is None:
        return fused.softmax(scores, dim=-1)
    mask = array_of(attn_mask)
    if mask.dtype == bool:
        shut = ~mask
        scores = scores.masked_fill(shut, -np.inf)
    else:
        shut = mask == -np.inf
        learned = isinstance(attn_mask, Tensor)
        scores = scores + (attn_mask if learned else mask.astype(scores.dtype, copy=False))
    blind = shut.all(-1, keepdims=True)
    if not blind.any():
        return fused.softmax(scores, dim=-1)
    return fused.softmax(scores.masked_fill(blind, 0), dim=-1).masked_fill(blind, 0)


def pad(
    input: Tensor, pad: tuple[int, ...], mode: str = "constant", value: float | None = None
) -> Tensor:
    """Surround: (before, after) of the last dimension, then of the one before, ...

    mode: "constant" (by `value`, 0 by default), "reflect" (the inner elements mirrored),
    "replicate" (the outermost) or "circular" (those of the other side). Raises UserError for what
    an image is too small for.
    """
    pairs = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]
    widths = [(0, 0)] * (input.ndim - len(pairs)) + pairs[::-1]
    if mode not in ("constant", "reflect", "replicate", "circular"):
        raise UserError(f'pad: mode="{mode}": use constant, reflect, replicate or circular')
    if mode != "constant":
        check_padding("pad", mode, input.shape, widths)
    return shape.pad(input, widths=tuple(widths), mode=mode, value=value or 0.0)
