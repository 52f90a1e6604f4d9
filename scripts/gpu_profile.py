"""A part of the check of the GPU: where the time of our training step of GPT-2 124M goes.

Events on the current stream mark where each use of a primitive, each adjoint, what makes a result
again and each kernel of the update begin and end; they are read after the step. What passes between
two neighbours counts for what ran innermost then, so that all of the time counts, and once.

The stream is given something long to do before a step is clocked: Python is then ahead of the GPU
until it reads the loss, and events show the GPU's time alone. What the step as it is takes longer
than this, the GPU waits for Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from gpu_rows import Row, say, tell
from gpu_steps import TASKS, our_step, peak_of, timed

from hpcml.autograd import Tensor
from hpcml.bench.profile_hooks import around_primitives, replacing
from hpcml.kernels import cuda
from hpcml.optim import optimizer

STEPS = 10
SPARE = 8 << 30
"""Bytes, if there is room, that are written again and again to keep the stream busy: so many that
some dozens of writes do, since a stream takes about a thousand before Python has to wait."""
AHEAD = 2.0
"""How many times as long as a step that takes: Python needs a step's time at most to start one."""
BETWEEN = "between primitives"

PASSES = {
    ("add", "forward"): 3,
    ("gelu", "forward"): 2, ("gelu", "adjoint 0"): 3, ("gelu", "again"): 2,
    ("layer_norm", "forward"): 2, ("layer_norm", "adjoint 0"): 4, ("layer_norm", "adjoint 1"): 2,
    ("layer_norm", "again"): 2,
    ("cross_entropy", "forward"): 1, ("cross_entropy", "adjoint 0"): 2,
}  # fmt: skip
"""How often as many bytes as the first input has are read or written, where that is nearly all.

A norm's adjoint adds to the gradient of the residual connection beside it."""
UPDATE: tuple[tuple[Any, str, Callable[..., int]], ...] = (
    (cuda, "block_squares", lambda x, *_: x.nbytes),
    (cuda, "adam_update", lambda p, g, m, v, *_: 2 * (p.nbytes + m.nbytes + v.nbytes) + g.nbytes),
    (optimizer, "narrow", lambda x, out: x.nbytes + out.nbytes),
)
"""What the norm and the update of 16-bit parameters call: where it is found, its name, its bytes
read and written."""


@dataclass
class Span:
    """What was clocked under one name, in all steps."""

    calls: int = 0
    ms: float = 0.0
    operations: float = 0.0
    bytes: float = 0.0
    late: int = 0
    """How often the GPU had caught up with Python: their milliseconds have Python's in them."""


