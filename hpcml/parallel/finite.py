"""Where numbers stopped being finite: the first parameter, module or gradient.

A step that finds its loss or its gradient infinite or not a number (NaN) asks here, on one rank.
What is looked at is in the order of the computation: parameters come before the outputs that are
computed from them, and outputs before gradients.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

import numpy as np

from hpcml.autograd import Tensor, no_grad
from hpcml.backend import Array, is_array, xp
from hpcml.nn import Module

Named = Iterable[tuple[str, Array]]
P = ParamSpec("P")
T = TypeVar("T")


def quiet(function: Callable[P, T]) -> Callable[P, T]:
    """A function without NumPy's warnings: a run that diverges says so once, by its loss.

    `np.errstate` as a decorator would do, but reports of waiting ranks would take its frame for the
    line of the program.
    """

    @functools.wraps(function)
    def quietly(*args: P.args, **options: P.kwargs) -> T:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return function(*args, **options)

    return quietly


@dataclass(frozen=True)
class Finding:
    """An array that is not finite; as text, one clause for an error message."""

    what: str
    """Such as "parameter h.0.weight"."""
    infinite: int
    not_numbers: int
    size: int
    already: bool = False
    """Whether what it was computed from was not finite either."""
    place: int = 0
    """How many modules were looked at before."""

    def __str__(self) -> str:
        counts = [(self.infinite, "inf"), (self.not_numbers, "nan")]
        kinds = " and ".join(f"{count} {kind}" for count, kind in counts if count)
        already = ", and so was its input" if self.already else ""
        return f"{self.what} is not finite: {kinds} of {self.size} values{already}"


def describe(
    values: Named,
    model: Module,
    run: Callable[[], Any],
    gradients: Named,
    agree: Callable[[Finding | None], str] = lambda found: str(found or ""),
) -> str:
    """Say in one clause where it began: in values, else in outputs, else in gradients; "" nowhere.

    values, gradients: the parameters' by name, in order of definition. model, run: as for
    `first_bad_module`. agree: makes of what this rank has found (None: nothing) what all ranks say,
    "" for nothing; called after each of the three, so that all ranks look at the same.
    """
    looks: tuple[Callable[[], Finding | None], ...] = (
        lambda: first_bad_parameter(values),
        lambda: first_bad_module(model, run),
        lambda: first_bad_parameter(gradients, "gradient of"),
    )
    return next(filter(None, (agree(look()) for look in looks)), "")


def first_bad_parameter(arrays: Named, what: str = "parameter") -> Finding | None:
    """The first of the named arrays that is not finite, called `what` and its name; or None.

    All are asked for, each needed only until the next: ranks may gather them on the way.
    """
    found: Finding | None = None
    for name, array in arrays:
        if found is None and not _finite(array):
            found = _finding(f"{what} {name}", array)
    return found


def first_bad_module(model: Module, run: Callable[[], Any]) -> Finding | None:
    """The first module, in order of execution, whose output is not finite in `run()`; or None.

    run: computes the forward pass again, and may return the loss, which is looked at last. It runs
    to its end, with all its collectives, and without recording; what modules hold beside parameters
    (running statistics) is as before afterwards. Random numbers are the caller's affair
    (`rng.samples`). Hooks of modules are called again.
    """
    found: list[Finding] = []
    seen = itertools.count()

    def look(what: str, inputs: Any, out: Any) -> None:
        place, bad = next(seen), None if found else next(_bad(out), None)
        if bad is not None:
            already = any(True for _ in _bad(inputs))
            found.append(replace(_finding(what, bad), already=already, place=place))

    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs, out: look(
            f"output of {name or 'the model'} ({type(module).__name__})", inputs, out
        )

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules()]
    try:
        with no_grad(), _state_of(model), np.errstate(all="ignore"):
            look("the loss", None, run())
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


@contextmanager
def _state_of(model: Module) -> Iterator[None]:
    """Afterwards the attributes of all modules, and the arrays among them, are as before."""
    before = []
    for module in model.modules():
        held = vars(module)
        arrays = [v for v in held.values() if is_array(v)]
        arrays += [v.data for v in held.values() if isinstance(v, Tensor) and not v.is_parameter]
        copies = [(array, array.copy()) for array in arrays if array.flags.writeable]
        before.append((held, dict(held), copies))
    try:
        yield
    finally:
        for held, attributes, copies in before:
            held.clear()
            held.update(attributes)
            for array, values in copies:
                array[...] = values


def _bad(value: Any) -> Iterator[Array]:
    """The arrays in a module's inputs or outputs that are not finite."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for part in value:
            yield from _bad(part)
        return
    array = value.data if isinstance(value, Tensor) else value
    if is_array(array) and not _finite(array):
        yield array


def _finite(array: Array) -> bool:
    return array.dtype.kind in "biu" or bool(xp(array).isfinite(array).all())


def _finding(what: str, array: Array) -> Finding:
    m = xp(array)
    counts = int(m.isinf(array).sum()), int(m.isnan(array).sum())
    return Finding(what, *counts, array.size)
