"""Multi-head attention (Vaswani et al. 2017, section 3.2.2)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hpcml.autograd import Tensor
from hpcml.autograd.operators import array_of
from hpcml.backend import xp
from hpcml.nn import functional as F
from hpcml.nn.layers import Linear
from hpcml.nn.module import Module
from hpcml.nn.parameter import Constant, Parameter, Uniform


class PackedAttention(Module):
    """Self-attention of projections [q | k | v] side by side: (B, T, 3 E) -> (B, T, E).

    What lies between the projections, without parameters of its own: the part of an attention that
    tensor parallelism divides by heads and context parallelism by positions.
    """

    def __init__(self, num_heads: int, dropout: float = 0.0, is_causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.dropout, self.is_causal = num_heads, dropout, is_causal

    def forward(self, qkv: Tensor) -> Tensor:
        """(B, T, 3 E) -> (B, T, E)."""
        p = self.dropout if self.training else 0.0
        return F.packed_self_attention(qkv, self.num_heads, p, self.is_causal, self.name)

    def extra_repr(self) -> str:
        """Heads, dropout, and whether causal."""
        return f"{self.num_heads}, dropout={self.dropout}, is_causal={self.is_causal}"


class MultiheadAttention(Module):
    """Attention of `num_heads` heads with input and output projections.

    Names and shapes of the parameters are PyTorch's: in_proj_weight (3 E, E), in_proj_bias (3 E),
    out_proj. Sequences come first, (T, B, E), unless `batch_first`, (B, T, E).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"MultiheadAttention: num_heads={num_heads} must divide embed_dim={embed_dim}"
            )
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.dropout, self.batch_first = dropout, batch_first
        xavier = Uniform(math.sqrt(6 / (4 * embed_dim)))  # Glorot and Bengio 2010, of (3 E, E)
        self.in_proj_weight = Parameter(shape=(3 * embed_dim, embed_dim), init=xavier)
        self.in_proj_bias = Parameter(shape=(3 * embed_dim,), init=Constant()) if bias else None
        self.out_proj = Linear(embed_dim, embed_dim, bias)
        if self.out_proj.bias is not None:
            self.out_proj.bias.init = Constant()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output like query, weights (B, T, S) or (B, H, T, S), None unless asked for).

        key_padding_mask (B, S) and attn_mask (T, S) or (B * H, T, S): True shuts out, numbers are
        added. `is_causal` masks keys after the query. Without weights or masks the probabilities
        are never stored, so ask for the weights only to look at them.
        """
        if not query.ndim == key.ndim == value.ndim == 3:
            raise ValueError(
                f"MultiheadAttention: query {query.shape}, key {key.shape}, value {value.shape}: "
                "each needs three dimensions, batch, length and width"
            )
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._project(query, key, value)
        mask = self._mask(q, k, key_padding_mask, attn_mask, is_causal and need_weights)
        p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = F.attention_weights(q, k, mask)
            out = F.dropout(weights, p, p > 0, name=self.name) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            causal = is_causal and mask is None
            if is_causal and not causal:
                mask = self._mask(q, k, key_padding_mask, attn_mask, True)
            out = F.scaled_dot_product_attention(q, k, v, mask, p, causal, name=self.name)
        batch, _, length, _ = out.shape
        out = self.out_proj(out.transpose(1, 2).reshape(batch, length, self.embed_dim))
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values by heads, (B, H, length, D)."""
        weights = self.in_proj_weight.split(self.embed_dim)
        biases: Any = (None,) * 3
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.split(self.embed_dim)
        return [
            F.linear(x, w, b)
            .reshape(x.shape[0], x.shape[1], self.num_heads, self.embed_dim // self.num_heads)
            .transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        ]

    def _mask(self, q: Tensor, k: Tensor, padding: Any, attn: Any, causal: bool) -> Any:
        """Everything that is masked, as numbers to add, broadcastable to (B, H, T, S), or None."""
        (batch, heads, length, _), keys = q.shape, k.shape[2]
        parts = []
        if padding is not None:
            parts.append(_additive(padding, q.dtype).reshape(batch, 1, 1, keys))
        if attn is not None:
            mask = _additive(attn, q.dtype)
            shape = (batch, heads, length, keys) if mask.ndim == 3 else (1, 1, length, keys)
            parts.append(mask.reshape(shape))
        if causal:
            m = xp(q.data)
            later = m.triu(m.ones((length, keys), bool), 1)
            parts.append(_additive(later, q.dtype).reshape(1, 1, length, keys))
        return sum(parts[1:], parts[0]) if parts else None


def _additive(mask: Any, dtype: Any) -> Any:
    mask = array_of(mask)
    if mask.dtype == bool:
        return xp(mask).where(mask, -np.inf, 0.0).astype(dtype)
    return mask.astype(dtype, copy=False)
