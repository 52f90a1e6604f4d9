"""A run from its configuration to its results: the sequence of `hpcml train`."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from hpcml import memory
from hpcml.comm.guard import StopFlag
from hpcml.data import Batches
from hpcml.errors import NonFiniteError, UserError
from hpcml.optim import learning_rate
from hpcml.trace.record import RunRecorder
from hpcml.train import results, usage
from hpcml.train.build import Run, begin, build
from hpcml.train.config import Config
from hpcml.train.progress import Progress
from hpcml.train.results import Ending
from hpcml.train.run_dir import JsonLines

INTERRUPTED = 130  # exit code of a run that a signal ended, as a shell reports it


def train(config: Config) -> int:
    """Train as `config` says and write the results; return the exit code. Collective.

    Raises UserError on all ranks alike for bad input, NonFiniteError for a loss that is no number.
    """
    mesh, ranks = begin(config)
    gc.collect()  # an earlier run of this process is not this one's memory
    memory.account().reset_peak()
    memory.set_limit(config.device.memory_limit)
    try:
        return _train(build(config, mesh), ranks)
    finally:
        memory.set_limit(0)  # the thread may go on to something else


def _train(run: Run, ranks: list[dict[str, Any]]) -> int:
    """Train what was built; `ranks`: what each rank runs on."""
    config, mesh = run.config, run.mesh
    show = mesh.rank == 0 and config.run.log_every > 0
    progress = Progress(config.run.steps, config.run.log_every, show)
    if mesh.rank == 0:
        results.begin(run, ranks, progress)
    try:
        with StopFlag() as stop:
            return _Loop(run, stop, progress).run()
    finally:
        run.folder.release()


class _Loop:
    """The steps of a run and their records."""

    def __init__(self, run: Run, stop: StopFlag, progress: Progress) -> None:
        self.of, self.stop, self.progress = run, stop, progress
        first = run.mesh.rank == 0
        self.metrics = JsonLines(run.folder / "metrics.jsonl") if first else None
        self.own = JsonLines(run.folder / "ranks" / f"rank-{run.mesh.rank:05}.jsonl")
        self.recorder = RunRecorder(run.mesh, run.config.run.trace, run.folder / "ranks")
        self.stopped = False  # by a signal to any rank
        self.loss: float | None = None
        self.validation: dict[str, float] = {}  # the last one

    def run(self) -> int:
        """All steps, then the results; the exit code."""
        start, exit_, together = time.perf_counter(), "failed", False
        config, data = self.of.config, self.of.data
        batches = Batches(
            data.train, config.train.global_batch, config.run.seed, 0, config.run.steps
        )
        self.progress.start()
        try:
            for number, batch in enumerate(batches):
                self._step(number, batch)
                if self._asked_to_stop():
                    exit_ = "interrupted"
                    break
            else:
                exit_ = "completed"
            self.of.step.settle()
            together = True
        except NonFiniteError:  # raised on all ranks
            exit_, together = "non-finite", True
            raise
        except KeyboardInterrupt:  # a second one: do not wait for the step
            exit_ = "interrupted"
            raise
        finally:
            seconds = time.perf_counter() - start
            self._end(Ending(exit_, together, seconds, self.loss, self.validation))
        return INTERRUPTED if exit_ == "interrupted" else 0

    def _end(self, ending: Ending) -> None:
        """Close the records and write the results."""
        self.progress.close()
        self.own.close()
        if self.metrics is not None:
            self.metrics.close()
        if ending.together:
            self.recorder.write()
            results.end(self.of, self.progress, ending)
            self.of.mesh.world.barrier()  # none leaves before the end
        elif self.of.mesh.rank == 0:
            # After a failure it is that one that must be told, not a disk that is full since.
            with suppress(*(UserError, OSError) if ending.exit == "failed" else ()):
                results.end(self.of, self.progress, ending)

    def _asked_to_stop(self) -> bool:
        late = self.of.config.data_parallel.staleness  # ranks may be as far apart
        self.stopped = self.stopped or self.stop.agreed(self.of.mesh.world, late)
        return self.stopped

    def _step(self, number: int, batch: Any) -> None:
        """One update, its validation if it is due, and its record."""
        run, config = self.of, self.of.config
        rate = learning_rate(
            number, lr=config.optim.options["lr"], schedule=config.optim.schedule,
            warmup=config.optim.warmup, min_lr=config.optim.min_lr, steps=config.run.steps,
        )  # fmt: skip
        for group in run.step.optimizer.param_groups:
            group["lr"] = rate
        before, start = run.mesh.ledger.snapshot(), time.perf_counter()
        self.loss = self.recorder.step(number, lambda: run.step(batch))
        seconds = time.perf_counter() - start
        sent = (run.mesh.ledger.snapshot() - before).plain()
        per_second = len(batch) / seconds
        record: dict[str, Any] = {
            "step": number, "loss": self.loss, "lr": rate, "grad_norm": run.step.grad_norm,
            "seconds": seconds, "samples_per_second": per_second, **run.step.scores,
        }  # fmt: skip
        if run.data.tokenizer is not None:
            record["tokens_per_second"] = per_second * run.data.info["sequence_length"]
        if run.step.staleness is not None:
            record["staleness"] = run.step.staleness.record()
        done, every = number + 1, config.run.eval_every
        last = done == config.run.steps
        try:
            if number == 0 or last:
                self._add_usage(record, sent)
            if run.data.val is not None and (last or (every and done % every == 0)):
                self._validate(record)
            checks = config.run.check_replicas
            if checks and done % checks == 0:
                run.step.check_replicas()
        finally:  # the step was made, whatever becomes of its validation
            if self.metrics is not None:
                self.metrics.write(record)
        if number == config.run.trace:
            self.recorder.write()
        self.progress.step(record)
        if run.callback is not None:
            run.callback(record)

    def _validate(self, record: dict[str, Any]) -> None:
        """Add the validation loss and metrics, unless a signal cuts it short."""
        config, val = self.of.config, self.of.data.val
        assert val is not None
        limit = config.run.eval_batches or None

        def batches() -> Iterator[Any]:
            for batch in Batches(val, config.train.global_batch, None, 0, limit):
                yield batch
                if self._asked_to_stop():
                    return

        found = self.of.step.measure(batches())
        if not self.stopped:
            self.validation = {f"val_{name}": value for name, value in found.items()}
            record |= self.validation

    def _add_usage(self, record: dict[str, Any], sent: dict[str, Any]) -> None:
        """Add memory and traffic of the step over all ranks; each rank keeps its own too."""
        world = self.of.mesh.world
        record["memory"] = usage.memory_record(world)
        record["comm"] = usage.comm_record(world, sent)
        late = {name: record[name] for name in ("staleness",) if name in record}
        own = {"step": record["step"], "memory": usage.own_memory(), "comm": sent, **late}
        self.own.write(own)
