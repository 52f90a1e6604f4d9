"""Context parallelism: a long sequence divided among the ranks of an axis, with ring attention.

Liu, Zaharia, Abbeel 2023, "Ring attention with blockwise transformers for near-infinite context",
section 3. Each rank has some positions of every sample. Only attention looks beyond them: keys and
values go round the ring of ranks, a rank further with each step, while every rank attends with its
queries to those that it has; the results are joined by the logarithms of their sums.

A causal query sees what comes before it, so that later positions are more work. The sequence is
cut into 2 n blocks for n ranks, and rank r has the blocks r and 2 n - 1 - r, a zigzag: all ranks
compute equally much in every step.

    rank 0: 0             7      With the keys of an earlier rank, all queries meet the first block;
    rank 1:   1         6        with those of a later one, the second block of queries meets both.
    rank 2:     2     5          Keys go to the rank before: at rank 0 a second block has met all
    rank 3:       3 4            queries that see it, and goes no further.
"""

from __future__ import annotations

from collections.abc import Iterator

from hpcml import kernels, memory
from hpcml.autograd import Context, Tensor, primitive
from hpcml.autograd.ops.arrays import contiguous, floats
from hpcml.autograd.ops.attention import Plan, plan
from hpcml.autograd.record import empty
from hpcml.backend import Array
from hpcml.comm import Axis, Request
from hpcml.nn import functional as F
from hpcml.nn.part import Range, blocks


def zigzag(length: int, ranks: int) -> list[tuple[Range, Range]]:
    """The two ranges (first, end) of positions that each rank has, in increasing order.

    They are the blocks r and 2 ranks - 1 - r of `length` positions cut into 2 ranks. Where there
    are fewer positions than blocks, ranges are empty, and a rank may have no position at all.
    """
    cut = blocks(length, 2 * ranks)
    return list(zip(cut[:ranks], cut[: ranks - 1 : -1], strict=True))


def ring_attention(
    qkv: Tensor,
    num_heads: int,
    axis: Axis,
    length: int,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = True,
    name: str = "attention",
    first_head: int = 0,
) -> Tensor:
    """Self-attention over `length` positions, which the ranks divide as `zigzag` says.

    qkv (B, T, 3 E): the projections [q | k | v] of this rank's T positions, those of its first
    range before those of its second; the result is (B, T, E). Values, gradients and masks are those
    that `F.packed_self_attention` of all positions has there, with `first_head` as there.

    Forward a rank sends the keys and values, 2 B E values a position, of every rank but the one
    before it; causally, of the ranks before that only those of their first range. Backward it sends
    these again, and gradients of as many values for all `length` positions.
    All ranks call this, and backward, alike. Raises ValueError for a qkv of another shape.
    """
    own = sum(end - first for first, end in zigzag(length, axis.size)[axis.rank])
    if qkv.ndim != 3 or qkv.shape[1] != own or num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"ring_attention({qkv.shape}): rank {axis.rank} of {axis.name}({axis.size}) has {own} "
            f"of {length} positions: give (B, {own}, 3 * heads({num_heads}) * a head size)"
        )
    if axis.size == 1:
        return F.packed_self_attention(
            qkv, num_heads, dropout_p, is_causal, name, first_head=first_head
        )
    return ring(
        qkv, heads=num_heads, axis=axis, length=length, causal=is_causal, p=dropout_p, name=name,
        head=first_head,
    )  # fmt: skip


