"""The stand-in's functions of arrays, by those of NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.device.standin import streams
from tests.device.standin.array import ndarray, plain, wrap


def _calling(name: str) -> Callable[..., Any]:
    function = getattr(np, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        out = kwargs.pop("out", None)
        # What is given stays until the end: views of its memory do not keep that.
        views = tuple([plain(arg, name) for arg in args])
        named = {key: plain(value, name) for key, value in kwargs.items()}
        with np.errstate(all="ignore"):
            result = function(*views, **named)
        if out is None:
            return wrap(result)
        streams.touch(out.memory, write=True)
        out.memory[...] = result
        return out

    return call


SAME = (
    "add", "subtract", "multiply", "true_divide", "divide", "power", "negative", "exp", "log",
    "sqrt", "absolute", "abs", "sign", "tanh", "maximum", "minimum", "logaddexp", "matmul",
    "isnan", "isfinite", "isinf", "where", "concatenate", "stack", "unique", "argsort", "tril",
    "triu", "take_along_axis", "flatnonzero", "nonzero", "tensordot", "arange", "zeros", "ones",
    "full", "zeros_like", "ones_like", "full_like", "sum", "mean", "any", "all", "argmax", "take",
    "cumsum", "floor_divide", "remainder", "sin", "cos", "floor", "clip", "sort", "searchsorted",
    "rint", "square", "float_power", "array_equal", "split", "linspace", "eye", "repeat", "max",
    "min", "logical_and", "logical_or", "logical_not", "invert", "greater", "less", "equal",
    "not_equal", "pad", "array_split", "outer", "dot",
)  # fmt: skip
"""Functions of NumPy that CuPy has too, and that give new arrays."""
VIEWS = ("broadcast_to", "expand_dims", "moveaxis", "swapaxes", "transpose", "squeeze", "ravel",
         "broadcast_arrays", "flip", "atleast_1d")  # fmt: skip
"""Those that give views."""


def _viewing(name: str) -> Callable[..., Any]:
    function = getattr(np, name)

    def call(x: ndarray, *args: Any, **kwargs: Any) -> Any:
        result = function(plain(x, name, read=False), *map(plain, args), **kwargs)
        return x._view(result) if isinstance(result, np.ndarray) else wrap(result)

    return call


def _empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(shape, dtype)


def _empty_like(x: ndarray, dtype: Any = None) -> ndarray:
    made = np.empty_like(plain(x, "empty_like", read=False), dtype)
    return ndarray.around(np.full_like(made, np.nan if made.dtype.kind not in "biu" else 77))


def _asarray(x: Any, dtype: Any = None, **_: Any) -> ndarray:
    if isinstance(x, ndarray):
        return x if dtype is None else x.astype(dtype, copy=False)
    return ndarray.around(np.asarray(x, dtype))


def _array(x: Any, dtype: Any = None, **_: Any) -> ndarray:
    return ndarray.around(np.array(plain(x) if isinstance(x, ndarray) else x, dtype))


def _ascontiguousarray(x: ndarray) -> ndarray:
    return x if x.flags.c_contiguous else x.copy()


def _asnumpy(x: ndarray, *_: Any, **__: Any) -> np.ndarray[Any, Any]:
    return x.get() if isinstance(x, ndarray) else np.asarray(x)


def _shares(a: ndarray, b: ndarray, *_: Any) -> bool:
    return bool(np.may_share_memory(plain(a, read=False), plain(b, read=False)))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: _calling(name) for name in SAME},
    **{name: _viewing(name) for name in VIEWS},
    "empty": _empty,
    "empty_like": _empty_like,
    "asarray": _asarray,
    "array": _array,
    "ascontiguousarray": _ascontiguousarray,
    "asnumpy": _asnumpy,
    "may_share_memory": _shares,
    "shares_memory": _shares,
    "broadcast": lambda *arrays: np.broadcast(*[plain(x, read=False) for x in arrays]),
}
"""All functions of the module, by name."""


def _add_at(x: ndarray, index: Any, values: ndarray) -> None:
    streams.touch(x.memory, write=True)
    np.add.at(x.memory, plain(index, "at"), plain(values, "at"))


FUNCTIONS["add"].at = _add_at  # type: ignore[attr-defined]
