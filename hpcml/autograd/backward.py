"""Reverse accumulation: walk the record in reverse order of creation, deliver each gradient once.

The order depends on nothing but the program, so all ranks that run the same program meet in the
same collectives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any

import numpy as np

from hpcml.autograd.halves import HALVES, rounded, widened
from hpcml.autograd.mode import no_grad
from hpcml.autograd.record import Context, empty_like
from hpcml.autograd.tensor import Tensor
from hpcml.backend import Array, is_array, xp


def _record(root: Context) -> tuple[list[Any], dict[int, int]]:
    """All uses that `root` depends on and that need a gradient, the last created first.

    And of each leaf, by its id, how many contributions to its gradient they make.
    """
    found, pending, uses = {root}, [root], dict[int, int]()
    while pending:
        ctx = pending.pop()
        if ctx.released:
            raise RuntimeError(
                f"backward() ran before through this {ctx.primitive.name}, and what it had saved "
                "is gone: compute the forward pass again"
            )
        for source, needed in zip(ctx.sources, ctx.needs, strict=True):
            if not needed:
                continue
            if isinstance(source, Tensor):
                uses[id(source)] = uses.get(id(source), 0) + 1
            elif source is not None and source not in found:
                found.add(source)
                pending.append(source)
    return sorted(found, key=attrgetter("order"), reverse=True), uses


def contributions(root: Tensor) -> Iterator[Tensor | None]:
    """The leaves to whose gradients `root.backward()` would add, in that order.

    One that is used several times comes as often. None comes where an adjoint from elsewhere may
    call `backward()` itself, and so add to others.
    """
    if root.ctx is not None:
        for ctx in _record(root.ctx)[0]:
            yield from _leaves(ctx, range(len(ctx.needs)))


def _leaves(ctx: Context, which: Iterable[int]) -> Iterator[Tensor | None]:
    if ctx.primitive.nests:
        yield None
    for one in which:
        source = ctx.sources[one]
        if ctx.needs[one] and isinstance(source, Tensor):
            yield source


class _Gradients:
    """Gradients under way: of intermediate results by use, of leaves in the leaves themselves."""

    def __init__(self, uses: dict[int, int]) -> None:
        self.of: dict[Context, tuple[Array, bool]] = {}  # the array, and whether it is ours alone
        self.uses = uses  # leaf -> contributions still to come

    def compute(self, ctx: Context, which: int, g: Array) -> None:
        """Compute the gradient of one input and add it to what that input has."""
        source = ctx.sources[which]
        leaf = source if isinstance(source, Tensor) else None
        if leaf is not None:
            before, ours = leaf.gradient, True
            ctx._target = leaf.gradient_buffer if before is None else None
        else:
            before, ours = self.of.get(source, (None, False))  # type: ignore[arg-type]
        place = before if ours and before is not None else ctx._target  # for the rounded result
        ctx._pending, ctx._pending_ours = before, ours
        ctx._handed = None
        result = ctx.primitive.adjoints[which](ctx, g)
        complete = ctx._pending is None  # the adjoint has included what was there, if anything
        fresh = result is ctx._handed
        ctx._handed = ctx._pending = ctx._target = None
        if not is_array(result):
            result = np.asarray(result)  # NumPy makes scalars of arrays without dimensions
        if result.shape != ctx.shapes[which]:
            raise RuntimeError(
                f"{ctx.primitive.name}: adjoint {which} returned shape {result.shape} for an input "
                f"of shape {ctx.shapes[which]}"
            )
        kind = ctx.dtypes[which]
        if kind in HALVES:
            if not complete or result.dtype != kind:
                result, fresh = rounded(result, kind, None if complete else before, place), True
                complete = True
        elif result.dtype != kind:
            result, fresh = widened(result).astype(kind, copy=False), True
        if leaf is not None:
            _deliver(leaf, before, result, complete, fresh)
            del before, place, result  # hooks may let the memory go
            self._contributed(leaf)
        elif complete:
            self.of[source] = (result, fresh)  # type: ignore[index]
        else:
            assert before is not None
            out = before if ours else empty_like(before)
            self.of[source] = (xp(before).add(before, result, out=out), True)  # type: ignore[index]

    def _contributed(self, leaf: Tensor) -> None:
        self.uses[id(leaf)] -= 1
        if self.uses[id(leaf)] == 0:
            for hook in tuple(leaf.grad_hooks):  # one may remove itself
                hook(leaf)


def _deliver(
    leaf: Tensor, before: Array | None, result: Array, complete: bool, fresh: bool
) -> None:
    if before is None:
        leaf.receive(result, fresh)
    elif not complete:
        before += result
    elif result is not before:
        before[...] = result


class Deferred:
    """Gradients of parameters that are still to be computed, after those of activations.

    Qi et al. 2023, "Zero bubble pipeline parallelism", section 2: what comes before in a pipeline
    waits for the gradient of its activations alone.
    """

    def __init__(self, gradients: _Gradients) -> None:
        self._gradients = gradients
        self._steps: list[tuple[Context, list[int], Array]] = []

    def add(self, ctx: Context, which: list[int], g: Array) -> None:
        """Leave the gradients of some inputs of a use for later."""
        self._steps.append((ctx, which, g))

    def contributions(self) -> Iterator[Tensor | None]:
        """The parameters to whose gradients they add, in that order; see `contributions`.

        Not those of joint adjoints: these are complete already.
        """
        for ctx, which, _ in self._steps:
            yield from _leaves(ctx, which)

    def compute(self) -> None:
        """Compute them, in the order of backward; once."""
        steps, self._steps = self._steps[::-1], []
        with no_grad():
            while steps:
                ctx, which, g = steps.pop()
                for one in which:
                    self._gradients.compute(ctx, one, g)
                ctx.release()


def backward(root: Tensor, gradient: Array | None = None, *, defer: bool = False) -> Deferred:
    """Add d root / d leaf to every leaf's gradient; see `Tensor.backward`.

    defer: but those of parameters only when what is returned is told to `compute`.
    """
    if root.ctx is None:
        raise RuntimeError(
            "backward() on a tensor that no recorded operation made: nothing it was computed from "
            "requires a gradient, or that happened under no_grad()"
        )
    if gradient is None:
        if root.data.size != 1:
            raise RuntimeError(
                f"backward() without a gradient needs one element, not shape {root.shape}: "
                "reduce it with sum() or mean(), or pass the gradient"
            )
        gradient = xp(root.data).ones_like(root.data)
    else:
        gradient = xp(root.data).asarray(gradient, dtype=root.dtype)
    if gradient.shape != root.shape:
        raise ValueError(
            f"backward(): gradient of shape {gradient.shape} for a tensor of shape {root.shape}"
        )
    record, leaves = _record(root.ctx)
    gradients = _Gradients(leaves)
    gradients.of[root.ctx] = (gradient, False)
    deferred = Deferred(gradients)
    uses = Counter(unit for ctx in record for unit in ctx.units)
    with no_grad():
        for position, ctx in enumerate(record):
            g, _ = gradients.of.pop(ctx)
            if ctx.wide:
                g = widened(g)
            later = _of_parameters(ctx) if defer else []
            for which, needed in enumerate(ctx.needs):
                if needed and which not in later:
                    gradients.compute(ctx, which, g)
            units = ctx.units
            if later:
                deferred.add(ctx, later, g)
            else:
                ctx.release()
            record[position] = None  # what it saved can go now
            for unit in units:
                uses[unit] -= 1
                if uses[unit] == 0:  # its values are needed no more
                    unit.done()
    return deferred


def _of_parameters(ctx: Context) -> list[int]:
    """The inputs that are parameters to be trained, unless adjoints must be called together."""
    if ctx.primitive.joint:
        return []
    needed = enumerate(ctx.needs)
    return [i for i, need in needed if need and getattr(ctx.sources[i], "is_parameter", False)]