@primitive
def ring(
    ctx: Context, qkv: Array, *,
    heads: int, axis: Axis, length: int, causal: bool, p: float, name: str, head: int,
) -> Array:  # fmt: skip
    """See `ring_attention`. The adjoint goes round once more; gradients follow keys and values."""
    qkv = floats(qkv)
    batch, own, width = qkv.shape
    out, lse = ctx.empty((batch, own, width // 3), qkv), empty((batch, heads, own), qkv)
    tour = _Tour(axis, length, heads, qkv, causal)
    whole = plan(tour.blocks(qkv, 3)[0], causal, p, name, head=head)
    queries, outs, sums = tour.blocks(qkv, 3), tour.blocks(out, 1), tour.rows(lse)
    kernel = kernels.of(qkv)
    for source, keys in tour.travel(qkv):
        for i, j, here in tour.meetings(source, whole):
            q, (k, v) = queries[i][0], keys[j]
            if source == axis.rank and i == j:  # the first that these queries meet
                kernel.attention(q, k, v, *here, outs[i][0], sums[i])
                continue
            other, total = _buffer(q.shape, qkv), _buffer(q.shape[:3], qkv)
            kernel.attention(q, k, v, *here, other, total)
            kernel.join_attention(outs[i][0], sums[i], other, total)
    ctx.attributes = tour, whole
    ctx.save(qkv, out, lse)
    return out


@ring.adjoint
def ring_qkv(ctx: Context, g: Array) -> Array:
    """A rank adds its part to the gradients of the keys and values that it has, and sends both on.

    Gradients arrive while their part here is computed, and after the last rank come home.
    """
    qkv, out, lse = ctx.saved
    tour, whole = ctx.attributes
    axis = tour.axis
    result = ctx.empty(qkv.shape, qkv)
    result[...] = 0
    queries, targets, sums = tour.blocks(qkv, 3), tour.blocks(result, 3), tour.rows(lse)
    outs, gs = tour.blocks(out, 1), tour.blocks(contiguous(g), 1)
    kernel = kernels.of(qkv)
    parts, arrived = [tour.room(qkv), tour.room(qkv)], tour.room(qkv)
    messages: list[Request] = []
    for step, (source, keys) in enumerate(tour.travel(qkv)):
        part = parts[step % 2][: tour.size(source)]
        part[...] = 0
        gradients = tour.pairs(part, source)
        for i, j, here in tour.meetings(source, whole):
            kernel.attention_backward(
                queries[i][0], *keys[j], outs[i][0], sums[i], gs[i][0], *here, True,
                targets[i][0], *gradients[j],
            )  # fmt: skip
        for message in messages:
            message.wait()
        if step > 0:
            part += arrived[: part.size]
        # Asked for in the order in which the rank after this sends: keys, gradients, keys, ...
        coming = arrived[: tour.size((source + 1) % axis.size)]
        messages = [axis.isend(part, tour.before), axis.irecv(coming, tour.after)]
    for message in messages:
        message.wait()
    for target, home in zip(targets, tour.pairs(arrived, axis.rank), strict=True):
        target[1:] = home
    return result


class _Tour:
    """Which blocks meet on this rank, and how keys and values come by.

    A block is seen as (n, B, H, t, D): of a packed array (B, T, n H D), and of the flat buffers
    that travel, where keys and values of a rank's first block lie before those of its second.
    """

    def __init__(self, axis: Axis, length: int, heads: int, qkv: Array, causal: bool) -> None:
        self.axis, self.heads, self.causal = axis, heads, causal
        self.batch: int = qkv.shape[0]
        self.depth: int = qkv.shape[2] // (3 * heads)
        self.ranges = zigzag(length, axis.size)
        self.before, self.after = (axis.rank - 1) % axis.size, (axis.rank + 1) % axis.size

    def blocks(self, packed: Array, n: int) -> list[Array]:
        """This rank's two blocks of a packed array: views."""
        x = packed.reshape(*packed.shape[:2], n, self.heads, self.depth).transpose(2, 0, 3, 1, 4)
        return [x[:, :, :, at] for at in self._places()]

    def rows(self, lse: Array) -> list[Array]:
        """What belongs to the queries of either block, of (B, H, T): views."""
        return [lse[:, :, at] for at in self._places()]

    def pairs(self, flat: Array, source: int) -> list[Array]:
        """Keys and values of the two blocks of rank `source`, as they lie in a buffer: views."""
        shapes = [(self.batch, end - first, 2, self.heads, self.depth)
                  for first, end in self.ranges[source]]  # fmt: skip
        first, both = self.size(source, 1), self.size(source)
        arrays = zip((flat[:first], flat[first:both]), shapes, strict=True)
        return [array.reshape(shape).transpose(2, 0, 3, 1, 4) for array, shape in arrays]

    def size(self, source: int, count: int = 2) -> int:
        """Values in the keys and values of the first `count` blocks of a rank."""
        positions = sum(end - first for first, end in self.ranges[source][:count])
        return 2 * self.batch * self.heads * self.depth * positions

    def room(self, like: Array) -> Array:
        """A buffer for the keys and values of any rank."""
        return _buffer((max(self.size(rank) for rank in range(self.axis.size)),), like)

    def meetings(self, source: int, whole: Plan) -> Iterator[tuple[int, int, Plan]]:
        """Block i of queries here and block j of keys of `source`, where they meet, and the plan.

        What block i of this rank meets first is itself.
        """
        for i, j in ((0, 0), (0, 1), (1, 1), (1, 0)):
            (query, end), (key, stop) = self.ranges[self.axis.rank][i], self.ranges[source][j]
            if query < end and key < stop and not (self.causal and key > query):
                causal = self.causal and key == query
                yield i, j, whole._replace(causal=causal, query=query, position=key)

    def travel(self, qkv: Array) -> Iterator[tuple[int, list[Array]]]:
        """Each rank, this one first, with the keys and values of its blocks.

        While the caller computes with these, those of the next rank are on their way.
        """
        axis, here, there = self.axis, self.room(qkv), self.room(qkv)
        for place, block in zip(self.pairs(here, axis.rank), self.blocks(qkv, 3), strict=True):
            place[...] = block[1:]
        for step in range(axis.size):
            source, coming = (axis.rank + step) % axis.size, (axis.rank + step + 1) % axis.size
            messages = []
            if coming != axis.rank:
                messages = [
                    axis.irecv(there[: self._useful(coming, axis.rank)], self.after),
                    axis.isend(here[: self._useful(source, self.before)], self.before),
                ]
            yield source, self.pairs(here, source)
            for message in messages:
                message.wait()
            here, there = there, here

    def _useful(self, source: int, rank: int) -> int:
        """How much of the keys and values of `source` is seen by `rank`, or by ranks after that."""
        return self.size(source, 1 if self.causal and rank > source else 2)

    def _places(self) -> tuple[slice, slice]:
        (first, end), _ = self.ranges[self.axis.rank]
        return slice(end - first), slice(end - first, None)


def _buffer(shape: tuple[int, ...], like: Array) -> Array:
    with memory.category("buffers"):
        return empty(shape, like)
