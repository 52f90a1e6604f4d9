"""Attention of this rank's heads, over the positions of all context-parallel ranks."""

from __future__ import annotations

from hpcml.autograd import Tensor
from hpcml.comm import Axis
from hpcml.errors import UserError
from hpcml.nn import Module, PackedAttention
from hpcml.nn import functional as F
from hpcml.parallel.context import ring_attention
from hpcml.parallel.tensor.positions import Positions


class ParallelAttention(Module):
    """`nn.PackedAttention` of a rank's heads: (B, T, 3 E / tp) -> (B, T, E / tp), `S(-1)`.

    Heads need nothing of each other (Shoeybi et al. 2019, section 3). Where context parallelism
    divides positions, T are those of this rank (`ring_attention`).
    """

    def __init__(self, attention: PackedAttention, axis: Axis, positions: Positions) -> None:
        super().__init__()
        self.heads, self.first = share_heads(attention.num_heads, axis)
        self.num_heads = attention.num_heads
        self.dropout, self.is_causal = attention.dropout, attention.is_causal
        self.positions = positions

    def forward(self, qkv: Tensor) -> Tensor:
        """(B, T, 3 E / tp) -> (B, T, E / tp)."""
        self._enter(qkv.shape[-1])
        p = self.dropout if self.training else 0.0
        if self.positions.cp.size == 1:
            return F.packed_self_attention(
                qkv, self.heads, p, self.is_causal, self.name, first_head=self.first
            )
        return ring_attention(
            qkv, self.heads, self.positions.cp, self.positions.length, dropout_p=p,
            is_causal=self.is_causal, name=self.name, first_head=self.first,
        )  # fmt: skip

    def _enter(self, width: int) -> None:
        """Check that these are queries, keys and values of this rank's heads, and say so."""
        share = width // 3
        whole = share // max(self.heads, 1) * self.num_heads
        first = self.first * (share // max(self.heads, 1))
        packs = tuple((pack * whole + first, pack * whole + first + share) for pack in range(3))
        if self.heads < self.num_heads and self.positions.features != (3 * whole, packs):
            raise UserError(
                f'{self.name}, "heads": its {width} features are not queries, keys and values of '
                f'{self.heads} of {self.num_heads} heads: declare the layer before it "qkv"'
            )
        self.positions.features = whole, ((first, first + share),)


def share_heads(heads: int, axis: Axis) -> tuple[int, int]:
    """How many heads this rank has, and which is its first; all ranks must have as many."""
    if heads % axis.size:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise UserError(
            f"heads={heads} cannot be divided among {axis.size} ranks along {axis.name}: set "
            f"mesh.{axis.name} to one of {', '.join(map(str, fitting))}, or a number of heads that "
            f"{axis.size} divides"
        )
    mine = heads // axis.size
    return mine, axis.rank * mine
