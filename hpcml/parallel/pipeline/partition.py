"""Where a chain of links is cut into stages.

PipeDream (Narayanan et al. 2019, section 3.1) cuts so that the slowest stage is as fast as can be,
by a dynamic programme over the links and the stages; that is done here, by the cost of each link.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from hpcml.errors import UserError
from hpcml.nn import Embedding, Module, Parameter
from hpcml.nn.evaluation import evaluating
from hpcml.parallel.pipeline.chain import Link
from hpcml.parallel.pipeline.chain import links as links_of
from hpcml.parallel.tensor.naive import NaiveEmbedding
from hpcml.parallel.tensor.vocab import PositionEmbedding, VocabParallelEmbedding

_LOOKED_UP = (Embedding, VocabParallelEmbedding, PositionEmbedding, NaiveEmbedding)


@dataclass(frozen=True)
class Stage:
    """Links that one rank computes after each other."""

    index: int
    links: tuple[Link, ...]

    @property
    def parameters(self) -> list[Parameter]:
        """Those of its links, each once."""
        return list(dict.fromkeys(p for link in self.links for p in link.parameters))

    def __call__(self, *inputs: Any) -> Any:
        """What the last link makes of the inputs of the first one."""
        for link in self.links:
            made = link.call(*inputs)
            inputs = made if isinstance(made, tuple) else (made,)
        return made


def stages(
    links: Sequence[Link],
    count: int,
    where: Sequence[int | str] = (),
    costs: Sequence[float] | None = None,
) -> list[Stage]:
    """Cut links into `count` stages: before those that `where` names, or balanced.

    where: the first link of each stage but the first, by name or by number from 0. costs: of the
    links, such as `measured`; counted by default (`cost`). Raises UserError if that is no way to
    cut, or if a stage would have no parameters.
    """
    if count > len(links):
        raise UserError(
            f"{count} stages for a model of {len(links)} links ({_names(links)}): set mesh.pp or "
            "pipeline.chunks lower, or declare a longer chain"
        )
    if costs is None:
        costs = [cost(link) for link in links]
    starts = _given(links, count, where) if where else _balanced(links, count, costs)
    ends = [*starts[1:], len(links)]
    found = [
        Stage(number, tuple(links[start:end]))
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    for stage in found:
        if not stage.parameters:
            raise UserError(
                f"stage {stage.index} ({_names(stage.links)}) has no parameters: cut elsewhere "
                "(pipeline.stages)"
            )
    return found


def cost(link: Link) -> int:
    """Multiplications a position in forward: elements of weights that are not looked up."""
    return sum(
        p.numel()
        for module in link.modules
        if not isinstance(module, _LOOKED_UP)
        for p in module._parameters.values()
        if p.ndim > 1
    )


def measured(model: Module, inputs: Sequence[Any], rounds: int = 3) -> list[float]:
    """Seconds of each link of a model in forward, the least of some rounds.

    One link after the other has its parameters, which are let go again: no rank needs room for all.
    inputs: what the model is called with.
    """
    seconds = []
    values: Any = tuple(inputs)
    with evaluating(model):
        for link in links_of(model):
            times = []
            for _ in range(rounds + 1):  # the first warms up
                start = time.perf_counter()
                made = link.call(*values)
                times.append(time.perf_counter() - start)
            seconds.append(min(times[1:]))
            values = made if isinstance(made, tuple) else (made,)
            for parameter in link.parameters:
                parameter.forget()
    return seconds


def _given(links: Sequence[Link], count: int, where: Sequence[int | str]) -> list[int]:
    names = [link.name for link in links]
    if len(where) != count - 1:
        raise UserError(
            f"pipeline.stages={list(where)} begins {len(where) + 1} stages, but there are {count}: "
            f"name the first link of each but the first, {count - 1} of {_names(links)}"
        )
    starts = [0]
    for begin in where:
        if isinstance(begin, str) and begin not in names:
            raise UserError(f'pipeline.stages: "{begin}" is no link: there are {_names(links)}')
        start = names.index(begin) if isinstance(begin, str) else begin
        if not starts[-1] < start < len(links):
            raise UserError(
                f"pipeline.stages={list(where)}: each stage begins after the one before, with a "
                f"link from 1 to {len(links) - 1}, or its name"
            )
        starts.append(start)
    return starts


def _balanced(links: Sequence[Link], count: int, costs: Sequence[float]) -> list[int]:
    """The first link of each stage, so that the largest cost is least and all have parameters."""
    if len(costs) != len(links):
        raise UserError(f"{len(costs)} costs for {len(links)} links ({_names(links)}): one each")
    sums = [0.0, *accumulate(costs)]
    weights = [0, *accumulate(bool(link.parameters) for link in links)]
    # best[k][j]: of the first j links in k stages the least largest cost, then the most even ones
    # (by squares), and where the last stage begins
    best: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]
    for _ in range(count):
        row: dict[int, tuple[float, float, int]] = {}
        for end in range(1, len(links) + 1):
            ways = [
                (max(most, sums[end] - sums[start]), even + (sums[end] - sums[start]) ** 2, start)
                for start, (most, even, _) in best[-1].items()
                if start < end and weights[start] < weights[end]
            ]
            if ways:
                row[end] = min(ways)
        best.append(row)
    if len(links) not in best[count]:
        raise UserError(
            f"{count} stages, but only {weights[-1]} links have parameters: set mesh.pp or "
            "pipeline.chunks lower"
        )
    starts: list[int] = []
    end = len(links)
    for row in best[:0:-1]:
        end = row[end][2]
        starts.append(end)
    return starts[::-1]


def _names(links: Sequence[Link]) -> str:
    names = ", ".join(link.name for link in links)
    return names if len(names) <= 120 else f"{names[:120]}..."
