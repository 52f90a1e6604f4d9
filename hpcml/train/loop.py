"""A run from its configuration to its results: the sequence of `hpcml train`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from hpcml import backend
from hpcml.comm import Mesh
from hpcml.comm.guard import StopFlag, agree
from hpcml.data import Batches, Data, as_data
from hpcml.errors import NonFiniteError, UserError
from hpcml.models.generate import generate
from hpcml.nn import Module
from hpcml.optim import Optimizer, learning_rate
from hpcml.parallel import Step, parallelize
from hpcml.train import config as configuration
from hpcml.train import environment, kinds, log, threads, usage, weights
from hpcml.train.config import Config
from hpcml.train.progress import Progress
from hpcml.train.run_dir import JsonLines, RunDir

INTERRUPTED = 130  # exit code of a run that a signal ended, as a shell reports it
SAMPLE = 200  # tokens of the text that is shown at the end


@dataclass
class Run:
    """All that a run consists of, once everything has been checked and built."""

    config: Config
    mesh: Mesh
    data: Data
    step: Step
    folder: RunDir
    callback: Callable[[dict[str, Any]], Any] | None


def train(config: Config) -> int:
    """Train as `config` says and write the results; return the exit code. Collective.

    Raises UserError on all ranks alike for bad input, NonFiniteError for a loss that is no number.
    """
    mesh = Mesh(**asdict(config.mesh))
    agree(mesh.world, partial(log.setup, mesh.rank))
    ranks = agree(mesh.world, partial(threads.share, mesh))
    run = _build(config, mesh)
    if mesh.rank == 0:
        _describe(run, ranks)
    with StopFlag() as stop:
        return _Loop(run, stop).run()


def _build(config: Config, mesh: Mesh) -> Run:
    """Check and make everything, all ranks agreeing, the cheap checks first."""
    folder = RunDir(config.run.dir)
    agree(mesh.world, partial(folder.check, config.run.overwrite))
    data = agree(mesh.world, lambda: as_data(kinds.build(config.data, {"seed": config.run.seed})))
    model = agree(mesh.world, lambda: build_model(config, data.info))
    chosen = config.loss if config.loss.kind else kinds.choose(config.loss, data.loss)
    loss = agree(mesh.world, lambda: kinds.build(chosen))
    callback = None
    if config.callback.kind:
        callback = agree(mesh.world, lambda: kinds.build(config.callback))

    def optimizer(parameters: Any) -> Optimizer:
        return kinds.build(config.optim, {}, parameters)  # type: ignore[no-any-return]

    step = parallelize(
        model, loss=loss, optimizer=optimizer, mesh=mesh, microbatch=config.train.microbatch,
        grad_clip=config.optim.grad_clip, seed=config.run.seed, groups=decay_matrices,
    )  # fmt: skip
    agree(mesh.world, partial(_try_sample, step, data))
    # Only now, with all well, are the results of an earlier run removed.
    agree(mesh.world, folder.claim if mesh.rank == 0 else lambda: None)
    return Run(config, mesh, data, step, folder, callback)


def build_model(config: Config, info: Any) -> Module:
    """Make the model of a configuration for data that offer `info`."""
    model = kinds.build(config.model, info)
    if not isinstance(model, Module):
        raise UserError(
            f'model.kind="{config.model.kind}" made a {type(model).__name__}: it must derive from '
            "hpcml.nn.Module"
        )
    model.to(backend.dtype(config.train.precision))
    if config.model.init_from:
        weights.load(model.name_parts(), config.model.init_from)
    return model


def decay_matrices(model: Module) -> list[dict[str, Any]]:
    """Parameter groups: weight decay for matrices, none for biases and scales, as in GPT-2."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _try_sample(step: Step, data: Data) -> None:
    """Evaluate one sample, so that a model or loss that does not fit the data says so now."""
    try:
        step.try_batch(next(iter(Batches(data.train, 1, None)))[0:1])
    except UserError:
        raise
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(
            f"model and loss do not take a sample of the data: {kinds.one_line(error)}"
        ) from error


def _describe(run: Run, ranks: list[dict[str, Any]]) -> None:
    """Rank 0: write what the run starts from, and say it."""
    config, folder = run.config, run.folder
    (folder / "config.toml").write_text(configuration.dump(config))
    folder.write_json("env.json", environment.describe(ranks))
    tokenizer = run.data.tokenizer
    info = {name: value for name, value in run.data.info.items() if np.isscalar(value)}
    folder.write_json(
        "data.json", {"info": info, "tokenizer": tokenizer.to_dict() if tokenizer else None}
    )
    if config.run.log_every:
        count = sum(p.numel() for p in run.step.model.parameters())
        if run.mesh.size > 1:
            print(run.mesh.describe())
        print(
            f"{config.model.kind} with {count:,} parameters, {len(run.data.train):,} samples, "
            f"{config.run.steps:,} steps of {config.train.global_batch} samples, "
            f"{ranks[0]['threads']} thread(s) a rank",
            flush=True,
        )


