"""How the gradients of the ranks become sums, each where it is needed.

A gradient is complete when the contributions of all microbatches on all ranks are in it. Until
then it lies in one of two places:

- *at home*, in the buffer of all gradients, where a rank adds up its own microbatches; the buckets
  are reduced after the last one (stages 0 and 1);
- *on the way*, in memory that a bucket has only from its first contribution to its reduction, which
  adds it to what the owner holds (stages 2 and 3; and in deterministic mode, where the microbatches
  of all ranks must be added one after the other).

Reductions start as soon as a bucket is ready, in the background, where that gains; else at the end
of backward, or for buckets on the way in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from hpcml.autograd import Tensor, while_alive
from hpcml.autograd.record import empty_like
from hpcml.backend import Array
from hpcml.comm.request import Request
from hpcml.nn import Parameter
from hpcml.optim.buckets import Bucket
from hpcml.optim.flat import FlatStorage
from hpcml.parallel.arena import Arena
from hpcml.parallel.groups import Groups
from hpcml.parallel.turns import Turns, late


class Gradients:
    """Collects the gradients of one step after the other.

    turns: the order of the buckets. overlap: reduce in the background, one bucket beside that which
    is filled, if there is room for two. ordered: deterministic mode.
    """

    arena: Arena
    """To be given."""

    def __init__(
        self, storage: FlatStorage, groups: Groups, turns: Turns, overlap: bool, ordered: bool
    ) -> None:
        self.storage, self.groups, self.turns = storage, groups, turns
        self.overlap, self.ordered = overlap and groups.all.size > 1, ordered
        self.sharding = storage.sharding
        self._let_lie(at_home=self.sharding.whole("grads"))
        self._stage = 0  # in backward
        self._begun: set[int] = set()  # stages of which a microbatch is in the sums
        # What came before its microbatch, of each parameter: pipelines may compute gradients of
        # weights later than others, but not all.
        self._early: dict[int, deque[Array]] = {}
        self._slots: dict[Bucket, Array] = {}
        self.filled = 0
        """Elements of buckets that were filled at once, others than those apart, at most: of the
        last step in which the arena was exact."""
        self._own = {bucket: self._part(bucket) for bucket in storage.trained}
        self._pending: list[tuple[Request, Array]] = []
        self._active = False
        self._real = self._first = True
        if self.on_way or ordered or self.overlap:
            for parameter in storage.parameters:
                while_alive(parameter.register_post_accumulate_grad_hook, self._arrived)

    @property
    def lockstep(self) -> bool:
        """Whether ranks reduce during backward: each must walk as many times, samples or not."""
        return self.on_way or self.overlap

    def begin(self, rounds: int) -> None:
        """A step of so many microbatches a rank begins."""
        self._wait()
        self._active = False
        for bucket in list(self._slots):  # of a backward that raised
            self.arena.give_back(self._forget(bucket))
        if self.arena.exact:
            self.filled = 0
        if self.sharding.whole("grads"):
            several = rounds > 1 or self.groups.replica.size > 1
            self._let_lie(at_home=not (self.ordered and several))
        self._begun.clear()
        self._early.clear()
        for parameter in self.storage.parameters:
            parameter.gradient = None

    def _let_lie(self, at_home: bool) -> None:
        self.on_way = not at_home
        self.storage.collect_gradients(None if at_home else self)

    def before_backward(
        self, coming: Iterable[Tensor | None], *, real: bool, last: bool, stage: int
    ) -> None:
        """A microbatch comes; `real`: with samples of this rank; `last`: of the step.

        coming: the leaves to whose gradients it will add, in that order; see `contributions`.
        """
        self._real, self._first = real, stage not in self._begun
        self._stage, self._active = stage, self.on_way or (self.overlap and last)
        if self._active:
            self.turns.expect(stage, coming, self.arena.spans)
            self._take_early()
            self._reduce_what_is_ready()

    def after_backward(self) -> None:
        """Reduce what has waited for gradients that did not come."""
        if not self._active:
            return
        for bucket in self.turns.rest():
            self._reduce(bucket)
        self._begun.add(self._stage)
        self._active = False

    def finish(self) -> None:
        """Complete the sums: each rank then has what its stage holds."""
        self._wait()
        for parameter in self.storage.parameters if self._early else ():
            if self._early.get(id(parameter)):  # several in one microbatch
                raise late(parameter)
        sharding, groups, buckets = self.sharding, self.groups, self.turns.all()
        if self.on_way and sharding.stage == 0:
            for bucket in buckets:
                groups.all.allgather(self._own[bucket], out=bucket.grad)
        elif not self.on_way and not self.overlap:
            self.storage.finish_gradients()
            self._reduce_at_end()
        if not (self.on_way and self.ordered):  # there the replicas came in their turn
            for bucket in buckets:
                if groups.replica.size > 1:
                    groups.replica.allreduce(self._own[bucket], out=self._own[bucket])
        for bucket in buckets:
            if bucket.layout.get(groups.tp.name) == "R":  # ranks used it for different positions
                part = self.complete(bucket)
                groups.tp.allreduce(part, out=part)
        if sharding.whole("grads"):
            self._let_lie(at_home=True)
            for parameter in self.storage.parameters:
                parameter.gradient = parameter.gradient_buffer

    def complete(self, bucket: Bucket) -> Array:
        """What this rank has of the complete gradient, once it is."""
        return bucket.grad if self.sharding.stage == 0 else self._own[bucket]

    def _reduce_at_end(self) -> None:
        if self.sharding.stage == 0:
            self.groups.all.allreduce(self.storage.grad, out=self.storage.grad)
            return
        for bucket in self.turns.all():
            self._start(bucket, bucket.grad, background=False)

    # --- during backward --------------------------------------------------------------------------

    def place(self, parameter: Parameter) -> Array:
        """The array into which the gradient of a parameter goes, as the first one comes."""
        bucket = self.storage.home[id(parameter)]
        self._open(bucket)
        assert parameter._place is not None
        return parameter._place

    def _open(self, bucket: Bucket) -> Array:
        if bucket not in self._slots:
            apart = bucket in self.turns.apart
            if apart:
                self._wait()  # for what it had in the microbatch before
            else:
                self._make_room(bucket.size)
            slot = self._slots[bucket] = self.arena.take(bucket.size, apart)
            if self.arena.exact:
                filled = sum(one.size for one in self._slots if one not in self.turns.apart)
                self.filled = max(self.filled, filled)
            for gap in bucket.gaps():
                slot[gap] = 0
            for number, parameter in enumerate(bucket.parameters):
                parameter.gradient_buffer = bucket.view(slot, number)
        return self._slots[bucket]

    def _make_room(self, size: int) -> None:
        """Wait for reductions until one at most is under way, and so much more has a place."""
        self._wait(1)
        if not self.arena.fits(size):
            self._wait()

    def _forget(self, bucket: Bucket) -> Array:
        """Gradients of the bucket that come from now on go elsewhere; where they went."""
        for parameter in bucket.parameters:
            parameter.gradient = parameter.gradient_buffer = None
        return self._slots.pop(bucket)

    def _arrived(self, parameter: Parameter) -> None:
        if not self._active:
            if self.on_way and self.ordered and self.groups.pp.size > 1:  # others come first
                early = empty_like(parameter.gradient)
                early[...] = parameter.gradient
                self._early.setdefault(id(parameter), deque()).append(early)
                parameter.gradient = None
            return
        self.turns.came(parameter)
        self._reduce_what_is_ready()

    def _take_early(self) -> None:
        """Take what the microbatch that is in backward has brought before."""
        for bucket in self.turns.waiting() if self._early else ():
            for parameter in bucket.parameters:
                early = self._early.get(id(parameter))
                if early:
                    parameter.receive(early.popleft(), fresh=False)

    def _reduce_what_is_ready(self) -> None:
        for bucket in self.turns.ready():
            self._reduce(bucket)

    def _reduce(self, bucket: Bucket) -> None:
        if not self.on_way:
            self._fill(bucket)
            self._start(bucket, bucket.grad, background=True)
            return
        slot = self._open(bucket)
        if self._real:
            self._fill(bucket)
        else:
            slot[...] = -0.0
        self._forget(bucket)
        self._start(bucket, slot, background=self.overlap)

    def _fill(self, bucket: Bucket) -> None:
        """Let what got no gradient count nothing: x + -0.0 is x, whatever x."""
        for parameter in bucket.parameters:
            if parameter.gradient is None:
                place = parameter.gradient_buffer
                assert place is not None
                place[...] = -0.0
                parameter.gradient = place

    def _start(self, bucket: Bucket, source: Array, background: bool) -> None:
        """Reduce a bucket, or begin to; memory on the way is given back when that is over."""
        shard, sharding = self.groups.shard, self.sharding
        request: Request | None = None
        if sharding.stage == 0 and not self.on_way:
            request = shard.iallreduce(source, out=source)
        elif sharding.layers:
            self._to_owner(bucket, source)
        elif self.on_way and self.ordered and self.groups.replica.size > 1:
            self._in_turn(bucket, source)
        else:
            own, more = self._own[bucket], self.on_way and not self._first
            if background:
                request = shard.ireduce_scatter(source, out=own, accumulate=more)
            else:
                shard.reduce_scatter(source, out=own, accumulate=more)
        if request is not None:
            self._pending.append((request, source))
        elif self.on_way:
            self.arena.give_back(source)

    def _in_turn(self, bucket: Bucket, source: Array) -> None:
        """Add to what the replicas before this one have added up; all get what the last one has."""
        replica, own = self.groups.replica, self._own[bucket]
        before, after = replica.rank - 1, replica.rank + 1
        if before >= 0:
            replica.recv(own, before)
        more = before >= 0 or not self._first
        self.groups.shard.reduce_scatter(source, out=own, accumulate=more)
        if after < replica.size:
            replica.send(own, after)
        replica.broadcast(own, replica.size - 1, out=own)

    def _to_owner(self, bucket: Bucket, source: Array) -> None:
        owner = self.sharding.owner(bucket)
        total = self.groups.shard.reduce(source, root=owner)
        if total is not None:
            own = self._own[bucket]
            if self.on_way and not self._first:
                own += total
            else:
                own[...] = total

    def _part(self, bucket: Bucket) -> Array:
        """This rank's part of the complete sum."""
        whole = self.sharding.whole("grads")
        return bucket.grad[self.sharding.block(bucket)] if whole else bucket.grad

    def _wait(self, count: int = 0) -> None:
        """Until at most `count` reductions are under way."""
        while len(self._pending) > count:
            request, source = self._pending.pop(0)
            request.wait()
            if self.on_way:
                self.arena.give_back(source)
