"""The sections of a configuration: their keys, defaults, ranges and what they mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, get_type_hints

from hpcml.train.kinds import Chosen


def key(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    now: tuple[Any, ...] | None = None,
) -> Any:
    """Declare a key: `low` <= value <= `high`, `above` < value, in `now` what is available yet."""
    return field(
        default=default,
        metadata={
            "help": help,
            "choices": choices,
            "low": low,
            "high": high,
            "above": above,
            "now": now,
        },
    )


@dataclass(frozen=True)
class Run:
    """How long a run is, and where its results go."""

    dir: str = key("", "folder of the results (default: runs/<name of the configuration file>)")
    seed: int = key(0, "initial parameters, order of data and dropout depend on it", low=0)
    steps: int = key(1000, "updates of the parameters", low=1)
    log_every: int = key(10, "steps between lines of progress (0: none)", low=0)
    eval_every: int = key(0, "steps between validations (0: after the last step only)", low=0)
    eval_batches: int = key(
        0, "batches of a validation (0: the whole validation part, without overlap)", low=0
    )
    check_replicas: int = key(
        0, "steps between checks that data-parallel copies are the same bits (0: none)", low=0
    )
    trace: int = key(
        0, "steps whose timelines ranks keep for hpcml trace, from the second on (0: none)", low=0
    )
    deterministic: bool = key(
        False,
        "the same bits on any number of ranks, for the same train.microbatch, mesh.tp, cp and sp",
    )
    overwrite: bool = key(False, "replace the results in run.dir, if there are any")
    resume: bool = key(False, "go on from the last checkpoint in run.dir", now=(False,))


@dataclass(frozen=True)
class Data(Chosen):
    """What is learned from."""

    section: ClassVar[str] = "data"
    kind: str = key("text", "text, images, regression, or package.module:name of your own")


@dataclass(frozen=True)
class Model(Chosen):
    """What learns. What the data know (such as vocab_size) is filled in."""

    section: ClassVar[str] = "model"
    kind: str = key("gpt", "gpt, mlp, resnet, meshnet, or package.module:name of your own")
    init_from: str = key("", "a model.safetensors to start from (default: fresh parameters)")


@dataclass(frozen=True)
class Optim(Chosen):
    """How the parameters are updated."""

    section: ClassVar[str] = "optim"
    kind: str = key("adamw", "sgd, adam, adamw, or package.module:name of your own")
    grad_clip: float = key(0.0, "largest norm of the whole gradient (0: no limit)", low=0)
    schedule: str = key("constant", "course of lr after warm-up", choices=("constant", "cosine"))
    warmup: int = key(0, "steps in which lr rises linearly to its full value", low=0)
    min_lr: float = key(0.0, "lr at the end of the cosine", low=0)


@dataclass(frozen=True)
class Loss(Chosen):
    """What is minimised."""

    section: ClassVar[str] = "loss"
    kind: str = key(
        "",
        "next_token, cross_entropy, mse, or package.module:name of your own (default: the data's)",
    )


@dataclass(frozen=True)
class Callback(Chosen):
    """What is called with the record of metrics after every step."""

    section: ClassVar[str] = "callback"
    kind: str = key("", "package.module:name of your own (default: none)")


@dataclass(frozen=True)
class Train:
    """How much is computed at once, in which numbers."""

    global_batch: int = key(16, "samples per step, whatever the number of ranks", low=1)
    microbatch: int = key(0, "samples a rank computes at once (0: its whole share)", low=0)
    precision: str = key(
        "fp32",
        "number type of parameters and activations (fp64 for checks); with 16 bits the optimizer "
        "keeps parameters in fp32",
        choices=("fp32", "bf16", "fp16", "fp64"),
    )
    winograd: bool = key(
        False,
        "convolutions of 3x3 with a quarter of the multiplications and twice the rounding errors",
    )


@dataclass(frozen=True)
class Mesh:
    """Ranks along each axis; the product is the number of ranks started."""

    pp: int = key(1, "pipeline parallel, stages of the model", low=1)
    dp: int = key(0, "data parallel (0: all ranks that are left)", low=0)
    cp: int = key(1, "context parallel, along the sequence", low=1)
    sp_d: int = key(1, "spatially parallel, along the depth", low=1)
    sp_h: int = key(1, "spatially parallel, along the height", low=1)
    sp_w: int = key(1, "spatially parallel, along the width", low=1)
    tp: int = key(1, "tensor parallel, within a layer", low=1)


@dataclass(frozen=True)
class DataParallel:
    """How data-parallel ranks keep together."""

    mode: str = key(
        "sync",
        "gradients are averaged every step (sync), parameters every few (local), or gradients "
        "when they come (async)",
        choices=("sync", "local", "async"),
    )
    period: int = key(1, "steps between averages (mode local, or elastic)", low=1)
    staleness: int = key(0, "updates a gradient may miss (mode async)", low=0)
    sync_steps: int = key(0, "synchronous steps at the beginning (mode local)", low=0)
    elastic: float = key(
        0.0, "pull to a common centre every period, at most 1 / ranks (mode async; 0: none)", low=0
    )
    sync_batchnorm: bool = key(
        False, "batch norm takes its statistics over the microbatches of all data-parallel ranks"
    )
    overlap: str = key(
        "auto",
        "communicate in the background, beside compute: gradients, zero.stage=3's parameters, what "
        "tensor.sequence_parallel sends, halos (auto: where that gains, over several nodes)",
        choices=("auto", "always", "never"),
    )


@dataclass(frozen=True)
class Zero:
    """What data-parallel ranks hold in parts instead of copies."""

    stage: int = key(0, "0: nothing, 1: optimizer state, 2: gradients too, 3: all", low=0, high=3)
    bucket_mb: float = key(25.0, "MiB of gradients on their way at once, in three buckets", above=0)
    shard_ranks: int = key(0, "ranks that share one copy, the others have more (0: all)", low=0)
    split: str = key(
        "blocks",
        "what a rank owns: blocks of all layers, or whole layers, which it broadcasts (naive)",
        choices=("blocks", "layers"),
    )


@dataclass(frozen=True)
class Pipeline:
    """How the stages of a pipeline work through microbatches."""

    schedule: str = key(
        "1f1b",
        "naive, gpipe, 1f1b, interleaved, zero-bubble, a file, or package.module:function of your "
        "own (see hpcml schedule); with late gradients pipedream, pipedream-2bw",
    )
    chunks: int = key(1, "stages of a rank (1: as many as the schedule likes)", low=1)
    vertical_sync: bool = key(
        False, "all stages use the first one's version of the weights (pipedream)"
    )
    balance: str = key(
        "counted",
        "stages of equal cost, by multiplications (counted) or by time (measured, at the start)",
        choices=("counted", "measured"),
    )
    activations: str = key(
        "keep",
        "of a microbatch until its backward: keep, drop and compute again, or offload to a file",
        choices=("keep", "drop", "offload"),
    )
    offload_dir: str = key("", "folder of that file (default: the system's for temporary files)")
    stages: tuple[int | str, ...] = key(
        (), "first link of each stage but the first, by name or number (default: balanced)"
    )


@dataclass(frozen=True)
class Spatial:
    """Where ranks that divide images come together, beside where the model says."""

    end: str = key("", "the layers at which they do, a pattern of names, such as layer4")
    style: str = key(
        "gather",
        "from there on all compute the same (gather), or each some of the samples (samples)",
        choices=("gather", "samples"),
    )


@dataclass(frozen=True)
class TensorParallel:
    """How layers are split over tensor-parallel ranks."""

    split: str = key(
        "megatron",
        "pairs of layers with one sum (megatron), or a sum after each layer, to count (naive)",
        choices=("megatron", "naive"),
    )
    sequence_parallel: bool = key(
        False, "tensor-parallel ranks divide sequences where they do not divide layers"
    )
    partition_activations: str = key(
        "no",
        "keep a part only of what all ranks save alike, and gather it for backward (cpu: in host "
        "memory)",
        choices=("no", "yes", "cpu"),
    )


@dataclass(frozen=True)
class Device:
    """Where ranks compute."""

    kind: str = key("cpu", "cpu or cuda", choices=("cpu", "cuda"))
    memory_limit: int = key(0, "bytes per rank (0: no limit)", low=0)


@dataclass(frozen=True)
class Config:
    """All sections of a configuration."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    loss: Loss = field(default_factory=Loss)
    callback: Callback = field(default_factory=Callback)
    train: Train = field(default_factory=Train)
    mesh: Mesh = field(default_factory=Mesh)
    data_parallel: DataParallel = field(default_factory=DataParallel)
    zero: Zero = field(default_factory=Zero)
    pipeline: Pipeline = field(default_factory=Pipeline)
    spatial: Spatial = field(default_factory=Spatial)
    tensor: TensorParallel = field(default_factory=TensorParallel)
    device: Device = field(default_factory=Device)


SECTIONS: dict[str, type[Any]] = get_type_hints(Config)
"""The sections by name."""
