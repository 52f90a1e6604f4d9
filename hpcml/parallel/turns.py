"""When it is a bucket's turn to have its gradients reduced: the same order on all ranks.

The record of forward tells, before backward begins, to which gradients it will add, and in what
order. So the first backward has an order already, nothing waits for what gets no gradient, and
what will be under way for long is known before it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from hpcml.autograd import Tensor
from hpcml.comm import Axis
from hpcml.nn import Parameter
from hpcml.optim.buckets import Bucket


class Turns:
    """Whose turn it is, of the buckets that get gradients in one backward after the other.

    ranks: those that reduce together. stages: those of a pipeline that this rank has, each with its
    buckets: a backward is through one of them. apart: buckets that are in use from their first
    contribution to the last, in memory of their own; the first backward adds the others that are.
    alike: whether all ranks use the same layers.
    """

    def __init__(
        self, ranks: Axis, stages: Mapping[int, Sequence[Bucket]], apart: set[Bucket], alike: bool
    ) -> None:
        self.ranks, self.apart, self.alike = ranks, apart, alike
        self._all = [bucket for buckets in stages.values() for bucket in buckets]
        self._home = {id(p): bucket for bucket in self._all for p in bucket.parameters}
        # In which each stage's are reduced; from the end of the model, until backward has told.
        self._orders = {stage: list(buckets)[::-1] for stage, buckets in stages.items()}
        self._learned: set[int] = set()
        # In this backward: of how many parameters gradients are waited for and have come, the
        # bucket of the last one last, and the buckets whose turn is over.
        self._stage = 0
        self._due, self._come = Counter[Bucket](), dict[Bucket, int]()
        self._over: set[Bucket] = set()
        self._observing = False  # whether the order in which they come is not known before

    def all(self) -> list[Bucket]:
        """The buckets of all stages, each stage's in their order."""
        return [bucket for order in self._orders.values() for bucket in order]

    def expect(
        self, stage: int, coming: Iterable[Tensor | None], fits: Callable[[int], bool]
    ) -> None:
        """Know what the backward through a stage will bring. Collective where the order is new.

        coming: the leaves to whose gradients it adds, in that order, see `contributions`; where it
        may add to others, buckets wait for all their parameters. fits: whether there is a place for
        so many elements of gradients at once.
        """
        told, order = list(coming), self._orders[stage]
        mine, more = set(order), any(leaf is None for leaf in told)
        leaves = [id(leaf) for leaf in told if self._home.get(id(leaf)) in mine]
        used = [self._home[leaf] for leaf in leaves]
        if stage not in self._learned or (not more and self._comes_otherwise(stage, used)):
            self._learn(stage, used, more, fits)
        self._stage = stage
        self._over.clear()
        self._come.clear()
        self._due = Counter(self._home[leaf] for leaf in set(leaves))
        if more:
            self._due = Counter({bucket: len(bucket.parameters) for bucket in order})

    def came(self, parameter: Parameter) -> None:
        """The gradient of a parameter is complete, as far as this backward goes."""
        bucket = self._home[id(parameter)]
        if bucket in self._over:
            raise late(parameter)
        self._come[bucket] = self._come.pop(bucket, 0) + 1

    def ready(self) -> Iterator[Bucket]:
        """Those whose turn it is, until one waits for gradients that have not come."""
        for bucket in self.waiting():
            if self._come.get(bucket, 0) < self._due[bucket]:
                break
            self._over.add(bucket)
            yield bucket

    def rest(self) -> Iterator[Bucket]:
        """Those that have waited for what did not come, now that backward is over. Collective."""
        waiting, order = self.waiting(), self._orders[self._stage]
        self._over.update(waiting)
        yield from waiting
        if self._observing:  # not before: of some of them it was the turn earlier on other ranks
            seen = [bucket for bucket in self._come if bucket in order]
            others = [bucket for bucket in order if bucket not in self._come]
            (self._orders[self._stage],) = self._agreed(seen + others)
            self._observing = False

    def waiting(self) -> list[Bucket]:
        """Those whose turn is still to come in this backward."""
        return self._orders[self._stage][len(self._over) :]

    # --- the order ------------------------------------------------------------------------------

    def _comes_otherwise(self, stage: int, used: Sequence[Bucket]) -> bool:
        """Whether buckets come in another order than was learned, on all ranks alike."""
        known = set(used)
        order = [bucket for bucket in self._orders[stage] if bucket in known]
        return self.alike and order != _by_last_use(used)

    def _learn(
        self, stage: int, used: Sequence[Bucket], more: bool, fits: Callable[[int], bool]
    ) -> None:
        """Agree on the order in which buckets will be ready on the first rank.

        used: the bucket of each contribution of the backward that begins. more: it may bring more.
        In the first one of a stage that shows the order, if any rank's does.
        """
        ready, beside = self._agreed(_by_last_use(used), _beside_others(used, fits))
        self.apart.update(beside)
        self._orders[stage] = _merged(ready, self._orders[stage])
        if stage not in self._learned:
            self._learned.add(stage)
            unknown = self.ranks.allreduce(np.array([more], np.float32), "max")
            self._observing = bool(unknown[0])

    def _agreed(self, *found: Sequence[Bucket]) -> list[list[Bucket]]:
        """What the first rank has found. Collective."""
        numbers = {bucket: number for number, bucket in enumerate(self._all)}
        told = [[numbers[bucket] for bucket in buckets] for buckets in found]
        agreed = self.ranks.broadcast_object(told)
        return [[self._all[number] for number in some] for some in agreed]


def late(parameter: Parameter) -> RuntimeError:
    """The error of a gradient for which nothing waits any more."""
    return RuntimeError(
        f"{parameter.name}: a gradient came after it had been reduced; what an adjoint computes by "
        "calling backward() itself must be used nowhere else in the step"
    )


def _by_last_use(used: Sequence[Bucket]) -> list[Bucket]:
    return list(dict.fromkeys(reversed(used)))[::-1]


def _beside_others(used: Sequence[Bucket], fits: Callable[[int], bool]) -> list[Bucket]:
    """Buckets that are filled while others come and go, for which there is no place beside.

    Their parameters are used far apart, as what a model adds first and multiplies by last. One
    other may be a part of the same layer: for the two there is a place.
    """
    opened = {bucket: number for number, bucket in enumerate(dict.fromkeys(used))}
    found, before = list[Bucket](), list[Bucket]()
    for bucket in _by_last_use(used):
        others = [other for other in before if opened[other] > opened[bucket]]
        if len(others) > 1 or any(not fits(bucket.size + other.size) for other in others):
            found.append(bucket)
        before.append(bucket)
    return found


def _merged(order: Sequence[Bucket], expected: Sequence[Bucket]) -> list[Bucket]:
    """Those in order, and the others that are expected, each after the one before it there."""
    merged, place = list(order), 0
    for bucket in expected:
        if bucket not in order:
            merged.insert(place, bucket)
        place = merged.index(bucket) + 1
    return merged
