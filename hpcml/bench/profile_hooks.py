"""Clocks around the parts of a training step, hung up from outside for one step and taken down.

Two kinds of calls are clocked: uses of primitives, with their adjoints and what makes their results
again, and *work*, which is what the compiled kernels do and what NumPy's functions do with arrays
of `LARGE` bytes or more. Work counts for the primitive it happens in, or stands for itself. What an
adjoint has another primitive make again counts for that one alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from hpcml import kernels
from hpcml.autograd import Tensor
from hpcml.autograd.primitives import Primitive

LARGE = 4096
"""Bytes from which on an array's elements take longer than the call of a NumPy function."""

FORWARD, BACKWARD, UPDATE = range(3)
"""Phases of a step: until the loss is there, backward, all that follows."""

_now = time.perf_counter_ns
_CALLS = 2000


class Span:
    """What was clocked under one name: calls, nanoseconds, and the work within.

    Calls of other primitives from within are counted (`others`), but not their time and work.
    """

    __slots__ = ("calls", "nanoseconds", "others", "work", "works")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all that was clocked."""
        self.calls = self.nanoseconds = self.others = self.works = self.work = 0


class Profile:
    """What the clocks of one step have shown."""

    def __init__(self) -> None:
        self.spans: dict[tuple[str, str], Span] = {}  # by name and part
        self.phase = FORWARD
        self.begun = [0, 0, 0, 0]  # of each phase, and the end of the step
        self.clocked = [0, 0, 0]  # nanoseconds of each phase in outermost clocked calls
        self.outermost = [[0, 0], [0, 0], [0, 0]]  # number of those: primitives, work
        self.within: Span | None = None  # the primitive that is running
        self.working = False

    def span(self, name: str, part: str) -> Span:
        """What is clocked under this name."""
        return self.spans.setdefault((name, part), Span())

    @contextmanager
    def step(self) -> Iterator[None]:
        """Clock what runs inside, one whole step; what was clocked before is forgotten."""
        for span in self.spans.values():
            span.clear()
        self.clocked, self.outermost = [0, 0, 0], [[0, 0], [0, 0], [0, 0]]
        self.phase, self.begun[FORWARD] = FORWARD, _now()
        yield
        self.begun[-1] = _now()

    # --- the clocks -----------------------------------------------------------------------------

    def primitive(self, function: Callable[..., Any], name: str, part: str) -> Callable[..., Any]:
        """`function`, a part of a primitive, with a clock around it."""
        span = self.span(name, part)

        def clocked(*args: Any, **attributes: Any) -> Any:
            outer, self.within = self.within, span
            start = _now()
            try:
                return function(*args, **attributes)
            finally:
                passed = _now() - start
                self.within = outer
                span.calls += 1
                span.nanoseconds += passed
                if outer is None:
                    self.clocked[self.phase] += passed
                    self.outermost[self.phase][0] += 1
                else:
                    outer.nanoseconds -= passed
                    outer.others += 1

        return clocked

    def work(self, function: Callable[..., Any], name: str, least: int = 0) -> Callable[..., Any]:
        """`function` with a clock around it where its first argument has `least` bytes."""
        alone = self.span(name, "alone")

        def clocked(*args: Any, **options: Any) -> Any:
            if self.working or (least and getattr(args[0], "nbytes", 0) < least):
                return function(*args, **options)
            self.working = True
            start = _now()
            try:
                return function(*args, **options)
            finally:
                passed = _now() - start
                self.working = False
                span = self.within
                if span is None:
                    span = alone
                    span.calls += 1
                    span.nanoseconds += passed
                    self.clocked[self.phase] += passed
                    self.outermost[self.phase][1] += 1
                span.works += 1
                span.work += passed

        return clocked

    def backward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`Tensor.backward`, noting when it begins and ends."""

        def noted(*args: Any, **options: Any) -> Any:
            self.phase, self.begun[BACKWARD] = BACKWARD, _now()
            try:
                return function(*args, **options)
            finally:
                self.phase, self.begun[UPDATE] = UPDATE, _now()

        return noted

    # --- hanging them up ------------------------------------------------------------------------

    @contextmanager
    def hung_up(self, module: ModuleType) -> Iterator[None]:
        """Inside, all primitives that exist and all work are clocked; then all is as it was.

        module: the compiled kernels.
        """
        with replacing() as put:
            for name, function in kernels_of(module):
                put(module, name, self.work(function, name))
            for name, function in array_functions():
                put(np, name, _with_methods(self.work(function, f"np.{name}", LARGE), function))
            around_primitives(put, self.primitive)
            put(Tensor, "backward", self.backward(Tensor.backward))
            yield


