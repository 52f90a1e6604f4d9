"""What leads to cuDNN: its handles, plans of graphs, memory to work in, and why not.

A graph describes one operator on tensors of given sizes and places of elements; cuDNN chooses an
engine for it and may compile one, which takes up to a second. Such plans are kept by each thread,
since neither they nor handles may be used by two at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from hpcml.backend import Array, xp
from hpcml.errors import UserError
from hpcml.kernels import is_repeatable
from hpcml.kernels.cuda.launch import share

VARIABLE = "HPCML_CUDNN"
_WAYS = ("auto", "never")

reasons: dict[str, str] = {}
"""Why an operator was left to its own kernel, the first time that it was."""

_KEPT = 512  # plans; a model of images has some for each size of layer
_WORKSPACE = 256 << 20
"""Bytes that an engine may work in, or four times those of its tensors if that is more."""
_KINDS = {"float32": ("FLOAT", 4), "float16": ("HALF", 2), "bfloat16": ("BFLOAT16", 2)}
"""cuDNN's names of types, and the bytes of an element."""
_WHEELS = (
    (("nvidia.cu13", "libcudart.so.13"), ("nvidia.cuda_runtime", "libcudart.so.12")),
    (("nvidia.cudnn", "libcudnn.so.9"),),
)
"""What the frontend asks the loader for by name, which does not look where wheels have it."""
_log = logging.getLogger("hpcml")

Layout = tuple[tuple[int, ...], tuple[int, ...], str]
"""Sizes, distances in elements and type of a tensor."""
Compose = Callable[..., Sequence[Any]]
"""Adds an operator to a graph: (graph, tensors, *options) -> its results."""


def asked() -> str:
    """What `HPCML_CUDNN` asks for; raises `UserError` for what it cannot be."""
    text = os.environ.get(VARIABLE, "").strip() or "auto"
    if text not in _WAYS:
        raise UserError(f"{VARIABLE}={text!r} is not known: set one of {', '.join(_WAYS)}")
    return text


@functools.cache
def _loaded() -> ModuleType | str:
    """The frontend with a cuDNN behind it, or why there is none."""
    if asked() == "never":
        return f"{VARIABLE}=never"
    for wheels in _WHEELS:
        any(_of_wheel(*wheel) for wheel in wheels)
    try:
        import cudnn

        cudnn.backend_version()
    except Exception as error:  # noqa: BLE001 (a loader's errors are of many kinds)
        return f"{_line(error)}; pip install 'hpcml[cudnn13]' (or cudnn12) has it"
    return cudnn  # type: ignore[no-any-return]


def _of_wheel(package: str, library: str) -> bool:
    """Load a library from its wheel; whether it is there."""
    with contextlib.suppress(ImportError, OSError):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            ctypes.CDLL(f"{folder}/lib/{library}")
            return True
    return False


def version() -> str:
    """Versions of the frontend and of cuDNN; why there are none, in brackets."""
    found = _loaded()
    if isinstance(found, str):
        return f"({found})"
    return f"cuDNN {found.backend_version_string()}, frontend {found.__version__}"


def _line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def left(operator: str, reason: str) -> bool:
    """Leave this to what the operator has beside cuDNN, and say so the first time; False.

    Nothing is said where it was asked for.
    """
    if operator not in reasons:
        reasons[operator] = reason
        if not reason.startswith(VARIABLE):
            _log.warning("%s not by cuDNN: %s", operator, reason)
    return False


class _Plan(NamedTuple):
    graph: Any
    tensors: Sequence[Any]
    workspace: int


def _handle(module: ModuleType, like: Array) -> Any:
    """This thread's handle for the device of `like`, on the current stream."""
    device, stream = like.device.id, xp(like).cuda.get_current_stream().ptr
    handle, before = _local.handles.get(device, (None, None))
    if handle is None:
        handle = module.create_handle()
    if stream != before:  # asking cuDNN for it costs microseconds
        module.set_stream(handle=handle, stream=stream)
        _local.handles[device] = handle, stream
    return handle


def forget() -> None:
    """Let go of what was found out and of this thread's handles and plans."""
    _loaded.cache_clear()
    reasons.clear()
    _local.handles.clear()
    _local.plan.cache_clear()


