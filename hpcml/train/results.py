"""What a run writes beside its metrics: where it starts from, and what it ends with."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from hpcml.data import Data
from hpcml.errors import UserError
from hpcml.models.generate import generate
from hpcml.nn import Module
from hpcml.train import config as configuration
from hpcml.train import environment, weights
from hpcml.train.build import Run
from hpcml.train.progress import Progress

SAMPLE = 200  # tokens of the text that is shown at the end


def begin(run: Run, ranks: list[dict[str, Any]], progress: Progress) -> None:
    """Write the configuration, the environment and what the data offer (first rank only)."""
    config, folder, data = run.config, run.folder, run.data
    (folder / "config.toml").write_text(configuration.dump(config))
    folder.write_json("env.json", {"mesh": run.mesh.sizes, **environment.describe(ranks)})
    info = {name: value for name, value in data.info.items() if np.isscalar(value)}
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


def end(
    run: Run, progress: Progress, exit_: str, seconds: float, loss: float | None,
    val_loss: float | None,
) -> None:  # fmt: skip
    """Write the weights and, last, the summary; say how it went (first rank only).

    `exit_` is "completed", "interrupted", "non-finite" or "failed"; the last two leave no weights.
    """
    model, folder, steps = run.step.model, run.folder, run.step.optimizer.steps
    if exit_ in ("completed", "interrupted"):
        weights.save(model, folder / "model.safetensors")
    folder.write_json(
        "summary.json",
        {
            "final_loss": loss,
            "val_loss": val_loss,
            "steps": steps,
            "params": count(model),
            "param_hash": weights.fingerprint(model),
            "seconds": seconds,
            "exit": exit_,
        },
    )
    if exit_ == "completed" and run.data.tokenizer is not None and progress.show:
        text = sample_text(model, run.data, "\n", SAMPLE).strip()
        progress.say(f"\nA sample:\n{text}\n")
    losses = [f"loss {loss:.4f}"] if loss is not None else []
    losses += [f"val_loss {val_loss:.4f}"] if val_loss is not None else []
    progress.say(f"{exit_} after {steps} steps in {seconds:.1f} s: {', '.join(losses)}")
    progress.say(f"results in {folder.path}")


def count(model: Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def sample_text(
    model: Module, data: Data, prompt: str, tokens: int, temperature: float = 0.8, top_k: int = 0,
    seed: int = 0,
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
