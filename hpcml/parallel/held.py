"""What a rank has of a model: all of it, or some stages of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hpcml import backend, memory
from hpcml.backend import Array
from hpcml.comm import Axis
from hpcml.nn import Module, Parameter
from hpcml.optim.buckets import Bucket
from hpcml.optim.flat import FlatStorage


@dataclass(frozen=True)
class Tie:
    """A parameter that two stages use, and so each has for itself: the one and its twin.

    Both begin alike and get the same updates, from the sum of both gradients (the embedding group
    of Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters"). So
    each use has an accumulator of its own, wherever the stages are.
    """

    first: Parameter
    twin: Parameter
    ranks: tuple[int, int]
    """Which rank of the pipeline has either."""

    def add_up(
        self, storage: FlatStorage, complete: Callable[[Bucket], Array], pipeline: Axis
    ) -> None:
        """Let both have the sum of their gradients. Collective over their ranks.

        complete: of a bucket, what this rank has of its complete gradient.
        """
        first, twin = self._trained(storage)
        if first is not None and twin is not None:
            total = complete(first)
            total += complete(twin)
            complete(twin)[...] = total
            return
        for bucket in filter(None, (first, twin)):
            here = complete(bucket)
            peer = self.ranks[pipeline.rank == self.ranks[0]]
            there = memory.empty(here.shape, here.dtype, "buffers", backend.kind(here))
            sent = pipeline.isend(here.copy(), peer)
            pipeline.recv(there, peer)
            sent.wait()
            here += there

    def hand_on(
        self, storage: FlatStorage, complete: Callable[[Bucket], Array], pipeline: Axis
    ) -> None:
        """Let the twin have the gradient that the first has by now. Collective over their ranks."""
        first, twin = self._trained(storage)
        if first is not None and twin is not None:
            complete(twin)[...] = complete(first)
        elif first is not None:
            pipeline.send(complete(first).copy(), self.ranks[1])
        elif twin is not None:
            there = complete(twin)
            made = memory.empty(there.shape, there.dtype, "buffers", backend.kind(there))
            there[...] = pipeline.recv(made, self.ranks[0])

    def _trained(self, storage: FlatStorage) -> list[Bucket | None]:
        """The buckets of both, None of one that is elsewhere or frozen."""
        found = (storage.home.get(id(p)) for p in (self.first, self.twin))
        return [bucket if bucket and bucket.trained else None for bucket in found]


@dataclass(frozen=True)
class Held:
    """Parameters of a model that this rank has, and to which stage of a pipeline they belong."""

    named: Sequence[tuple[str, Parameter]]
    """In order of definition, each once."""
    order: Mapping[int, int]
    """By id, the place of every parameter of the model, twins with their first."""
    stage_of: Mapping[int, int] = field(default_factory=dict)
    """By id, the stage; 0 where nothing is said."""
    ties: Sequence[Tie] = ()
    """All of the model, in one order."""
    links: Sequence[Sequence[Parameter]] = ()
    """What is between any two places where the model may be cut, if that matters."""

    @staticmethod
    def all_of(model: Module) -> Held:
        """All of a model."""
        named = list(model.named_parameters())
        return Held(named, {id(p): place for place, (_, p) in enumerate(named)})

    @property
    def parameters(self) -> list[Parameter]:
        """All that this rank has, its twins too."""
        named = [parameter for _, parameter in self.named]
        return named + [tie.twin for tie in self.ties if id(tie.twin) in self.stage_of]

    def add_up(
        self, storage: FlatStorage, complete: Callable[[Bucket], Array], pipeline: Axis
    ) -> None:
        """Let all copies of a parameter have the sum of their gradients. Collective; see `Tie`.

        Of several twins the last one to be added alone sees the sum of all.
        """
        last = {id(tie.first): tie for tie in self.ties}
        for tie in self.ties:
            tie.add_up(storage, complete, pipeline)
        for tie in self.ties:
            if tie is not last[id(tie.first)]:
                tie.hand_on(storage, complete, pipeline)

    def by_stage(self, buckets: Sequence[Bucket]) -> dict[int, list[Bucket]]:
        """Buckets by the stage of their parameters."""
        stages: dict[int, list[Bucket]] = {stage: [] for stage in {0, *self.stage_of.values()}}
        for bucket in buckets:
            stages[self.stage_of.get(id(bucket.parameters[0]), 0)].append(bucket)
        return stages

    def place(self, parameter: Parameter) -> int:
        """The place of a parameter in the model; last, if the model does not know it."""
        return self.order.get(id(parameter), len(self.order))

    def is_twin(self, bucket: Bucket) -> bool:
        """Whether a bucket is of a twin, whose first counts."""
        return any(tie.twin is bucket.parameters[0] for tie in self.ties)