class _Loop:
    """The steps of a run, its records, and its end."""

    def __init__(self, run: Run, stop: StopFlag) -> None:
        self.run_, self.stop = run, stop
        config, first = run.config, run.mesh.rank == 0
        self.metrics = JsonLines(run.folder / "metrics.jsonl") if first else None
        self.own = JsonLines(run.folder / "ranks" / f"rank-{run.mesh.rank:05}.jsonl")
        self.progress = Progress(config.run.steps, config.run.log_every, first)
        self.start = time.perf_counter()
        self.record: dict[str, Any] = {}
        self.val_loss: float | None = None

    def run(self) -> int:
        """All steps, then the results; the exit code."""
        exit_, code = "completed", 0
        try:
            for number, batch in enumerate(self._batches()):
                self._step(number, batch)
                if self.stop.agreed(self.run_.mesh.world):
                    exit_, code = "interrupted", INTERRUPTED
                    break
        except NonFiniteError:
            self._summary("non-finite", save=False)
            raise
        finally:
            self.progress.close()
        if code == 0 and self.val_loss is None:
            self._evaluate()
        self._summary(exit_, save=True)
        return code

    def _batches(self) -> Batches:
        config = self.run_.config
        return Batches(
            self.run_.data.train, config.train.global_batch, config.run.seed, 0, config.run.steps
        )

    def _step(self, number: int, batch: Any) -> None:
        run, config = self.run_, self.run_.config
        rate = learning_rate(
            number, lr=config.optim.options["lr"], schedule=config.optim.schedule,
            warmup=config.optim.warmup, min_lr=config.optim.min_lr, steps=config.run.steps,
        )  # fmt: skip
        for group in run.step.optimizer.param_groups:
            group["lr"] = rate
        before, start = run.mesh.ledger.snapshot(), time.perf_counter()
        loss = run.step(batch)
        seconds = time.perf_counter() - start
        sent = run.mesh.ledger.snapshot() - before
        per_second = len(batch) / seconds
        record = {"step": number, "loss": loss, "lr": rate, "grad_norm": run.step.grad_norm,
                  "seconds": seconds, "samples_per_second": per_second}  # fmt: skip
        if run.data.tokenizer is not None:
            record["tokens_per_second"] = per_second * run.data.info["sequence_length"]
        last = number + 1 == config.run.steps
        every = config.run.eval_every
        self.val_loss = None
        if last or (every and (number + 1) % every == 0):
            self._evaluate(record)
        if number == 0 or last:
            self._usage(record, sent.plain())
        self.record = record
        if self.metrics:
            self.metrics.write(record)
        self.progress.step(record)
        if run.callback is not None:
            run.callback(record)

    def _evaluate(self, record: dict[str, Any] | None = None) -> None:
        """Measure the loss on the validation data, if there are any."""
        run, config = self.run_, self.run_.config
        if run.data.val is None:
            return
        limit = config.run.eval_batches or None
        batches = Batches(run.data.val, config.train.global_batch, None, 0, limit)
        self.val_loss = run.step.evaluate(batches)
        if record is not None:
            record["val_loss"] = self.val_loss

    def _usage(self, record: dict[str, Any], sent: dict[str, Any]) -> None:
        """Add memory and traffic of the step, over all ranks; each rank keeps its own too."""
        world = self.run_.mesh.world
        record["memory"] = usage.memory_record(world)
        record["comm"] = usage.comm_record(world, sent)
        self.own.write({"step": record["step"], "memory": usage.own_memory(), "comm": sent})

    def _summary(self, exit_: str, save: bool) -> None:
        """Write the final results: parameters, a sample of text, the summary last."""
        run = self.run_
        self.own.close()
        if self.metrics is None:
            return
        self.metrics.close()
        model = run.step.model
        if save:
            weights.save(model, run.folder / "model.safetensors")
        seconds = time.perf_counter() - self.start
        run.folder.write_json(
            "summary.json",
            {
                "final_loss": self.record.get("loss"),
                "val_loss": self.val_loss,
                "steps": run.step.optimizer.steps,
                "params": sum(p.numel() for p in model.parameters()),
                "param_hash": weights.fingerprint(model),
                "seconds": seconds,
                "exit": exit_,
            },
        )
        if run.config.run.log_every:
            self._tell(exit_, seconds)

    def _tell(self, exit_: str, seconds: float) -> None:
        run, record = self.run_, self.record
        if exit_ == "completed" and run.data.tokenizer is not None:
            print("\nA sample:\n" + sample_text(run.step.model, run.data, "\n", SAMPLE).strip())
        losses = [f"loss {record['loss']:.4f}"] if record else []
        losses += [f"val_loss {self.val_loss:.4f}"] if self.val_loss is not None else []
        print(
            f"\n{exit_} after {run.step.optimizer.steps} steps in {seconds:.1f} s: "
            f"{', '.join(losses)}\nresults in {run.folder.path}",
            flush=True,
        )


def sample_text(
    model: Module, data: Data, prompt: str, count: int, temperature: float = 0.8, top_k: int = 0,
    seed: int = 0,
) -> str:  # fmt: skip
    """Return `prompt` and `count` tokens that the model adds to it."""
    assert data.tokenizer is not None
    try:
        tokens = data.tokenizer.encode(prompt)
    except UserError:
        if prompt != "\n":
            raise
        tokens = np.zeros(1, np.int64)  # a text of one line: begin with its first character
    length = data.info["sequence_length"]
    made = generate(
        model, tokens, count, length=length, temperature=temperature, top_k=top_k, seed=seed
    )
    return data.tokenizer.decode(made)


__all__ = ["build_model", "sample_text", "train"]
