"""ZeRO stage 3: parameters that a rank holds only while it needs them.

Each rank owns a block of every bucket (Rajbhandari et al. 2019, section 5.3). When a value of a
unit is asked for, all ranks gather the unit; when its module is done, in forward, or the last use
of its values, in backward, its memory is free for the next one. The unit that was used last stays
until another is fetched: backward begins with the one with which forward ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import groupby

from hpcml.autograd import while_alive
from hpcml.backend import Array
from hpcml.comm import Axis
from hpcml.comm.request import Request
from hpcml.nn import Module, ModuleList
from hpcml.optim.buckets import Bucket
from hpcml.optim.flat import FlatStorage
from hpcml.parallel import units
from hpcml.parallel.arena import Arena
from hpcml.parallel.gathering import gather


class Shards:
    """Fetches units and lets them go; all ranks do so in the same order.

    prefetch: fetch the unit that came next in the last pass while this one is in use, as soon as
    the arena has a place for it.
    """

    arena: Arena

    def __init__(self, model: Module, storage: FlatStorage, axis: Axis, prefetch: bool) -> None:
        """To be given places, and divided: see `arrange` and `divide`."""
        self.axis, self.sharding, self.prefetch = axis, storage.sharding, prefetch
        self._model, self._buckets = model, storage.buckets
        self.units: list[Unit] = []
        self._parked: list[Unit] = []  # whose memory is free to use, but still holds their values
        self.together = 0
        """Elements that were in use beside a unit, at most, as far as was noted."""

    def arrange(self, arena: Arena) -> None:
        """Fetch into this arena from now on; what is here goes."""
        self.forget()
        self.arena = arena

    def divide(self, most: int) -> None:
        """Fetch units of more elements in parts; what is here goes.

        For so much there is a place beside a unit in use: parts of the next one come as those of
        this one go.
        """
        self.forget()
        self.together = 0
        self._seen: list[Unit] = []  # fetched in this pass
        self._order: list[Unit] = []  # fetched in the last whole pass
        self.units = [
            Unit(self, part)
            for _, buckets in groupby(self._buckets, key=lambda bucket: bucket.unit)
            for part in _parts(buckets, most)
        ]
        self._users: list[_User] = []
        for module, parameters in units.users(self._model):
            fetched = dict.fromkeys(p.unit for p in parameters if isinstance(p.unit, Unit))
            if fetched:
                self._users.append(_User(list(fetched)))
                # A list has no forward of its own.
                for called in module if isinstance(module, ModuleList) else (module,):
                    while_alive(called.register_forward_hook, self._users[-1].done)

    def fetch(self, unit: Unit) -> None:
        """Give the parameters of a unit their values."""
        if unit in self._parked:  # nothing has been written over them
            self._parked.remove(unit)
        else:
            self._drop_parked()
            if not unit.coming:
                self._drop_coming()  # guessed wrong
                unit.start(background=False)
            unit.wait()
        unit.show()
        if self.arena.exact:
            self._note_together()
        self._seen.append(unit)
        self._start_next()

    def done(self, unit: Unit) -> None:
        """Nothing in this pass needs the values of a unit any more."""
        self.park(unit)
        self._start_next()

    def park(self, unit: Unit) -> None:
        """Let the values of a unit go, if it has them."""
        if unit.slots and unit not in self._parked and not unit.coming:
            unit.hide()
            self._parked.append(unit)

    def forget(self, changed: Iterable[Unit] = ()) -> None:
        """Fetch the units (or all of them) anew when they are needed next: they have changed."""
        for unit in changed or self.units:
            unit.wait()  # a pass that raised has left it under way
            self.park(unit)
            if unit in self._parked:
                self._parked.remove(unit)
                unit.give_back()

    def end(self, whole: bool = True) -> None:
        """A pass is over; `whole`: with its backward, so that the next one will be like it."""
        self._drop_coming()
        for unit in self.units:
            self.park(unit)
        if whole:
            self._order = self._seen
        self._seen = []

    def _note_together(self) -> None:
        """Note what is in use now, if that is more than the largest unit, which may be in parts."""
        held, sizes = Counter[int](), Counter[int]()
        for unit in self.units:
            number = unit.buckets[0].unit
            sizes[number] += unit.size
            if unit.slots and unit not in self._parked and not unit.coming:
                held[number] += unit.size
        if held.total() > max(sizes.values()):
            self.together = max(self.together, held.total() - max(held.values()))

    def _drop_parked(self, keep: Collection[Unit] = ()) -> None:
        kept = [unit for unit in self._parked if unit in keep]
        for unit in self._parked:
            if unit not in kept:
                unit.give_back()
        self._parked = kept

    def _drop_coming(self) -> None:
        for unit in self.units:
            if unit.coming:
                unit.wait()
                unit.give_back()

    def _start_next(self) -> None:
        here = len(self._seen)
        if not self.prefetch or self._seen != self._order[:here]:
            return
        coming = self._order[here:]
        number = next((number for number, unit in enumerate(coming) if not unit.slots), None)
        if number is not None:
            unit, sooner = coming[number], coming[:number]
            if not self.arena.fits(unit.size):
                self._drop_parked(keep=sooner)  # else they would find no place beside it
            if self.arena.fits(unit.size):
                unit.start(background=True)


class _User:
    """A module that uses units."""

    def __init__(self, fetched: Sequence[Unit]) -> None:
        self.fetched = fetched

    def done(self, *_: object) -> None:
        """Called after its forward: it has used what they hold."""
        for unit in self.fetched:
            unit.shards.park(unit)  # backward may begin with it


class Unit:
    """Parameters that are fetched together: their buckets, and where they lie when gathered."""

    def __init__(self, shards: Shards, buckets: Sequence[Bucket]) -> None:
        self.shards, self.buckets = shards, buckets
        self.size = sum(bucket.size for bucket in buckets)
        self._room: Array = None
        self.slots: list[Array] = []
        self.coming: list[Request] = []
        for bucket in buckets:
            for parameter in bucket.parameters:
                parameter.unit = self

    def fetch(self) -> None:
        """Give all its parameters their values."""
        self.shards.fetch(self)

    def done(self) -> None:
        """Nobody needs the values for now."""
        self.shards.done(self)

    def start(self, background: bool) -> None:
        """Gather the buckets, or begin to."""
        shards, sharding = self.shards, self.shards.sharding
        room = self._room = shards.arena.take(self.size)
        start = 0
        for bucket in self.buckets:
            slot = shards.arena.part(room, slice(start, start + bucket.size))
            self.slots.append(slot)
            block, own = sharding.block(bucket), None
            if not sharding.layers:
                own = shards.arena.part(room, slice(start + block.start, start + block.stop))
            start += bucket.size
            request = gather(bucket, bucket.data, slot, shards.axis, sharding, own, background)
            if request is not None:
                self.coming.append(request)

    def wait(self) -> None:
        """Until all is there."""
        for request in self.coming:
            request.wait()
        self.coming = []

    def show(self) -> None:
        """Let the parameters have their values, to be read: what is written here goes nowhere."""
        for bucket, slot in zip(self.buckets, self.slots, strict=True):
            for number, parameter in enumerate(bucket.parameters):
                view = bucket.view(slot, number)
                view.flags.writeable = False
                parameter.data = view

    def hide(self) -> None:
        """Let them have none: the next access fetches them."""
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.forget()

    def drop(self) -> None:
        """Forget the values: they have changed."""
        self.shards.forget([self])

    def give_back(self) -> None:
        """Give the memory back."""
        if self.slots:
            self.shards.arena.give_back(self._room)
        self.slots, self._room = [], None


def _parts(buckets: Iterable[Bucket], most: int) -> list[list[Bucket]]:
    """Neighbours of at most so many elements together, or a bucket that is larger by itself."""
    parts: list[list[Bucket]] = []
    room = 0
    for bucket in buckets:
        if not parts or bucket.size > room:
            parts.append([])
            room = most
        parts[-1].append(bucket)
        room -= bucket.size
    return parts
