"""Pipeline parallelism: schedules as data, proven before they run.

A schedule is a table of compute actions (`actions`), written by a small function (`schedules`), a
file (`text`) or the user (`find`). `check` says what is wrong with it, `lower` adds messages and
everything else that ranks do, `simulate` says what it costs.

    schedule = find("1f1b", ranks=4, microbatches=8)
    print(simulate(lower(schedule), Costs.parse("F=1,B=2", latency=0.1)).bubble)
"""

from hpcml.parallel.pipeline.actions import Action, Kind, Schedule, ScheduleError, Weights, table
from hpcml.parallel.pipeline.check import check
from hpcml.parallel.pipeline.costs import Costs
from hpcml.parallel.pipeline.find import find
from hpcml.parallel.pipeline.lowering import lower
from hpcml.parallel.pipeline.schedules import SCHEDULES
from hpcml.parallel.pipeline.simulate import Simulation, simulate
from hpcml.parallel.pipeline.text import parse, write
from hpcml.parallel.pipeline.versions import versions

__all__ = [
    "SCHEDULES",
    "Action",
    "Costs",
    "Kind",
    "Schedule",
    "ScheduleError",
    "Simulation",
    "Weights",
    "check",
    "find",
    "lower",
    "parse",
    "simulate",
    "table",
    "versions",
    "write",
]
