"""All parts of a run, made from its configuration and checked before anything is written."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from hpcml import backend
from hpcml.comm import Mesh
from hpcml.comm.guard import agree
from hpcml.data import Batches, Data, as_data
from hpcml.errors import UserError
from hpcml.nn import Module, use_winograd
from hpcml.optim import Optimizer
from hpcml.parallel import Step, parallelize, threads
from hpcml.parallel.batch import as_tensor, samples_of
from hpcml.parallel.pipeline.partition import measured
from hpcml.parallel.scores import Metric
from hpcml.train import kinds, log, weights
from hpcml.train.config import Config
from hpcml.train.log import logger
from hpcml.train.run_dir import RunDir

OVERLAP = {"auto": None, "always": True, "never": False}


@dataclass
class Run:
    """What a run consists of."""

    config: Config
    mesh: Mesh
    data: Data
    step: Step
    folder: RunDir
    callback: Callable[[dict[str, Any]], Any] | None


def begin(config: Config) -> tuple[Mesh, list[dict[str, Any]]]:
    """The mesh of a configuration, and what each rank runs on. Collective."""
    mesh = Mesh(deterministic=config.run.deterministic, **asdict(config.mesh))
    agree(mesh.world, partial(log.setup, mesh.rank))
    ranks = agree(mesh.world, partial(threads.share, mesh))
    use = partial(backend.use_device, config.device.kind, mesh.node.local_rank)
    device = agree(mesh.world, use)
    threads_of = ranks[mesh.rank]["threads"]
    logger.info("%s on %s, %s, %d thread(s)", mesh, mesh.node.host, device, threads_of)
    return mesh, ranks


def build(config: Config, mesh: Mesh) -> Run:
    """Make everything, all ranks agreeing, the cheap checks first. Collective.

    The folder of the results is claimed last: with a mistake anywhere, nothing is lost.
    """
    folder = RunDir(config.run.dir)
    agree(mesh.world, partial(folder.check, config.run.overwrite))
    data = agree(mesh.world, partial(load_data, config))
    model = agree(mesh.world, partial(build_model, config, data.info))
    config = with_loss(config, data)
    loss = agree(mesh.world, partial(kinds.build, config.loss))
    callback = None
    if config.callback.kind:
        callback = agree(mesh.world, partial(_build_callback, config))
    costs = None
    if config.pipeline.balance == "measured" and mesh["pp"].size > 1:
        another = agree(mesh.world, partial(build_model, config, data.info))
        costs = measured_costs(config, mesh, data, another)
    step = make_step(config, mesh, model, loss, costs, data.metrics)
    agree(mesh.world, partial(step.plan, config.train.global_batch))
    try_sample(step, data)
    logger.info("%s, loss and data fit", type(model).__name__)
    claim = partial(folder.claim, config.run.overwrite)
    agree(mesh.world, claim if mesh.rank == 0 else lambda: None)
    return Run(config, mesh, data, step, folder, callback)


def _build_callback(config: Config) -> Callable[[dict[str, Any]], Any]:
    made = kinds.build(config.callback)
    try:
        inspect.signature(made).bind({})
    except TypeError as error:
        raise UserError(
            f'callback.kind="{config.callback.kind}" must be callable with one argument, the '
            f"record of a step: {error}"
        ) from None
    return made  # type: ignore[no-any-return]


def load_data(config: Config) -> Data:
    """Make the data of a configuration."""
    data = as_data(kinds.build(config.data, {"seed": config.run.seed}))
    logger.info("data: %d samples, offering %s", len(data.train), dict(data.info))
    return data


def with_loss(config: Config, data: Data) -> Config:
    """The configuration with the loss that suits the data, unless it chose one itself."""
    if config.loss.kind:
        return config
    return replace(config, loss=kinds.choose(config.loss, data.loss))


def build_model(config: Config, info: Mapping[str, Any]) -> Module:
    """Make the model of a configuration for data that offer `info`."""
    model = kinds.build(config.model, info)
    if not isinstance(model, Module):
        raise UserError(
            f'model.kind="{config.model.kind}" made a {type(model).__name__}: it must derive from '
            "hpcml.nn.Module"
        )
    model.to(backend.dtype(config.train.precision))
    if config.train.winograd:
        use_winograd(model)
    if config.model.init_from:
        weights.load(model, config.model.init_from)
    model.to(config.device.kind)
    return model


def make_step(
    config: Config, mesh: Mesh, model: Module, loss: Any, costs: Sequence[float] | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> Step:  # fmt: skip
    """The training step of a configuration; costs: of the model's links. Collective."""

    def optimizer(parameters: Any) -> Optimizer:
        return kinds.build(config.optim, {}, parameters)  # type: ignore[no-any-return]

    together = config.data_parallel
    return parallelize(
        model, loss=loss, optimizer=optimizer, mesh=mesh, microbatch=config.train.microbatch,
        grad_clip=config.optim.grad_clip, seed=config.run.seed, groups=decay_matrices,
        zero=config.zero.stage, bucket_mb=config.zero.bucket_mb,
        shard_ranks=config.zero.shard_ranks, zero_split=config.zero.split,
        schedule=config.pipeline.schedule, chunks=config.pipeline.chunks,
        vertical_sync=config.pipeline.vertical_sync,
        stages=config.pipeline.stages, costs=costs, activations=config.pipeline.activations,
        offload_dir=config.pipeline.offload_dir, tensor_split=config.tensor.split,
        sequence_parallel=config.tensor.sequence_parallel,
        partition_activations=config.tensor.partition_activations, metrics=metrics,
        spatial_end=config.spatial.end, spatial_style=config.spatial.style,
        **{**asdict(together), "overlap": OVERLAP[together.overlap]},
    )  # fmt: skip


def measured_costs(config: Config, mesh: Mesh, data: Data, model: Module) -> list[float]:
    """Seconds of the links of a model for a microbatch, by the first rank. Collective."""

    def measure() -> list[float]:
        if mesh.rank > 0:
            return []
        count = config.train.microbatch or config.train.global_batch
        fields = samples_of(next(iter(Batches(data.train, count, None))), slice(0, count))
        kind = backend.dtype(config.train.precision)
        return measured(
            model.name_parts(), [as_tensor(one, kind, config.device.kind) for one in fields[:-1]]
        )

    return mesh.world.broadcast_object(agree(mesh.world, measure))


def decay_matrices(model: Module) -> list[dict[str, Any]]:
    """Parameter groups: weight decay for matrices, none for biases and scales, as in GPT-2."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def try_sample(step: Step, data: Data) -> None:
    """Evaluate a few samples, so that a model or loss that does not fit the data says so now.

    Two, which must be alike, unless ranks compute one at once. Collective. Where ranks need each
    other to compute, one that refuses alone cannot ask the others to agree, which wait for it in
    the model: it ends the job.
    """
    mesh, tried = step.mesh, partial(_try_sample, step, data)
    if mesh.size > step.axis.size or step.zero.gathers:
        tried()
    else:
        agree(mesh.world, tried)


def _try_sample(step: Step, data: Data) -> None:
    samples = min(2, step.microbatch or 2)
    try:
        step.try_batch(next(iter(Batches(data.train, samples, None))))
    except UserError:
        raise
    except (ValueError, TypeError, IndexError) as error:
        logger.debug("the first samples failed", exc_info=True)
        raise UserError(
            f"model and loss do not take a sample of the data: {kinds.one_line(error)}"
        ) from error