def run(
    operator: str, compose: Compose, inputs: Sequence[Array], results: Sequence[Array],
    *options: Any,
) -> bool:  # fmt: skip
    """Have cuDNN compute `results` from `inputs`; False if it does not take that."""
    module = _loaded()
    if isinstance(module, str):
        return left(operator, module)
    like = results[0]
    handle = _handle(module, like)
    layouts = tuple(map(_layout, inputs)), tuple(map(_layout, results))
    plan = _local.plan(like.device.id, compose, *layouts, options, is_repeatable())
    if isinstance(plan, str):
        return left(operator, plan)
    room = share((plan.workspace,), like, np.uint8)
    places = [array.data.ptr for array in (*inputs, *results)]
    pointers = dict(zip(plan.tensors, places, strict=True))
    plan.graph.execute(pointers, room.data.ptr if plan.workspace else 0, handle=handle)
    return True


def _layout(x: Array) -> Layout:
    size = x.dtype.itemsize
    return x.shape, tuple([stride // size for stride in x.strides]), x.dtype.name


def _plan(
    device: int, compose: Compose, inputs: Sequence[Layout], results: Sequence[Layout],
    options: tuple[Any, ...], repeatable: bool,
) -> _Plan | str:  # fmt: skip
    """A plan, or why cuDNN has none; repeatable: by engines that sum in one order."""
    module = _loaded()
    assert not isinstance(module, str)
    handle = _local.handles[device][0]
    try:
        graph, tensors = describe(module, handle, compose, inputs, results, options)
        graph.build_operation_graph()
        graph.create_execution_plans([module.heur_mode.A, module.heur_mode.FALLBACK])
        graph.deselect_numeric_notes(_unwanted(module, inputs[0][2], repeatable))
        tensors_bytes = sum(
            math.prod(sizes) * _KINDS[kind][1] for sizes, _, kind in (*inputs, *results)
        )
        graph.deselect_workspace_greater_than(max(_WORKSPACE, 4 * tensors_bytes))
        graph.check_support()
        graph.build_plans()
        return _Plan(graph, tensors, graph.get_workspace_size())
    except Exception as error:  # noqa: BLE001 (it refuses by several kinds of errors)
        return _line(error)


def describe(
    module: ModuleType, handle: Any, compose: Compose, inputs: Sequence[Layout],
    results: Sequence[Layout], options: tuple[Any, ...],
) -> tuple[Any, list[Any]]:  # fmt: skip
    """A valid graph of an operator, and its tensors: inputs, then results."""
    kinds = {kind: getattr(module.data_type, name) for kind, (name, _) in _KINDS.items()}
    graph = module.pygraph(
        io_data_type=kinds[inputs[0][2]], intermediate_data_type=module.data_type.FLOAT,
        compute_data_type=module.data_type.FLOAT, handle=handle,
    )  # fmt: skip
    tensors = [
        graph.tensor(name=f"input{i}", dim=list(sizes), stride=list(strides), data_type=kinds[kind])
        for i, (sizes, strides, kind) in enumerate(inputs)
    ]
    made = compose(graph, tensors, *options)
    for tensor, (sizes, strides, kind) in zip(made, results, strict=True):
        tensor.set_output(True).set_dim(list(sizes)).set_stride(list(strides))
        tensor.set_data_type(kinds[kind])
    graph.validate()
    return graph, [*tensors, *made]


def _unwanted(module: ModuleType, kind: str, repeatable: bool) -> list[Any]:
    """Notes of engines that round more than our own kernels, or not the same each time.

    Tensor cores take float32 as TF32, which has 10 bits of fraction.
    """
    notes = module.numerical_note
    found = [
        notes.DOWN_CONVERT_INPUTS,
        notes.REDUCED_PRECISION_REDUCTION,
        notes.FFT,
        notes.WINOGRAD,
    ]
    found += [notes.TENSOR_CORE] if kind == "float32" else []
    return found + ([notes.NONDETERMINISTIC] if repeatable else [])


class _Local(threading.local):
    """Handles by the number of the device, with the stream each has; plans."""

    def __init__(self) -> None:
        self.handles: dict[int, tuple[Any, int]] = {}
        self.plan = functools.lru_cache(_KEPT)(_plan)


_local = _Local()
