"""What a run writes beside its metrics: where it starts from, and what it ends with."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcml.comm.guard import agree
from hpcml.data import Data
from hpcml.errors import UserError
from hpcml.models.generate import Predict, generate
from hpcml.nn import Module
from hpcml.train import config as configuration
from hpcml.train import environment, usage, weights
from hpcml.train.build import Run
from hpcml.train.progress import Progress

SAMPLE = 200  # tokens of the text that is shown at the end


def begin(run: Run, ranks: list[dict[str, Any]], progress: Progress) -> None:
    """Write the configuration, the environment and what the data offer (first rank only)."""
    config, folder, data = run.config, run.folder, run.data
    (folder / "config.toml").write_text(configuration.dump(config))
    folder.write_json("env.json", {"mesh": run.mesh.sizes, **environment.describe(ranks)})
    info = {name: value for name, value in data.info.items() if _plain(value)}
    folder.write_json(
        "data.json",
        {"info": info, "tokenizer": data.tokenizer.to_dict() if data.tokenizer else None},
    )
    if run.mesh.size > 1:
        progress.say(run.mesh.describe())
    progress.say(
        f"{config.model.kind} with {count(run.step.model):,} parameters, {len(data.train):,} "
        f"samples, {config.run.steps:,} steps of {config.train.global_batch} samples, "
        f"{ranks[0]['threads']} thread(s) a rank"
    )


@dataclass(frozen=True)
class Ending:
    """How a run ended: `exit` is "completed", "interrupted", "non-finite" or "failed".

    `together`: all ranks have come to the same end. Otherwise the first rank is alone with it.
    """

    exit: str
    together: bool
    seconds: float
    loss: float | None
    validation: Mapping[str, float]
    """The last one's loss, "val_loss", and metrics; empty if there was none."""


def end(run: Run, progress: Progress, ending: Ending) -> None:
    """Write the weights and, last, the summary; say how it went.

    Collective if `ending.together`; otherwise for the first rank only. A run that ended in
    "non-finite" or "failed" leaves no weights. What lies in parts on the ranks cannot be had from
    one alone: then there are no weights and no `param_hash`.
    """
    if ending.together:
        used = usage.memory_record(run.mesh.world)  # before the work of the ending itself
        agree(run.mesh.world, lambda: _write(run, ending))
        progress.say(_memory_table(run, used))
        _show_sample(run, progress, ending)
    else:
        _write(run, ending)
    losses = [f"loss {ending.loss:.4f}"] if ending.loss is not None else []
    losses += [f"{name} {value:.4f}" for name, value in ending.validation.items()]
    steps = run.step.steps
    progress.say(
        f"{ending.exit} after {steps} steps in {ending.seconds:.1f} s: {', '.join(losses)}"
    )
    progress.say(f"results in {run.folder.path}")


def _write(run: Run, ending: Ending) -> None:
    """Write the files of the end; the other ranks help to gather what goes into them."""
    step = run.step
    digest = None
    late = _staleness(run) if ending.together else {}
    if ending.together or not step.collective:
        buffers = step.gathered_buffers()
        entries = step.gathered()
        if run.mesh.rank > 0:
            for _ in entries:
                pass
        elif ending.exit in ("completed", "interrupted"):
            digest = weights.save(step.model, entries, run.folder / "model.safetensors", buffers)
        else:
            digest = weights.fingerprint(entries)
    if run.mesh.rank == 0:
        run.folder.write_json(
            "summary.json",
            {
                "final_loss": ending.loss,
                "val_loss": None,
                **ending.validation,
                "steps": step.steps,
                "params": count(step.model),
                "param_hash": digest,
                "seconds": ending.seconds,
                "exit": ending.exit,
                **late,
            },
        )


def _staleness(run: Run) -> dict[str, Any]:
    """How late gradients were over all ranks and steps, where they may be. Collective."""
    if run.step.staleness is None:
        return {}
    every = run.mesh.world.allgather_object(run.step.staleness.record())
    mean = sum(one["mean"] for one in every) / len(every)
    return {"staleness": {"mean": mean, "max": max(one["max"] for one in every)}}


def _plain(value: Any) -> bool:
    """Whether JSON can hold it: a number, a text or a tuple of these."""
    return np.isscalar(value) or (isinstance(value, tuple) and all(map(np.isscalar, value)))


def _memory_table(run: Run, used: usage.Record) -> str:
    sharding, held = run.step.groups.sharding, run.step.zero.held.parameters
    # Of the rank that has most, as the record.
    counts = [sum(p.numel() for p in chosen)
              for chosen in (held, [p for p in held if p.requires_grad])]  # fmt: skip
    params, trainable = max(run.mesh.world.allgather_object(counts))
    return usage.memory_table(
        used,
        params=params,
        trainable=trainable,
        stage=sharding.stage,
        ranks=run.step.groups.shard.size,
        precision=run.config.train.precision,
        states=len(run.step.optimizer.states),
    )


def _show_sample(run: Run, progress: Progress, ending: Ending) -> None:
    """Show what a language model writes. All ranks make it: the model may be in parts on them."""
    wanted = ending.exit == "completed" and run.config.run.log_every > 0
    if wanted and run.data.tokenizer is not None:
        text = sample_text(run.step.predict, run.data, "\n", SAMPLE).strip()
        progress.say(f"\nA sample:\n{text}\n")


def count(model: Module) -> int:
    """Number of parameters, of all ranks together."""
    return sum(math.prod(parameter.whole_shape) for parameter in model.parameters())


def sample_text(
    model: Module | Predict, data: Data, prompt: str, tokens: int, temperature: float = 0.8,
    top_k: int = 0, seed: int = 0,
) -> str:  # fmt: skip
    """Return `prompt` and the text of `tokens` tokens that the model adds to it."""
    assert data.tokenizer is not None
    try:
        start = data.tokenizer.encode(prompt)
    except UserError:
        if prompt != "\n":
            raise
        start = np.zeros(1, np.int64)  # a text of one line: begin with its first character
    length = data.info["sequence_length"]
    made = generate(
        model, start, tokens, length=length, temperature=temperature, top_k=top_k, seed=seed
    )
    return printable(data.tokenizer.decode(made))


def printable(text: str) -> str:
    """Text that any terminal shows: control characters and what it cannot encode replaced."""
    shown = "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    encoding = sys.stdout.encoding or "utf-8"
    return shown.encode(encoding, "replace").decode(encoding)
