"""What a person sees of a run: a live bar on a terminal, plain lines in a batch log."""

from __future__ import annotations

import os
import sys
import time
from typing import Any


class Progress:
    """Reports of the first rank; the others make one with `show=False` and stay silent."""

    def __init__(self, steps: int, log_every: int, show: bool) -> None:
        self.steps, self.log_every, self.show = steps, log_every, show
        self._start = time.perf_counter()
        self._live: Any = None
        self._task: Any = None

    def start(self) -> None:
        """Begin to count time; on a terminal, show the bar."""
        self._start = time.perf_counter()
        if self.show and sys.stdout.isatty():
            self._open_bar()

    def _open_bar(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._live = Bar(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"),
            TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self._task = self._live.add_task("", total=self.steps)
        self._live.start()

    def say(self, text: str) -> None:
        """Print a line."""
        if self.show:
            try:
                sys.stdout.write(text + "\n")  # rich moves its bar out of the way
                sys.stdout.flush()
            except BrokenPipeError:  # the reader left (`| head`): the run goes on
                self.show = False
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def step(self, record: dict[str, Any]) -> None:
        """Report a step, if it is one of those to report, from its record of metrics."""
        done = record["step"] + 1
        if not self.show:
            return
        text = describe(record)
        if self._live is not None:
            self._live.update(self._task, completed=done, description=text)
        elif done % self.log_every == 0 or done in (1, self.steps) or "val_loss" in record:
            left = (time.perf_counter() - self._start) / done * (self.steps - done)
            self.say(f"step {done}/{self.steps}  {text}  left {duration(left)}")

    def close(self) -> None:
        """Take the bar away."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def describe(record: dict[str, Any]) -> str:
    """Loss, validation and speed in a few words."""
    parts = [f"loss {record['loss']:.4f}"]
    parts += [f"{name} {value:.4f}" for name, value in record.items() if name.startswith("val_")]
    unit = "tokens" if "tokens_per_second" in record else "samples"
    parts.append(f"{record[f'{unit}_per_second']:,.0f} {unit}/s")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
