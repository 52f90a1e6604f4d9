"""From a serially written model to a training step on a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from hpcml import rng
from hpcml.comm import Mesh, launch
from hpcml.comm.grid import AXES
from hpcml.comm.guard import agree
from hpcml.errors import UserError
from hpcml.nn import Module
from hpcml.optim import Optimizer
from hpcml.parallel import groups, modes, spatial, tensor, threads
from hpcml.parallel.batchnorm import synchronise, turn_of
from hpcml.parallel.data import broadcast_parameters
from hpcml.parallel.division import Division
from hpcml.parallel.gathering import detach
from hpcml.parallel.pipeline.assemble import Assembly, assemble, placement
from hpcml.parallel.pipeline.asynchronous import AsynchronousStep
from hpcml.parallel.pipeline.chain import cuttable
from hpcml.parallel.pipeline.schedules import ASYNCHRONOUS
from hpcml.parallel.pipeline.step import PipelineStep
from hpcml.parallel.scores import Metric
from hpcml.parallel.step import LossFunction, Step
from hpcml.parallel.zero import Zero

GroupsOf = Callable[[Module], Iterable[Any]]


def parallelize(
    model: Module,
    *,
    loss: LossFunction | None = None,
    optimizer: Callable[..., Optimizer],
    mesh: Mesh | None = None,
    zero: int = 0,
    microbatch: int = 0,
    grad_clip: float = 0.0,
    seed: int | None = None,
    groups: GroupsOf | None = None,
    bucket_mb: float = 25.0,
    shard_ranks: int = 0,
    zero_split: str = "blocks",
    overlap: bool | None = None,
    mode: str = "sync",
    period: int = 1,
    staleness: int = 0,
    sync_steps: int = 0,
    elastic: float = 0.0,
    sync_batchnorm: bool = False,
    spatial_end: str = "",
    spatial_style: str = "gather",
    tensor_split: str = "megatron",
    sequence_parallel: bool = False,
    partition_activations: str = "no",
    schedule: str = "1f1b",
    chunks: int = 1,
    stages: Sequence[int | str] = (),
    costs: Sequence[float] | None = None,
    activations: str = "keep",
    offload_dir: str = "",
    vertical_sync: bool = False,
    metrics: Mapping[str, Metric] | None = None,
    **settings: Any,
) -> Step:
    """Make a training step of a serially written model: `loss_value = step(batch)`.

    loss: called as loss(model(*inputs), target) for a batch (*inputs, target); it must be a mean
        over samples, because microbatches count by their samples (not by the targets that an
        `ignore_index` leaves). None: the model is called with the whole batch and returns the loss.
        One that takes divided classes (`nn.CrossEntropyLoss`) gets this rank's with tensor
        parallelism, any other all outputs.
    optimizer: a class such as `hpcml.optim.AdamW`, made with `settings` (lr=..., ...).
    mesh: where to run; all ranks along "dp" by default. Axes "tp" and "cp" divide the model as its
        `splits` declare (`hpcml.parallel.tensor`); "sp_d", "sp_h" and "sp_w" divide images, up to
        where its `spatial` says (`hpcml.parallel.spatial`).
    zero: stage of ZeRO: 0 copies everything; 1 divides the optimizer's state among the ranks, 2 the
        gradients too, 3 the parameters too.
    microbatch: samples computed at once; 0 for a rank's whole share.
    grad_clip: largest norm of the gradient; 0 for none.
    seed: parameters without values are made from it and their names, dropout masks too; by default
        the seed of `hpcml.manual_seed`.
    groups: model -> parameter groups, for settings by group; all parameters alike by default.
    bucket_mb: MiB of gradients on their way at once, as far as single parameters allow: buckets of
        a third of it, one that is filled, one that is reduced, one that may be long in use.
    shard_ranks: ranks that divide one copy of the states (neighbours), the others replicate it; 0
        for all. It must divide the number of data-parallel ranks.
    zero_split: "blocks", or "layers" for whole layers with an owner each that broadcasts them, the
        naive way, to count against.
    overlap: communicate in the background: gradients during backward, beside the products of
        linear layers what `sequence_parallel` sends, and halos beside the interior of convolutions;
        by default where that gains.
    mode: "sync"; "local": every rank updates by itself, and parameters are averaged every `period`
        steps, after `sync_steps` synchronous ones; or "async": each adds its gradients to sums
        when it has them, and they may miss `staleness` updates. After training, call
        `step.settle()`.
    elastic: with "async", ranks train by themselves and are drawn to a common centre by this
        factor every `period` steps; `staleness` then counts such rounds.
    sync_batchnorm: batch norm takes its statistics over the microbatches that all data-parallel
        ranks compute at the same time, as PyTorch's SyncBatchNorm does; else each of its own.
    spatial_end: a pattern of names of modules at which the ranks that divide images come together,
        before those where the model's `spatial` says so, and in which style: "gather" or "samples".
    tensor_split: "megatron", or "naive" with a sum over the ranks after each layer, to count
        against.
    sequence_parallel: tensor-parallel ranks divide sequences where they do not divide features.
    partition_activations: "yes" if each of these ranks keeps its part only of what all would save
        for backward, and gathers it then (P_a of ZeRO-R); "cpu" to keep it in host memory.
    schedule: of the pipeline along the axis "pp", which divides the model's `chain`: "naive",
        "gpipe", "1f1b", "interleaved", "zero-bubble", a file or `package.module:function`
        (`hpcml.parallel.pipeline`). chunks: stages that a rank has, with "interleaved". stages:
        the links with which stages begin, but for the first; balanced by default. costs: of the
        links, by which they are balanced; by default multiplications are counted. activations: what
        becomes of those of a microbatch until its backward: "keep", "drop" (and compute them again
        from the stage's inputs) or "offload" (to a file in `offload_dir`; from a GPU to the host).
        "pipedream" and "pipedream-2bw" update while other microbatches are under way, which use
        earlier weights; vertical_sync: with "pipedream", all stages those of as many updates. After
        training, call `step.settle()`.
    metrics: functions of outputs and targets, such as `nn.evaluation.accuracy`, by name: their mean
        over samples is in `step.scores` after a step (with "async" those of this rank) and in what
        `step.measure` returns.

    Without a number of threads (`backend.set_threads`) the processes of a node share its cores, or
    each has OMP_NUM_THREADS. Raises UserError for what this version cannot do.
    """
    mesh = Mesh() if mesh is None else mesh
    _check(mesh, microbatch, grad_clip, bucket_mb)
    _check_schedule(mesh, schedule, vertical_sync)
    make = modes.choose(
        mesh, mode, period=period, staleness=staleness, sync_steps=sync_steps, elastic=elastic
    )
    if mode == "sync":
        divided = groups_of(mesh, zero, shard_ranks, zero_split)
    else:
        divided = modes.groups_of(
            mesh, mode, model, {"stage": zero, "shard_ranks": shard_ranks, "split": zero_split}
        )
    if launch.read().size > 1:
        agree(mesh.world, partial(threads.share, mesh, keep=True))
    if any(parameter.device != "cpu" for parameter in model.parameters()):
        _ = mesh.world.takes_gpu_memory  # found out once, for all axes
    seed = rng.seed() if seed is None else seed
    turn = turn_of(mesh, sync_batchnorm, mode)
    model.name_parts()
    detach(model.parameters())
    if spatial.ranks_of(mesh) > 1:
        division: Division = spatial.divide(
            model, loss, mesh, overlap=overlap, turn=turn, end=spatial_end, style=spatial_style
        )
    else:
        division = tensor.divide(
            model, loss, mesh, how=tensor_split, sequence_parallel=sequence_parallel,
            overlap=overlap, partition_activations=partition_activations,
        )  # fmt: skip
        if turn is not None:
            synchronise(model, mesh["dp"], turn)
    division.turn = turn
    _check_metrics(metrics, division)
    given = groups(model) if groups else list(model.parameters())
    assembly = cut(model, mesh, schedule, chunks, stages, costs)
    if assembly is not None:
        given = assembly.groups(given)
        if mesh["pp"].size > 1:
            kind: Callable[..., Step] = PipelineStep
            if schedule in ASYNCHRONOUS:
                kind = partial(AsynchronousStep, vertical_sync=vertical_sync)
            make = partial(
                kind, assembly=assembly, schedule=schedule, chunks=chunks,
                activations=activations, offload_dir=offload_dir,
            )  # fmt: skip
    with rng.samples(seed, 0):  # first values depend on the seed and the names alone
        made = agree(mesh.world, partial(_made, optimizer, given, settings))
        states = Zero(
            model, made, divided,
            bucket_mb=bucket_mb, overlap=overlap, deterministic=mesh.deterministic,
            held=None if assembly is None else assembly.held,
        )  # fmt: skip
    return make(
        model, division, mesh, states, microbatch=microbatch, grad_clip=grad_clip, seed=seed,
        metrics=metrics,
    )  # fmt: skip


def _made(make: Callable[..., Optimizer], given: Any, settings: dict[str, Any]) -> Optimizer:
    made = make(given, **settings)
    if not isinstance(made, Optimizer):
        raise UserError(
            f"optimizer made a {type(made).__name__}: it must derive from hpcml.optim.Optimizer"
        )
    return made


def cut(
    model: Module,
    mesh: Mesh,
    schedule: str,
    chunks: int,
    where: Sequence[int | str],
    costs: Sequence[float] | None,
) -> Assembly | None:
    """The stages of a model along the axis "pp"; None where there is no need to cut it.

    In deterministic mode one rank cuts it too, wherever it can be cut: the same bits on any number
    of ranks need the same sums.
    """
    axis = mesh["pp"]
    broadcast_parameters(model.parameters(), axis)
    if axis.size > 1:
        rank_of = placement(schedule, axis.size, chunks)
    elif mesh.deterministic and cuttable(model):
        rank_of, where = (0,), ()
    else:
        return None
    return assemble(
        model, rank=axis.rank, rank_of=rank_of, where=where, costs=costs,
        apart=mesh.deterministic,
    )  # fmt: skip


def _check(mesh: Mesh, microbatch: int, grad_clip: float, bucket_mb: float) -> None:
    """Refuse what can never be."""
    for name, size in mesh.sizes.items():
        if size > 1 and name not in AXES:
            raise UserError(f"mesh.{name}={size} is not available in this version: mesh.{name}=1")
    if microbatch < 0:
        raise UserError(f"microbatch={microbatch} must be 0 (a rank's whole share) or more")
    if not grad_clip >= 0:
        raise UserError(f"grad_clip={grad_clip} must be 0 (no limit) or more")
    if not 0 < bucket_mb < math.inf:
        raise UserError(f"zero.bucket_mb={bucket_mb} must be more than 0, and finite")


def _check_schedule(mesh: Mesh, schedule: str, vertical_sync: bool) -> None:
    """Refuse what makes no sense of a schedule with updates."""
    if vertical_sync and schedule != "pipedream":
        raise UserError(
            f"pipeline.vertical_sync=true with pipeline.schedule={schedule}: only pipedream has "
            "versions to choose from: use that, or vertical_sync=false"
        )
    if schedule in ASYNCHRONOUS and mesh["pp"].size == 1:
        raise UserError(
            f"pipeline.schedule={schedule} with mesh.pp=1: one stage has nothing to go on with "
            "meanwhile: set mesh.pp=2 or more, or pipeline.schedule=1f1b"
        )


def _check_metrics(metrics: Mapping[str, Metric] | None, division: Division) -> None:
    """Refuse metrics without outputs."""
    if metrics and division.loss is None:
        raise UserError(
            f"metrics={', '.join(metrics)} of a model that returns its loss: there are no outputs "
            "to measure: give parallelize the loss, or leave metrics out"
        )


def groups_of(mesh: Mesh, zero: int, shard_ranks: int, split: str) -> groups.Groups:
    """The ranks that divide the states; refuses what does not go together."""
    if split not in ("blocks", "layers"):
        raise UserError(f'zero.split="{split}" is unknown: use "blocks" or "layers"')
    if split == "layers" and mesh.deterministic:
        raise UserError(
            'zero.split="layers" does not keep the order of additions: use "blocks" with '
            "run.deterministic=true"
        )
    return groups.divide(mesh, zero, shard_ranks, split == "layers")