Put = Callable[[Any, str, Any], None]
"""Sets an attribute of an owner, by its name, to a value."""


@contextmanager
def replacing() -> Iterator[Put]:
    """Inside, attributes are what they are made by what this gives; then all is as it was."""
    with ExitStack() as undo:

        def put(owner: Any, name: str, value: Any) -> None:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        yield put


def around_primitives(put: Put, clocked: Callable[..., Callable[..., Any]]) -> None:
    """Put `clocked(function, name, part)` in place of each part of all primitives that exist."""
    for primitive in list(Primitive.made):
        name = primitive.name
        put(primitive, "forward", clocked(primitive.forward, name, "forward"))
        adjoints = [
            clocked(adjoint, name, f"adjoint {number}")
            for number, adjoint in enumerate(primitive.adjoints)
        ]
        put(primitive, "adjoints", adjoints)
        if primitive.remake is not None:
            put(primitive, "remake", clocked(primitive.remake, name, "again"))


def kernels_of(module: ModuleType) -> list[tuple[str, Callable[..., Any]]]:
    """The kernels that a module of `hpcml.kernels` offers, by name."""
    return [(name, x) for name, x in vars(module).items() if callable(x) and name != "load"]


def array_functions() -> list[tuple[str, Callable[..., Any]]]:
    """The functions of NumPy that operators call by their names and that do work."""
    found = [(name, x) for name, x in vars(np).items() if isinstance(x, np.ufunc)]
    return [*found, ("take", np.take)]


def _with_methods(clocked: Any, function: Any) -> Any:
    """A clocked ufunc that can still be asked for `at`, `reduce` and the like."""
    for name in ("accumulate", "at", "outer", "reduce", "reduceat"):
        if hasattr(function, name):
            setattr(clocked, name, getattr(function, name))
    return clocked


def cost() -> dict[str, tuple[float, float]]:
    """Nanoseconds that a clock adds to a call: those it shows itself, and all, by its kind."""
    found = {}
    for kind in ("primitive", "work"):
        profile = Profile()
        if kind == "primitive":
            clocked = profile.primitive(_nothing, "", "")
        else:
            clocked = profile.work(_nothing, "")
        bare = _loop(_nothing)
        whole = _loop(clocked)
        (span,) = profile.spans.values()
        shown = span.nanoseconds / span.calls
        found[kind] = (max(shown - bare, 0.0), max(whole - bare, 0.0))
    return found


def dispatch() -> float:
    """Nanoseconds for which a compiled kernel is called that does nothing: a product of no rows."""
    x = np.zeros((0, 1), np.float32)
    weight = np.zeros((1, 1), np.float32)
    linear = kernels.of(x).linear
    return _loop(lambda: linear(x, weight, x[0:0, 0], x)) - _loop(_nothing)


def _nothing(*_: Any) -> None:
    pass


def _loop(call: Callable[..., Any]) -> float:
    """Nanoseconds of a call, the least of some loops."""
    best = float("inf")
    for _ in range(5):
        start = _now()
        for _ in range(_CALLS):
            call()
        best = min(best, (_now() - start) / _CALLS)
    return best
