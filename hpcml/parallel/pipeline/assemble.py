"""What each rank of a pipeline has of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcml.errors import UserError
from hpcml.nn import Module, Parameter
from hpcml.parallel.held import Held, Tie
from hpcml.parallel.pipeline.chain import Link, links
from hpcml.parallel.pipeline.check import check
from hpcml.parallel.pipeline.find import find
from hpcml.parallel.pipeline.partition import Stage, stages
from hpcml.parallel.pipeline.schedules import ASYNCHRONOUS, SCHEDULES


@dataclass(frozen=True)
class Assembly:
    """A model cut into stages, as one rank of the pipeline sees it."""

    stages: Mapping[int, Stage]
    """Those of this rank."""
    rank_of: tuple[int, ...]
    """Of every stage its rank."""
    held: Held

    def groups(self, given: Iterable[Any]) -> list[dict[str, Any]]:
        """Parameter groups with what this rank has of them."""
        mine = {id(parameter) for parameter in self.held.parameters}
        twins: defaultdict[int, list[Parameter]] = defaultdict(list)
        for tie in self.held.ties:
            twins[id(tie.first)].append(tie.twin)
        found = []
        for group in _as_groups(given):
            every = [p for one in group["params"] for p in (one, *twins[id(one)])]
            found.append({**group, "params": [p for p in every if id(p) in mine]})
        return found


def placement(schedule: str, ranks: int, chunks: int) -> tuple[int, ...]:
    """Of every stage of a schedule its rank; raises UserError for one that cannot be used."""
    is_file = schedule not in SCHEDULES and Path(schedule).exists()
    microbatches = None if is_file else ranks
    table = find(schedule, ranks, microbatches, chunks if chunks > 1 else None)
    if not table.synchronous and schedule not in ASYNCHRONOUS:
        raise UserError(
            f'pipeline.schedule="{schedule}" makes updates, and must go on from batch to batch: '
            f"use {' or '.join(ASYNCHRONOUS)}"
        )
    check(table)
    return table.rank_of


def assemble(
    model: Module,
    *,
    rank: int,
    rank_of: Sequence[int],
    where: Sequence[int | str] = (),
    costs: Sequence[float] | None = None,
    apart: bool = False,
) -> Assembly:
    """Cut a model into as many stages as `rank_of` has ranks for, and keep those of this rank.

    where: cuts, else they are balanced, by `costs` of the links if given. apart: every use of a
    parameter that links share has an accumulator of its own, on one rank too (deterministic mode:
    where the model is cut must not change the order of additions). Changes the model: parameters of
    other ranks have no values.
    """
    chain = links(model)
    cut = stages(chain, len(rank_of), where, costs)
    _check_trained(cut, rank_of)
    stage_of_link = {link.name: stage.index for stage in cut for link in stage.links}
    ties = list(_ties(model, chain, stage_of_link, rank_of, apart))
    twins = {(link, id(tie.first)): tie.twin for link, tie in ties}
    named = list(model.named_parameters())
    order = {id(p): place for place, (_, p) in enumerate(named)}
    order |= {id(tie.twin): order[id(tie.first)] for _, tie in ties}
    stage_of: dict[int, int] = {}
    units = []
    for link in chain:
        index = stage_of_link[link.name]
        if rank_of[index] != rank:
            continue
        own = [twins.get((link.name, id(p)), p) for p in link.parameters]
        own = [p for p in own if stage_of.setdefault(id(p), index) == index]
        units.append(own)
    for name, parameter in named:
        if id(parameter) not in stage_of:
            parameter.unit = Elsewhere(name)
    held = Held(
        [(name, p) for name, p in named if id(p) in stage_of], order, stage_of,
        [tie for _, tie in ties], units,
    )  # fmt: skip
    mine = {stage.index: stage for stage in cut if rank_of[stage.index] == rank}
    return Assembly(mine, tuple(rank_of), held)


def _check_trained(cut: Sequence[Stage], rank_of: Sequence[int]) -> None:
    """Each rank's optimizer needs something, unless none has (which it says itself)."""
    trains = {rank_of[s.index] for s in cut if any(p.requires_grad for p in s.parameters)}
    for stage in cut:
        if trains and rank_of[stage.index] not in trains:
            names = ", ".join(link.name for link in stage.links)
            raise UserError(
                f"rank {rank_of[stage.index]} of the pipeline has nothing to train, parameters of "
                f"{names:.200} are frozen: let its stage go on to one that is trained "
                "(pipeline.stages), or set mesh.pp lower"
            )


class Elsewhere:
    """The unit of a parameter that another rank of the pipeline has."""

    def __init__(self, name: str) -> None:
        self.name = name

    def fetch(self) -> None:
        """There is nothing to fetch it from."""
        raise UserError(
            f"{self.name} is on another rank of the pipeline: take it from `Step.gathered`, which "
            "all ranks call"
        )

    def done(self) -> None:
        """Nobody needed it."""

    def drop(self) -> None:
        """There are no values to forget."""


def _ties(
    model: Module,
    chain: Sequence[Link],
    stage_of: Mapping[str, int],
    rank_of: Sequence[int],
    apart: bool,
) -> Iterator[tuple[str, Tie]]:
    """Twins of parameters that links of different stages share, each with its link's name."""
    first_link: dict[int, Link] = {}
    for link in chain:
        for parameter in link.parameters:
            owner = first_link.setdefault(id(parameter), link)
            here, there = stage_of[owner.name], stage_of[link.name]
            if owner is link or (here == there and not (apart and parameter.requires_grad)):
                continue
            twin = _twin(parameter)
            for module in link.modules:
                for name, own in module._parameters.items():
                    if own is parameter:  # the tree of names keeps the first
                        object.__setattr__(module, name, twin)
            yield link.name, Tie(parameter, twin, (rank_of[here], rank_of[there]))


def _twin(parameter: Parameter) -> Parameter:
    """Another parameter with the same first values."""
    twin = Parameter(
        shape=parameter.shape, init=parameter.init, dtype=parameter.dtype,
        requires_grad=parameter.requires_grad,
    )  # fmt: skip
    twin.to_device(parameter.device)
    twin.name, twin.part, twin.parts = parameter.name, parameter.part, parameter.parts
    # A bucket of its own on both sides, so that sums of one fit the other.
    parameter.layout["pp"] = f"R {parameter.name}"
    twin.layout = dict(parameter.layout)
    if parameter.has_values:
        twin.data = parameter.data.copy()
    parameter.twins = (*parameter.twins, twin)
    return twin


def _as_groups(given: Iterable[Any]) -> list[dict[str, Any]]:
    groups = list(given)
    return groups if groups and isinstance(groups[0], dict) else [{"params": groups}]