class Timeline:
    """Clocks of a training step that take the time of the GPU.

    record: puts an event on the current stream and gives it. elapsed: milliseconds from one event
    to another.
    """

    def __init__(self, record: Callable[[], Any], elapsed: Callable[[Any, Any], float]) -> None:
        self._record, self._elapsed = record, elapsed
        self.spans: dict[tuple[str, str], Span] = {}  # by operator and part
        self._marks: list[tuple[Span, Any]] = []  # events, and what runs from each of them on

    def span(self, operator: str, part: str) -> Span:
        """What is clocked under this name."""
        return self.spans.setdefault((operator, part), Span())

    @contextmanager
    def step(self) -> Iterator[None]:
        """Clock what runs inside, one step more."""
        with replacing() as put:
            around_primitives(put, self._primitive)
            for owner, name, count in UPDATE:
                put(owner, name, self._kernel(getattr(owner, name), name, count))
            put(Tensor, "backward", self._backward(Tensor.backward))
            self._marks.clear()
            self._run(self.span(BETWEEN, "forward"))
            yield
            self._run(Span())
        self._marks[-1][1].synchronize()
        for (span, start), (_, end) in pairwise(self._marks):
            span.ms += self._elapsed(start, end)

    def _run(self, span: Span) -> None:
        """From here on the time counts for `span`."""
        if self._marks:
            before, event = self._marks[-1]
            before.late += event.done
        self._marks.append((span, self._record()))

    def _clocked(self, span: Span, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        outer, _ = self._marks[-1]
        self._run(span)
        try:
            return function(*args, **options)
        finally:
            self._run(outer)
            span.calls += 1

    def _primitive(self, function: Callable[..., Any], name: str, part: str) -> Callable[..., Any]:
        def clocked(ctx: Any, *args: Any, **options: Any) -> Any:
            span = self.span(operator(name, ctx), part)
            span.operations += operations(name, part, ctx)
            if passes := PASSES.get((name, part)):
                span.bytes += passes * math.prod(ctx.shapes[0]) * ctx.dtypes[0].itemsize
            return self._clocked(span, function, ctx, *args, **options)

        return clocked

    def _kernel(
        self, function: Callable[..., Any], name: str, count: Callable[..., int]
    ) -> Callable[..., Any]:
        def clocked(*args: Any) -> Any:
            span = self.span(name, "update")
            span.bytes += count(*args)
            return self._clocked(span, function, *args)

        return clocked

    def _backward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            self._run(self.span(BETWEEN, "backward"))
            function(*args)
            self._run(self.span(BETWEEN, "update"))

        return noted


def operator(name: str, ctx: Any) -> str:
    """What a primitive's use is called: a linear layer with its sizes."""
    if name != "linear":
        return name
    after, before = ctx.shapes[1]
    return f"linear {before} to {after}"


def operations(name: str, part: str, ctx: Any) -> float:
    """Operations of the products in a part of a primitive; attention is causal, so half of them.

    Of attention there are two products forward and five backward (Dao 2023, "FlashAttention-2").
    """
    if name == "linear" and part != "adjoint 2":
        return 2.0 * math.prod(ctx.shapes[0]) * ctx.shapes[1][0]
    if name == "packed_attention":
        batch, length, width = ctx.shapes[0]
        product = 2.0 * batch * length**2 * (width // 3) / 2
        return product * (2 if part == "forward" else 5)
    return 0.0


def table(spans: dict[tuple[str, str], Span], steps: int, step: float, peak: float) -> list[Row]:
    """The rows of a profile, the longest first; then what the step as it is takes longer.

    step: milliseconds of the step as it is. peak: operations a second. After the loss is read the
    GPU waits for Python in a clocked step too: that is no row.
    """

    def row(name: str, part: str, ms: float) -> Row:
        return {"operator": name, "part": part, "calls": "", "ms": round(ms, 3),
                "%": round(100 * ms / step, 1)}  # fmt: skip

    found, busy = [], 0.0
    for (name, part), span in sorted(spans.items(), key=lambda item: -item[1].ms):
        if (name, part) == (BETWEEN, "update"):
            continue
        ms = span.ms / steps
        busy += ms
        made = row(name, part, ms) | {"calls": span.calls // steps, "late": span.late / steps}
        rate = 1e3 / steps / ms if ms else 0.0
        if span.operations:
            made["TFLOP/s"] = round(span.operations * rate / 1e12, 1)
            made["% of peak"] = round(100 * span.operations * rate / peak, 1) if peak else ""
        if span.bytes:
            made["GB/s"] = round(span.bytes * rate / 1e9)
        found.append(made)
    return [*found, row("the GPU waits", "", step - busy), row("step", "", step)]


def profile(step: Callable[[], Any], seconds: float) -> Timeline:
    """Clock a step that takes so many seconds; all was warm before."""
    import cupy

    stream, elapsed = cupy.cuda.get_current_stream(), cupy.cuda.get_elapsed_time
    spare = cupy.empty(min(SPARE, cupy.cuda.runtime.memGetInfo()[0] // 2), np.uint8)

    def write(times: int) -> float:
        start = stream.record()
        for _ in range(times):
            spare.fill(0)
        end = stream.record()
        end.synchronize()
        return float(elapsed(start, end)) / times

    write(1)
    times = math.ceil(AHEAD * 1e3 * seconds / write(10))
    timeline = Timeline(stream.record, elapsed)
    for _ in range(STEPS):
        for _ in range(times):
            spare.fill(0)
        with timeline.step():
            step()
    return timeline


def main() -> None:
    """Measure the step as it is, then by operator."""
    import cupy

    task = TASKS["gpt2"]
    step = our_step(task, task.work())
    seconds = timed(step, cupy.cuda.get_current_stream().synchronize)
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    peak, source = peak_of(name)
    say(**{"step, ms": round(1e3 * seconds, 2), "steps clocked": STEPS,
           "bf16 peak": f"{peak / 1e12:g} TFLOP/s by {source}" if peak else source})  # fmt: skip
    for row in table(profile(step, seconds).spans, STEPS, 1e3 * seconds, peak):
        tell(row)


if __name__ == "__main__":
    main()
