"""The model states of data-parallel ranks: copied (stage 0) or divided among them (ZeRO 1 to 3).

Rajbhandari et al. 2019, "ZeRO: memory optimizations toward training trillion parameter models",
section 5. Stage 1 divides the optimizer's state, stage 2 the gradients too, stage 3 the parameters
too: each rank owns a block of every bucket of parameters, sums the gradients of that block, updates
it, and the others get the result from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import tee

from hpcml import memory
from hpcml.autograd import Tensor
from hpcml.backend import Array, to_kind
from hpcml.nn import Module, Parameter
from hpcml.optim import Optimizer
from hpcml.optim.buckets import Bucket
from hpcml.parallel import units
from hpcml.parallel.arena import Arena
from hpcml.parallel.data import broadcast_parameters
from hpcml.parallel.gathering import HeldOf, assemble, detach, gather, gathered
from hpcml.parallel.gradients import Gradients
from hpcml.parallel.groups import Groups
from hpcml.parallel.held import Held
from hpcml.parallel.limits import advised
from hpcml.parallel.norm import norm
from hpcml.parallel.pipeline.actions import Kind
from hpcml.parallel.rooms import rooms
from hpcml.parallel.shards import Shards
from hpcml.parallel.turns import Turns

_SHOWING = 2
"""Steps that show what is alive at once: gradients, then the parts in which units are gathered."""


class Zero:
    """Lays out parameters, gradients and optimizer state, and keeps them right from step to step.

    What a training step does with it, in a loop of one's own too:

        zero = Zero(model, optimizer, groups.divide(mesh, stage=2))
        zero.begin()
        zero.before_backward(contributions(loss))
        loss.backward()  # of this rank's share of the batch's mean loss
        zero.after_backward()
        zero.finish()
        zero.update(clip_scale(zero.norm(), 1.0))

    With A microbatches it is `begin(A)`, and the three lines in the middle repeat, all but the last
    time with `last=False`: what is reduced early would else be reduced again. All ranks do so
    equally often; in stages 0 and 1, unless `lockstep`, a rank may do it fewer times.
    """

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        groups: Groups,
        *,
        bucket_mb: float = 25.0,
        overlap: bool | None = None,
        deterministic: bool = False,
        held: Held | None = None,
    ) -> None:
        """Collective; all ranks get the parameters of the first, where they have values.

        bucket_mb: MiB of gradients that are on their way at once, in buckets of a third of that:
        one is filled, one is reduced, one may be long in use, of a tied parameter. overlap:
        communicate in the background; None: where that gains. deterministic: microbatches are added
        in their order over all ranks. held: what this rank has of the model in a pipeline; by
        default all.
        """
        self.model, self.optimizer, self.groups = model, optimizer, groups
        self.deterministic = deterministic
        self.held = Held.all_of(model) if held is None else held
        self._span = groups.all.ledger.span
        detach(self.held.parameters)
        broadcast_parameters(self.held.parameters, groups.dp)
        with advised(optimizer, groups.sharding):
            self._place(int(bucket_mb * (1 << 20) / 3))
        storage = self.storage = optimizer.storage
        most = int(bucket_mb * (1 << 20)) // storage.dtype.itemsize
        self._left_out = [p for p in self.held.parameters if id(p) not in storage.home]
        overlap = groups.all.overlaps if overlap is None else overlap
        stages, sharded = self.held.by_stage(storage.trained), not groups.sharding.whole("params")
        self._rooms = partial(
            rooms, storage.buckets, most=most, beside=self._beside(), overlap=overlap,
            sharded=sharded,
        )  # fmt: skip
        # At stage 3 all use the same layers: they gather them.
        turns = Turns(groups.all, stages, self._tied(), alike=sharded)
        self._gradients = Gradients(storage, groups, turns, overlap, deterministic)
        self._shards: Shards | None = None
        if sharded:
            ahead = overlap and groups.pp.size == 1  # in a pipeline passes are not alike
            self._shards = Shards(model, storage, groups.shard, ahead)
        self._shown, self._tight = 0, False
        self._arrange()

    def _arrange(self) -> None:
        """Make places for what lives briefly, which is not there now.

        Until it has been shown what that is, and where these are too large, it has memory of its
        own, and of units each bucket by itself.

        Gradients in memory of this rank's own: a layer that only some ranks use has its place on
        those alone. What is gathered has the same place on all, in memory that they share;
        processes share none of a GPU.
        """
        storage = self.storage

        def alone(size: int) -> Array:
            return memory.empty((size,), storage.dtype, "buffers", storage.device)

        shards = self._shards
        filled, together = self._gradients.filled, shards.together if shards else 0
        if shards and self._shown:  # what is gathered has places that are alike
            filled, together = self.groups.all.broadcast_object((filled, together))
        apart = self._gradients.turns.apart
        self._apart = len(apart)
        known = self._shown >= _SHOWING
        room = self._rooms(apart, filled=filled if known else 0, together=together)
        ahead = room.second - together
        self._exact = not known or self._tight or ahead < 0
        self._gradients.arena = Arena(alone, [room.gradients])
        if shards is not None:
            shared = partial(self.groups.shard.empty, dtype=storage.dtype)
            second = max(room.second, 0) if shards.prefetch else together
            places = [room.unit, second]
            arena = Arena(shared if storage.device == "cpu" else alone, places, dear=True)
            shards.arrange(arena)
            if self._exact:  # else there are places for the parts of the last step
                parts = shards.prefetch and 0 < self._shown < _SHOWING
                shards.divide(ahead if parts else 0)

    def _tied(self) -> set[Bucket]:
        """Buckets with a parameter that several modules use, other than by its twins."""
        names = Counter(id(p) for _, p in self.model.named_parameters(remove_duplicate=False))
        return {
            bucket
            for bucket in self.storage.trained
            if any(names[id(p)] > 1 + len(p.twins) for p in bucket.parameters)
        }

    def _beside(self) -> int:
        """Elements that reducing a bucket takes beside it, at most: some short ones take more.

        On a GPU it comes on top: the pieces there may leave no place for what is fetched ahead.
        """
        storage = self.storage
        if storage.device != "cpu":
            return 0
        told = partial(self.groups.shard.scratch, dtype=storage.dtype)
        nbytes = max((told(bucket.size) for bucket in storage.trained), default=0)
        return -(-nbytes // storage.dtype.itemsize)

    def _place(self, bucket_bytes: int) -> None:
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        known = {id(p) for p in trained}
        others = [p for p in self.held.parameters if id(p) not in known]
        chosen = trained
        if self.groups.sharding.whole("params"):
            for parameter in others:
                assert parameter.data is not None  # made now, with the seed of the run
        else:  # frozen ones are divided too
            chosen = trained + others
        self.optimizer.place(
            units=units.divide(self.model, chosen, self.held.links),
            bucket_bytes=bucket_bytes,
            sharding=self.groups.sharding,
            allocate=self.groups.allocate,
        )

    # --- a step ---------------------------------------------------------------------------------

    @property
    def lockstep(self) -> bool:
        """Whether each rank must go through forward and backward as often as the others."""
        return self._gradients.lockstep or self.gathers

    @property
    def gathers(self) -> bool:
        """Whether forward needs all ranks: they gather parameters."""
        return self._shards is not None

    def begin(self, rounds: int = 1) -> None:
        """A step begins; `rounds`: the most microbatches that a rank has in it."""
        for parameter in self._left_out:
            parameter.gradient = None  # else it would add up for ever
        self._gradients.arena.exact = self._exact
        if self._shards is not None:
            self._shards.arena.exact = self._exact
        self._gradients.begin(rounds)

    def before_backward(
        self,
        coming: Iterable[Tensor | None],
        *,
        real: bool = True,
        last: bool = True,
        stage: int = 0,
    ) -> None:
        """Backward of a microbatch comes; `real`: not only for company; `last`: of the step, here.

        coming: the leaves to whose gradients it adds, see `hpcml.autograd.contributions`. stage: of
        the pipeline, through which backward goes.
        """
        self._gradients.before_backward(coming, real=real, last=last, stage=stage)

    def after_backward(self) -> None:
        """Its gradients are complete."""
        self._gradients.after_backward()
        self.end_pass(whole=True)

    def end_pass(self, whole: bool = False) -> None:
        """Forward is over, and backward if `whole`: nobody needs gathered parameters now."""
        if self._shards is not None:
            self._shards.end(whole)

    def finish(self) -> None:
        """Complete the sums over microbatches and ranks: each rank has those of what it owns."""
        with self._span(Kind.REDUCE):
            self._gradients.finish()
            self.held.add_up(self.storage, self._gradients.complete, self.groups.pp)
        self._shown += 1
        if self._shown <= _SHOWING:
            self._arrange()
        elif self._more_was_taken():
            # At once: what is taken in turn leaves gaps. Later: the model has changed.
            self._tight |= self._shown == _SHOWING + 1
            self._shown = 0
            self._arrange()

    def _more_was_taken(self) -> bool:
        """Whether a step took more at once than those that showed it, at stage 3 on all ranks."""
        shards, gradients = self._shards, self._gradients
        if shards is None:
            return False
        return (
            shards.arena.short or gradients.arena.short or len(gradients.turns.apart) > self._apart
        )

    def norm(self) -> float:
        """Euclidean norm of the whole gradient, in which every parameter counts once."""
        with self._span(Kind.UPDATE):
            return norm(self.storage, self.groups, self.held, ordered=self.deterministic)

    def update(self, scale: float = 1.0) -> None:
        """Update what this rank owns, and get from the others what it holds beside.

        scale: by which the gradients count.
        """
        with self._span(Kind.UPDATE):
            self.optimizer.step(scale)
            if self._shards is not None:
                self._shards.forget()
            sharding = self.groups.sharding
            if sharding.whole("params") and not sharding.whole("optim"):
                for bucket in self.storage.trained:
                    own = bucket.data[sharding.block(bucket)]
                    gather(bucket, own, bucket.data, self.groups.shard, sharding)

    # --- results --------------------------------------------------------------------------------

    def gathered(self) -> Iterator[tuple[str, Array]]:
        """Each parameter once, by name, with its most exact values (float32 for 16-bit types).

        No rank holds more than one bucket beyond what it holds anyway; values are valid until the
        next are asked for. Collective: all ranks go through all of it.
        """
        return self._whole(self.held.named, self.storage.masters)

    def gathered_gradients(self) -> Iterator[tuple[str, Array]]:
        """Likewise the complete gradients of the parameters that are trained."""
        home = self.storage.home
        named = ((name, p) for name, p in self.held.named if id(p) in home)
        trained = ((name, p) for name, p in named if home[id(p)].trained)
        return self._whole(trained, self.storage.sums)

    def _whole(
        self, named: Iterable[tuple[str, Parameter]], held_of: HeldOf
    ) -> Iterator[tuple[str, Array]]:
        """Bring parameters together: over the ranks that divide the states, then the tensors."""
        known, passed = tee(named)
        parts = gathered(passed, self.storage, self.groups.shard, held_of)
        for (name, parameter), (_, array) in zip(known, parts, strict=True):
            yield name, assemble(parameter, to_kind(array, "cpu"), self.groups.tp)

    def replicas(self, whole: bool = False) -> Iterator[tuple[str, Array]]:
        """What this rank holds and its replicas should hold alike, by parameter.

        whole: only of those that tensor-parallel ranks do not divide.
        """
        held = self.groups.sharding.owned
        for bucket in self.storage.buckets:
            place = held("params", bucket)
            for parameter, part in zip(bucket.parameters, bucket.slices, strict=True):
                low, high = max(part.start, place.start), min(part.stop, place.stop)
                if low < high and not (whole and parameter.part):
                    yield parameter.name, bucket.data[low - place.start : high - place.start]
        for name, parameter in self.held.named:
            if id(parameter) not in self.storage.home and not (whole and parameter.part):
                yield name, parameter.data
