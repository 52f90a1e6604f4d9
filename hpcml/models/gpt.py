"""GPT: a decoder-only Transformer (Radford et al. 2019), with nanoGPT's names and first values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from hpcml.autograd import Tensor
from hpcml.nn import (
    GELU,
    Constant,
    CrossEntropyLoss,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    Module,
    ModuleList,
    Normal,
    PackedAttention,
)


class SelfAttention(Module):
    """Causal multi-head self-attention: (B, T, width) -> (B, T, width)."""

    def __init__(self, width: int, heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            fitting = [n for n in range(1, 65) if width % n == 0]
            raise ValueError(f"heads={heads} must divide width={width}: take one of {fitting}")
        self.c_attn = Linear(width, 3 * width, bias)
        self.attention = PackedAttention(heads, dropout, is_causal=True)
        self.c_proj = Linear(width, width, bias)
        self.resid_dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        y = self.c_proj(self.attention(self.c_attn(x)))
        return self.resid_dropout(y)  # type: ignore[no-any-return]


class MLP(Module):
    """Two linear layers with GELU between, four times as wide inside."""

    def __init__(self, width: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.c_fc = Linear(width, 4 * width, bias)
        self.gelu = GELU()
        self.c_proj = Linear(4 * width, width, bias)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))  # type: ignore[no-any-return]


class Block(Module):
    """Attention and MLP, each behind a layer norm and beside a residual connection."""

    def __init__(self, width: int, heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width, bias=bias)
        self.attn = SelfAttention(width, heads, dropout, bias)
        self.ln_2 = LayerNorm(width, bias=bias)
        self.mlp = MLP(width, dropout, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Transformer(Module):
    """Embeddings, blocks and the last layer norm: tokens (B, T) -> (B, T, width)."""

    def __init__(
        self, vocab_size: int, length: int, layers: int, heads: int, width: int, dropout: float,
        bias: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sequence_length = length
        self.wte = Embedding(vocab_size, width)
        self.wpe = Embedding(length, width)
        self.drop = Dropout(dropout)
        self.h = ModuleList(Block(width, heads, dropout, bias) for _ in range(layers))
        self.ln_f = LayerNorm(width, bias=bias)

    def embed(self, tokens: Any) -> Tensor:
        """Tokens (B, T) -> (B, T, width), before the blocks."""
        length = tokens.shape[1]
        if length > self.sequence_length:
            raise ValueError(f"GPT: {length} tokens, but sequence_length={self.sequence_length}")
        x = self.wte(tokens) + self.wpe(np.arange(length))
        return self.drop(x)  # type: ignore[no-any-return]

    def forward(self, tokens: Any) -> Tensor:
        """Tokens (B, T) -> (B, T, width)."""
        x = self.embed(tokens)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)  # type: ignore[no-any-return]


class GPT(Module):
    """Language model: tokens (B, T) of integers below vocab_size -> logits (B, T, vocab_size).

    T is at most `sequence_length`. Weights are normal with deviation 0.02, those of the projections
    that end a residual branch 0.02 / sqrt(2 layers), biases zero (GPT-2). A nanoGPT state dict of
    the same sizes loads as it is.
    """

    splits: ClassVar = {
        "transformer.wte": "vocab",
        "transformer.wpe": "positions",
        "*.attn.c_attn": "qkv",
        "*.attn.attention": "heads",
        "*.mlp.c_fc": "column",
        "*.c_proj": "row",
        "lm_head": "output",
    }
    """What tensor parallelism makes of the layers; see `hpcml.parallel.tensor.divide`."""
    chain = ("transformer.embed", "transformer.h.*", "transformer.ln_f", "lm_head")
    """What forward calls one after the other: a pipeline may be cut between any two."""

    def __init__(
        self,
        vocab_size: int,
        sequence_length: int,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        dropout: float = 0.0,
        bias: bool = True,
        tie_embeddings: bool = True,
    ) -> None:
        super().__init__()
        for name, size in (("layers", layers), ("heads", heads), ("width", width)):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must be at least 0 and below 1")
        self.transformer = Transformer(
            vocab_size, sequence_length, layers, heads, width, dropout, bias
        )
        self.lm_head = Linear(width, vocab_size, bias=False)
        if tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.init = Normal(0.02 / math.sqrt(2 * layers))
            elif name.endswith(("c_attn.weight", "c_fc.weight", "wte.weight", "wpe.weight",
                                "lm_head.weight")):  # fmt: skip
                parameter.init = Normal(0.02)
            elif name.endswith((".c_attn.bias", ".c_fc.bias", ".c_proj.bias")):
                parameter.init = Constant(0.0)

    def forward(self, tokens: Any) -> Tensor:
        """Tokens (B, T) -> logits (B, T, vocab_size)."""
        return self.lm_head(self.transformer(tokens))  # type: ignore[no-any-return]

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Copy values in by name, without nanoGPT's stored causal masks and compiler prefixes."""
        masks = (".attn.bias", ".attn.masked_bias")
        prefix = "_orig_mod."
        plain = {name.removeprefix(prefix): value for name, value in state.items()}
        kept = {name: value for name, value in plain.items() if not name.endswith(masks)}
        super().load_state_dict(kept, strict)


class NextTokenLoss(Module):
    """Mean cross-entropy of logits (B, T, vocab) against the tokens that follow (B, T)."""

    takes_divided_classes = True

    def __init__(self) -> None:
        super().__init__()
        self.cross_entropy = CrossEntropyLoss()

    def forward(self, logits: Tensor, target: Any) -> Tensor:
        """Logits (B, T, vocab) and integers (B, T) -> one number."""
        rows = logits.reshape(-1, logits.shape[-1])
        return self.cross_entropy(rows, target.reshape(-1))  # type: ignore[no-any-return]
