"""How long actions take: what a simulation assumes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from hpcml.errors import UserError
from hpcml.parallel.pipeline.actions import RECEIVES, Action, Kind

USUAL = {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0}
"""Two products of matrices in backward for one in forward. Other kinds take no time, except that
each half of a backward takes half as long as the whole."""

_KINDS = [kind for kind in Kind if kind not in RECEIVES]
"""What can have a cost: that of a message is its send's."""
_COST = re.compile(rf"(\d*)({'|'.join(_KINDS)})=(.+)", re.ASCII)


@dataclass(frozen=True)
class Costs:
    """Time of an action by kind, or by stage and kind, in any unit.

    The cost of a send is how long the message occupies the way between two ranks; `latency` is what
    it takes beyond that, while others may follow it.
    """

    kinds: Mapping[Kind, float] = field(default_factory=dict)
    stages: Mapping[tuple[int, Kind], float] = field(default_factory=dict)
    latency: float = 0.0

    def __post_init__(self) -> None:
        named = {f"{stage}{kind}": cost for (stage, kind), cost in self.stages.items()}
        named |= {str(kind): cost for kind, cost in self.kinds.items()}
        for name, value in {**named, "latency": self.latency}.items():
            if not 0 <= value < math.inf:
                raise UserError(f"{name}={value}: a cost is a number, 0 or more")

    def of(self, action: Action) -> float:
        """How long an action takes: the cost of its stage, else of its kind, else the usual one."""
        stage, kind, _ = action
        if (stage, kind) in self.stages:
            return self.stages[stage, kind]
        if kind in self.kinds:
            return self.kinds[kind]
        if kind in (Kind.INPUT, Kind.WEIGHT):
            return self.of(action._replace(kind=Kind.BACKWARD)) / 2
        return USUAL.get(kind, 0.0)

    @staticmethod
    def parse(text: str, latency: float = 0.0) -> Costs:
        """Read `F=1,B=2,3F=1.5`: forward 1, but 1.5 in stage 3. Raises UserError that says how."""
        kinds: dict[Kind, float] = {}
        stages: dict[tuple[int, Kind], float] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            match = _COST.fullmatch(part)
            try:
                value = float(match[3]) if match else math.nan
            except ValueError:
                value = math.nan
            if match is None or math.isnan(value):
                raise UserError(
                    f'cost "{part}": write kind=number, or with a stage, such as F=1,B=2,3F=1.5 '
                    f"(kinds: {', '.join(_KINDS)})"
                )
            kind = Kind(match[2])
            if match[1]:
                stages[int(match[1]), kind] = value
            else:
                kinds[kind] = value
        return Costs(kinds, stages, latency)
