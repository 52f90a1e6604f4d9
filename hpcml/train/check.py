"""A step or two of a configured run, serial and parallel side by side, and where they part.

Every rank computes the serial run too, from the same parameters, batch and random numbers, and
compares what it has itself with that: first values, what goes in and out of every module in its
first microbatch, gradients, loss, norm and update. What differs first in the order of computation
is where a fault is; everything after it may be a consequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from hpcml.backend import Array
from hpcml.comm import Mesh
from hpcml.comm.alone import Alone
from hpcml.comm.guard import agree
from hpcml.data import Batches
from hpcml.errors import NonFiniteError, UserError
from hpcml.optim import clip_scale
from hpcml.parallel import Step, data
from hpcml.parallel.data import broadcast_parameters
from hpcml.parallel.finite import quiet
from hpcml.parallel.pipeline.schedules import ASYNCHRONOUS
from hpcml.train import kinds
from hpcml.train.build import build_model, load_data, make_step, try_sample, with_loss
from hpcml.train.compare import Item
from hpcml.train.config import Config
from hpcml.train.sections import DataParallel, TensorParallel, Zero
from hpcml.train.verdict import STAGES, Report
from hpcml.train.watch import MODEL, Event, Seen, Watch, add_up

STEPS = {"fp64": 2, "fp32": 1, "bf16": 1, "fp16": 1}
"""The second shows what first values hide, such as a bias of zero that is added by every rank. With
fewer digits than fp64 rounding would count in it (see `UPDATE_TOLERANCE`)."""


def check(config: Config, mesh: Mesh) -> Report:
    """Compare the run of `config` on a mesh with the same run of one process. Collective.

    Raises UserError on all ranks alike for bad input, and for a serial run that is no good itself.
    """
    if config.data_parallel.mode != "sync":
        raise UserError(
            f"data_parallel.mode={config.data_parallel.mode} is another algorithm than the serial "
            "one: check data_parallel.mode=sync"
        )
    if config.data_parallel.sync_batchnorm and mesh["dp"].size > 1:
        raise UserError(
            "data_parallel.sync_batchnorm=true takes statistics over what ranks compute together, "
            "and one rank has that of a microbatch: check data_parallel.sync_batchnorm=false"
        )
    if config.pipeline.schedule in ASYNCHRONOUS:
        raise UserError(
            f"pipeline.schedule={config.pipeline.schedule} is another algorithm than the serial "
            "one: check pipeline.schedule=1f1b"
        )
    found = agree(mesh.world, partial(load_data, config))
    config = with_loss(config, found)
    serial, parallel = _copies(config, mesh, found.info)
    for step in (serial, parallel):
        agree(mesh.world, partial(step.plan, config.train.global_batch))
        try_sample(step, found)
        step.scaler = None  # both compute without
    report = Report({name: n for name, n in mesh.sizes.items() if n > 1}, config.train.precision)
    steps = STEPS[config.train.precision]
    for batch in Batches(found.train, config.train.global_batch, config.run.seed, 0, steps):
        report.steps += 1
        _step(report, serial, parallel, batch)
        if not report.agrees:
            break
    return report


def _copies(config: Config, mesh: Mesh, info: Mapping[str, Any]) -> tuple[Step, Step]:
    """The serial and the parallel step, from the same first values. Collective."""
    models = [agree(mesh.world, partial(build_model, config, info)) for _ in range(2)]
    loss = agree(mesh.world, partial(kinds.build, config.loss))
    broadcast_parameters(
        models[0].parameters(), mesh.world
    )  # those that are given, as `parallelize` does
    for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        if mine.has_values:
            other.assign(mine.data)
    train = config.train
    first = data.part(0, train.global_batch, train.microbatch, mesh["dp"].size)
    alone = replace(
        config, train=replace(train, microbatch=first.stop), zero=Zero(), tensor=TensorParallel(),
        data_parallel=DataParallel(),
    )  # fmt: skip
    serial = make_step(alone, Mesh(Alone()), models[0], loss)
    return serial, make_step(config, mesh, models[1], loss)


# --- a step -------------------------------------------------------------------------------------


@dataclass
class _Run:
    """What one of the two has come to in a step."""

    seen: dict[Event, Seen]
    """Of a microbatch."""
    parameters: dict[str, dict[str, Array]]
    """First values, gradients and updates by name, of each stage that has them."""
    numbers: dict[str, float]
    """The loss and the norm."""


def _step(report: Report, serial: Step, parallel: Step, batch: Any) -> None:
    """Make a step with both and compare them. Collective."""
    first = next(data.microbatches(len(batch), parallel.microbatch, parallel.axis), None)
    # Both divide the batch into the same microbatches; a rank may have none of them.
    expected = _run(serial, batch, None if first is None else first.number)
    agree(parallel.mesh.world, partial(_require_finite, expected.numbers))
    found = _run(parallel, batch, None if first is None else 0)
    pipelined = parallel.mesh["pp"].size > 1
    for stage in STAGES:
        if stage != "first values" or report.steps == 1:  # later they are what the update made
            report.add(stage, _items(stage, expected, found, pipelined), parallel)


def _require_finite(numbers: Mapping[str, float]) -> None:
    if not all(map(math.isfinite, numbers.values())):
        raise NonFiniteError(
            f"the serial run has loss {numbers['loss']} and gradient norm {numbers['norm']}: there "
            "is nothing to compare with; lower the learning rate or look at the data"
        )


@quiet
def _run(step: Step, batch: Any, number: int | None) -> _Run:
    """Make an update, watching a microbatch; every rank makes the same calls whatever comes."""
    before = _copied(step.gathered())
    watch = Watch(step, number)
    with watch.listening():
        losses = step.compute(batch)
    add_up(watch.seen, step.division)
    loss = math.fsum(step.total(losses))
    factor = step.complete()
    norm = step.zero.norm() * factor
    gradients = _copied(step.gathered_gradients(), factor)
    step.zero.update(clip_scale(norm, step.grad_clip) * factor)
    changes = {name: array - before[name] for name, array in step.gathered()}
    parameters = {"first values": before, "gradient": gradients, "update": changes}
    return _Run(watch.seen, parameters, {"loss": loss, "norm": norm})


def _copied(named: Iterable[tuple[str, Array]], factor: float = 1.0) -> dict[str, Array]:
    return {name: array * array.dtype.type(factor) for name, array in named}


def _items(stage: str, expected: _Run, found: _Run, pipelined: bool) -> dict[Event, Item]:
    """What there is to compare of a stage, in order."""
    if stage in expected.numbers:
        pair = np.array(expected.numbers[stage]), np.array(found.numbers[stage])
        what = "gradient norm" if stage == "norm" else stage
        return {Event(stage, MODEL, what): Item(*pair, maker=MODEL)}
    if stage in expected.parameters:
        items = {}
        for name, array in expected.parameters[stage].items():
            layer, _, what = name.rpartition(".")
            other = found.parameters[stage][name]
            items[Event(stage, layer or MODEL, what)] = Item(array, other, layer or MODEL)
        return items
    return {
        event: _activation(event, seen, expected, found, pipelined)
        for event, seen in expected.seen.items()
        if event.stage == stage
    }


def _activation(event: Event, seen: Seen, expected: _Run, found: _Run, pipelined: bool) -> Item:
    item = Item(seen.values, None, seen.maker)
    other = found.seen.get(event)
    if other is not None:
        item.parallel, item.place = other.values, other.place
        if event.stage == "backward":
            item.serial = seen.values * seen.values.dtype.type(other.place.share)
    item.elsewhere = other is None and pipelined
    if (event.stage, event.what) == ("forward", "output"):
        item.bias = expected.parameters["first values"].get(f"{event.layer}.bias")
    return item
