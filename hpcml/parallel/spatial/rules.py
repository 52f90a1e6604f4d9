"""What ranks divide of the result of an operation, given what they divide of its operands.

One rule for each primitive that makes sense of parts. A rule raises `NeedsWhole` where the result
of parts would not be the part of the result: what joins elements along a divided dimension, or puts
beside a block what is not of the same places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from hpcml.parallel.spatial.cuts import SAMPLES_DIM, Cut

Sizes = tuple[int, ...]


class NeedsWhole(Exception):
    """The operation would take a part for the whole."""


class Operand(NamedTuple):
    """An operand as an array."""

    shape: Sizes
    cut: Cut
    known: bool = True
    """Whether it is known to be whole along what is not divided."""


_SIMPLE = (int, slice, type(None), type(Ellipsis))
"""Kinds of index that are not arrays."""
Rule = Callable[[Sequence[Operand], dict[str, Any]], Cut]


def _need(fits: bool) -> None:
    if not fits:
        raise NeedsWhole


def _whole(cuts: Sequence[int | None]) -> None:
    _need(all(one is None for one in cuts))


def _made(cuts: Sequence[int | None]) -> Cut:
    """A cut, if nothing is divided twice in it: of all pairs of blocks a rank has one."""
    divided = [one for one in cuts if one is not None]
    _need(len(divided) == len(set(divided)))
    return tuple(cuts)


def _dims(dim: Any, ndim: int) -> set[int]:
    """The dimensions that an attribute names; none are all."""
    dims = (
        range(ndim)
        if dim is None or dim == ()
        else dim
        if isinstance(dim, tuple | list)
        else (dim,)
    )
    return {one % ndim for one in dims}


# --- rules --------------------------------------------------------------------------------------


def by_place(operands: Sequence[Operand], _: dict[str, Any]) -> Cut:
    """Of operands that broadcast: what is divided is of the same places, or of one for all."""
    ndim = max(len(one.shape) for one in operands)
    cut: list[int | None] = []
    for dim in range(-ndim, 0):
        here = [(one, one.shape[dim], one.cut[dim]) for one in operands if len(one.shape) >= -dim]
        divided = {part for _, _, part in here if part is not None}
        _need(len(divided) <= 1)
        if divided:
            block = max(n for _, n, part in here if part is not None)
            for one, n, part in here:
                if part is None and (one.known or SAMPLES_DIM not in divided):
                    # Beside a block of one place, what has one may be made for that place.
                    _need(n == 1 and (one.known or block > 1))
        cut.append(next(iter(divided), None))
    return _made(cut)


def along(operands: Sequence[Operand], how: dict[str, Any]) -> Cut:
    """Of what joins elements along `dim` and leaves the shape."""
    ((shape, cut, _),) = operands
    _whole([cut[dim] for dim in _dims(how.get("dim", -1), len(shape))])
    return cut


def reduced(operands: Sequence[Operand], how: dict[str, Any]) -> Cut:
    """Of what leaves one element along `dim`."""
    ((shape, cut, _),) = operands
    dims = _dims(how.get("dim"), len(shape))
    along(operands, {"dim": tuple(dims) or None})
    if how.get("keepdim"):
        return cut
    return tuple(one for dim, one in enumerate(cut) if dim not in dims)


def permuted(operands: Sequence[Operand], how: dict[str, Any]) -> Cut:
    """Of dimensions in another order."""
    return tuple(operands[0].cut[dim] for dim in how["dims"])


def expanded(operands: Sequence[Operand], how: dict[str, Any]) -> Cut:
    """Of elements repeated: a block is not."""
    ((shape, cut, _),) = operands
    sizes = how["shape"]
    new = len(sizes) - len(shape)
    for n, one, size in zip(shape, cut, sizes[new:], strict=True):
        _need(one is None or size in (-1, n))
    return (None,) * new + cut


def taken(operands: Sequence[Operand], how: dict[str, Any]) -> Cut:
    """Of an index: all of what is divided, or places along what is not."""
    ((shape, cut, _),) = operands
    parts = list(how["index"]) if isinstance(how["index"], tuple) else [how["index"]]
    arrays = [part for part in parts if not isinstance(part, _SIMPLE)]
    _need(not arrays or (len(arrays) == 1 and np.ndim(arrays[0]) == 1))
    _need(not arrays or not any(isinstance(part, int) for part in parts))
    rest = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    named = sum(part is not None and part is not Ellipsis for part in parts)
    parts[rest : rest + 1] = [slice(None)] * (len(shape) - named)
    found: list[int | None] = []
    dims = iter(zip(shape, cut, strict=True))
    for part in parts:
        n, one = (1, None) if part is None else next(dims)
        _need(one is None or (isinstance(part, slice) and part.indices(n) == (0, n, 1)))
        if not isinstance(part, int):
            found.append(one)
    return tuple(found)


def joined(operands: Sequence[Operand], how: dict[str, Any]) -> Cut:
    """Of arrays one after the other along `dim`: blocks of the same places."""
    dim, cut = how["dim"] % len(operands[0].shape), operands[0].cut
    _need(cut[dim] is None and all(one.cut == cut for one in operands))
    return cut


def padded(operands: Sequence[Operand], how: dict[str, Any]) -> Cut:
    """Of elements added around: blocks get none."""
    cut = operands[0].cut
    _need(all(one is None or pair == (0, 0) for one, pair in zip(cut, how["widths"], strict=True)))
    return cut


def reshaped(operands: Sequence[Operand], how: dict[str, Any]) -> Cut:
    """Of sizes alone: what is divided stays as it is, beside dimensions joined or split.

    A block of one place could be any of the ones in a shape: then only the same shape will do.
    Samples come first, and stay there.
    """
    ((old, cut, _),) = operands
    new = tuple(how["shape"])
    if -1 in new:
        rest = math.prod(n for n in new if n != -1)
        new = tuple(math.prod(old) // max(rest, 1) if n == -1 else n for n in new)
    if new == old:
        return cut
    _need(math.prod(new) == math.prod(old))
    if all(one is None for one in cut):
        return (None,) * len(new)
    if cut[0] == SAMPLES_DIM:
        _need(new[:1] == old[:1])
        return (SAMPLES_DIM, *(None,) * (len(new) - 1))
    _need(all(n > 1 for n, one in zip(old, cut, strict=True) if one is not None) and 0 not in old)
    found: list[int | None] = []
    for before, after in _groups(old, new):
        divided = [cut[dim] for dim in before if cut[dim] is not None]
        large = [dim for dim in after if new[dim] > 1]
        if divided:
            _need(sum(old[dim] > 1 for dim in before) == 1 and len(large) == 1)
        found += [divided[0] if divided and dim in large else None for dim in after]
    return tuple(found)


def _groups(old: Sizes, new: Sizes) -> Iterator[tuple[list[int], list[int]]]:
    """The fewest dimensions before and after that have the same elements, in order."""
    i = j = 0
    while i < len(old) or j < len(new):
        before, after = [i] if i < len(old) else [], [j] if j < len(new) else []
        while (a := _elements(old, before)) != (b := _elements(new, after)):
            if a < b:
                before.append(i + len(before))
            else:
                after.append(j + len(after))
        yield before, after
        i, j = i + len(before), j + len(after)


def _elements(sizes: Sizes, dims: Sequence[int]) -> int:
    return math.prod(sizes[dim] for dim in dims)


def multiplied(operands: Sequence[Operand], how: dict[str, Any]) -> Cut:
    """Of matrices: what is added up is whole."""
    (a, left, _), (b, right, _) = operands
    _whole([left[-1], right[-2] if len(b) > 1 else right[-1]])
    batch = by_place([Operand(a[:-2], left[:-2]), Operand(b[:-2], right[:-2])], how)
    return _made((*batch, *left[-2:-1], *(right[-1:] if len(b) > 1 else ())))


def linear(operands: Sequence[Operand], _: dict[str, Any]) -> Cut:
    """Of x weight^T + bias: features are whole."""
    cut, *others = (one.cut for one in operands)
    _whole([cut[-1], *(one for other in others for one in other)])
    return cut


def normalised(operands: Sequence[Operand], how: dict[str, Any]) -> Cut:
    """Of the last dimensions, of `size` elements, normalised."""
    (shape, cut, _), *others = operands
    first, size = len(shape), 1
    while first and size < how["size"]:
        first -= 1
        size *= shape[first]
    _whole([*cut[min(first, len(shape) - 1) :], *(one for other in others for one in other.cut)])
    return cut


def embedded(operands: Sequence[Operand], _: dict[str, Any]) -> Cut:
    """Of rows of a table, by index."""
    table, index = operands
    _whole(table.cut)
    return (*index.cut, None)


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("add", "sub", "mul", "div", "power", "neg", "exp", "log", "sqrt", "absolute", "tanh",
         "sigmoid", "relu", "gelu", "maximum", "minimum", "where", "cast", "boundary", "compare",
         "clamp"), by_place,
    ),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "argmax"), reduced),
    **dict.fromkeys(("softmax", "log_softmax"), along),
    "permute": permuted, "expand": expanded, "getitem": taken, "cat": joined, "pad": padded,
    "reshape": reshaped, "matmul": multiplied, "linear": linear, "layer_norm": normalised,
    "embedding": embedded,
}  # fmt: skip
BY_SIZES = frozenset(("reshape", "getitem"))
"""Operations whose rule goes by sizes, which differ from rank to rank."""
