"""Models of a user's own that the tests of `hpcml check` run, healthy and with mistakes."""

from __future__ import annotations

from typing import Any, ClassVar

from hpcml import nn
from hpcml.autograd import Tensor
from hpcml.comm import Mesh


class ByHeads(nn.Module):
    """A norm of each head: (B, T, width) -> (B, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        b, _, width = x.shape
        return self.norm(x.reshape(b, -1, self.heads, width // self.heads)).reshape(b, -1, width)


class Own(nn.Module):
    """Tokens to logits through two divided layers with heads between."""

    splits: ClassVar = {
        "embed": "vocab",
        "up": "column",
        "inner": "heads",
        "inner.norm": "replicated",
        "down": "row",
        "head": "output",
    }

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, 10)
        self.up, self.inner, self.down = nn.Linear(10, 36), ByHeads(36, 12), nn.Linear(36, 10)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(10, vocab_size)

    def forward(self, tokens: Any) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.drop(self.down(self.inner(self.up(x)))))


class Forgetful(Own):
    """Whose author did not say that ranks use the norm for different heads."""

    splits: ClassVar = {name: how for name, how in Own.splits.items() if name != "inner.norm"}


class ByRank(Own):
    """With first values of one layer that depend on the rank."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        rank = Mesh().rank

        def init(out: Any, key: int, start: int) -> None:
            nn.Normal(0.1)(out, key + rank, start)

        self.down.weight.init = init


class Unstable(Own):
    """Another one each time it is made."""

    made = 0

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        Unstable.made += 1
        self.down.bias.init = nn.Constant(Unstable.made)
