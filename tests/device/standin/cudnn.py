"""The stand-in's cuDNN and its Python frontend: graphs of one operator, by NumPy in float32.

It takes what NVIDIA's takes of what we ask, by the same names, and refuses the rest. Its engines do
what they were not told to leave: take float32 as TF32, and round otherwise every second time.
"""

from __future__ import annotations

import ctypes
import enum
import threading
import types
from collections import Counter
from functools import partial
from typing import Any

import numpy as np

from hpcml import backend
from tests.device.standin import formulas, streams

made: Counter[str] = Counter()
"""Plans that were built, by operator."""
ran: Counter[str] = Counter()
"""Operators that were started."""
WORKSPACE = 1 << 12

data_type = enum.Enum("data_type", ["FLOAT", "DOUBLE", "HALF", "BFLOAT16"])
heur_mode = enum.Enum("heur_mode", ["A", "B", "FALLBACK"])
numerical_note = enum.Enum(
    "numerical_note",
    ["TENSOR_CORE", "DOWN_CONVERT_INPUTS", "REDUCED_PRECISION_REDUCTION", "FFT",
     "NONDETERMINISTIC", "WINOGRAD"],
)  # fmt: skip
_TYPES = {"FLOAT": "float32", "HALF": "float16", "BFLOAT16": "bfloat16"}


class cudnnGraphNotSupportedError(Exception):
    """There is no engine for a graph."""


def _supported(condition: bool, why: str) -> None:
    if not condition:
        raise cudnnGraphNotSupportedError(why)


class Handle:
    """What one thread calls cuDNN with."""

    def __init__(self) -> None:
        self.thread, self.stream = threading.get_ident(), 0


def set_stream(*, handle: Handle, stream: int) -> None:
    """Let what follows run there."""
    handle.stream = stream


class Tensor:
    """A tensor of a graph."""

    def __init__(self, dim: Any = (), stride: Any = (), data_type: Any = None) -> None:
        self.dim, self.stride, self.kind, self.output = tuple(dim), tuple(stride), data_type, False

    def set_output(self, value: bool) -> Tensor:
        """Whether it is written."""
        self.output = value
        return self

    def set_dim(self, dim: list[int]) -> Tensor:
        """Its sizes."""
        self.dim = tuple(dim)
        return self

    def set_stride(self, stride: list[int]) -> Tensor:
        """Distances of elements."""
        self.stride = tuple(stride)
        return self

    def set_data_type(self, kind: Any) -> Tensor:
        """Type of elements."""
        self.kind = kind
        return self

    def at(self, place: int) -> np.ndarray[Any, Any]:
        """The elements in memory."""
        dtype = backend.dtype(_TYPES[self.kind.name])
        last = sum((n - 1) * s for n, s in zip(self.dim, self.stride, strict=True))
        raw = (ctypes.c_ubyte * ((last + 1) * dtype.itemsize)).from_address(place)
        strides = [s * dtype.itemsize for s in self.stride]
        return np.lib.stride_tricks.as_strided(np.frombuffer(raw, dtype), self.dim, strides)


def _tf32(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (np.ascontiguousarray(x).view(np.uint32) & 0xFFFFE000).view(np.float32)


class pygraph:
    """A graph of one operator, then a plan for it."""

    def __init__(
        self, *, io_data_type: Any, intermediate_data_type: Any, compute_data_type: Any, handle: Any
    ) -> None:
        assert intermediate_data_type is compute_data_type is data_type.FLOAT
        assert handle.thread == threading.get_ident()
        self.kind, self.done = io_data_type, ["described"]
        self.unwanted: set[Any] = set()
        self.repeatable = False

    def tensor(self, *, name: str, dim: list[int], stride: list[int], data_type: Any) -> Tensor:
        """An input."""
        return Tensor(dim, stride, data_type)

    def _operator(
        self, name: str, inputs: list[Tensor], results: int, check: Any, compute: Any
    ) -> list[Tensor]:
        self.name, self.inputs, self.check, self.compute = name, inputs, check, compute
        self.results = [Tensor() for _ in range(results)]
        return self.results

    # --- operators -------------------------------------------------------------------------------

    def sdpa(
        self, *, q: Tensor, k: Tensor, v: Tensor, generate_stats: bool, attn_scale: float,
        use_causal_mask: bool,
    ) -> list[Tensor]:  # fmt: skip
        """Attention, and the logarithms of its sums."""
        assert type(attn_scale) is float and generate_stats
        compute = partial(formulas.attention, scale=attn_scale, causal=use_causal_mask)
        return self._operator("sdpa", [q, k, v], 2, self._attention, compute)

    def sdpa_backward(
        self, *, q: Tensor, k: Tensor, v: Tensor, o: Tensor, dO: Tensor, stats: Tensor,
        attn_scale: float, use_causal_mask: bool, use_deterministic_algorithm: bool,
    ) -> list[Tensor]:  # fmt: skip
        """Its gradients."""
        assert type(attn_scale) is float
        self.repeatable = use_deterministic_algorithm
        _supported(q.dim[2] * k.dim[2] > 1, "s_q = s_kv = 1 is not supported.")
        compute = partial(formulas.attention_gradients, scale=attn_scale, causal=use_causal_mask)
        inputs = [q, k, v, o, dO, stats]
        return self._operator("sdpa_backward", inputs, 3, self._attention, compute)

    def _attention(self) -> None:
        _supported(self.kind is not data_type.FLOAT, "No valid engine configs")
        for tensor in (*self.inputs, *self.results):
            if tensor.dim[3] == 1:  # sums
                assert tensor.kind is data_type.FLOAT
                continue
            _supported(tensor.kind is self.kind, "types differ")
            _supported(tensor.dim[3] % 8 == 0, "hidden_dim should be multiple of 8")
            _supported(tensor.dim[3] <= 128, "Num hidden_dim should be less than or equal to 128")
            assert tensor.stride[3] == 1

    def conv_fprop(self, *, image: Tensor, weight: Tensor, **how: list[int]) -> Tensor:
        """Convolution."""
        return self._convolution("conv_fprop", formulas.convolution, (image, weight, None), how)

    def conv_dgrad(self, *, loss: Tensor, filter: Tensor, **how: list[int]) -> Tensor:
        """Its adjoint with respect to the image."""
        return self._convolution("conv_dgrad", formulas.image_gradient, (None, filter, loss), how)

    def conv_wgrad(self, *, image: Tensor, loss: Tensor, **how: list[int]) -> Tensor:
        """Its adjoint with respect to the filters."""
        return self._convolution("conv_wgrad", formulas.weight_gradient, (image, None, loss), how)

    def _convolution(self, name: str, formula: Any, given: Any, how: Any) -> Tensor:
        """`given`: image, filters and what the convolution gives; None for the result."""
        assert sorted(how) == ["dilation", "post_padding", "pre_padding", "stride"]
        place = given.index(None)

        def check() -> None:
            _check_convolution(*[tensor or self.results[0] for tensor in given], how, self.kind)

        def compute(*inputs: Any) -> Any:
            arrays = list(inputs)
            arrays.insert(place, np.empty(self.results[0].dim, np.float32))
            formula(*arrays, how)
            return (arrays[place],)

        inputs = [tensor for tensor in given if tensor is not None]
        return self._operator(name, inputs, 1, check, compute)[0]

    # --- from a graph to a plan ------------------------------------------------------------------

    def _then(self, step: str, after: str) -> None:
        assert self.done[-1] == after, f"{step} after {self.done}"
        self.done.append(step)

    def validate(self) -> None:
        """Look at the tensors."""
        self._then("validated", "described")
        assert all(tensor.output and tensor.kind and tensor.dim for tensor in self.results)
        self.check()

    def build_operation_graph(self) -> None:
        """Hand it to cuDNN."""
        self._then("handed over", "validated")

    def create_execution_plans(self, modes: list[Any]) -> None:
        """Find engines."""
        assert modes and set(modes) <= set(heur_mode)
        self._then("planned", "handed over")

    def deselect_numeric_notes(self, notes: list[Any]) -> None:
        """Leave out engines that do this."""
        assert self.done[-1] == "planned"
        self.unwanted |= set(notes)

    def deselect_workspace_greater_than(self, nbytes: int) -> None:
        """Leave out engines that need more."""
        assert self.done[-1] == "planned" and nbytes >= WORKSPACE

    def check_support(self) -> None:
        """Whether an engine is left."""
        self._then("supported", "planned")

    def build_plans(self) -> None:
        """Make the plan."""
        self._then("built", "supported")
        made[self.name] += 1

    def get_workspace_size(self) -> int:
        """Bytes that it needs."""
        assert self.done[-1] == "built"
        return WORKSPACE

    def execute(self, places: dict[Tensor, int], workspace: int, *, handle: Handle) -> None:
        """Compute."""
        assert handle.thread == threading.get_ident()
        assert handle.stream == streams.current().ptr
        assert all(
            type(place) is int and place % 16 == 0 for place in (*places.values(), workspace)
        )
        ctypes.memset(workspace, 0xEE, WORKSPACE)
        given = [tensor.at(places[tensor]) for tensor in self.inputs]
        for array in given:
            streams.touch(array)
        inputs = [array.astype(np.float32) for array in given]
        if self.kind is data_type.FLOAT and numerical_note.TENSOR_CORE not in self.unwanted:
            inputs = [_tf32(x) for x in inputs]
        values = self.compute(*inputs)
        for tensor, value in zip(self.results, values, strict=True):
            target = tensor.at(places[tensor])
            streams.touch(target, write=True)
            target[...] = value
            if not self.repeatable and numerical_note.NONDETERMINISTIC not in self.unwanted:
                target *= 1 + 2.0**-22 * (ran[self.name] % 2)
        ran[self.name] += 1


def _check_convolution(x: Tensor, w: Tensor, y: Tensor, how: Any, kind: Any) -> None:
    assert len(x.dim) in (4, 5) and x.dim[0] == y.dim[0] and w.dim[0] == y.dim[1]
    assert x.dim[1] % w.dim[1] == 0 and w.dim[0] % (x.dim[1] // w.dim[1]) == 0
    every = zip(x.dim[2:], w.dim[2:], y.dim[2:], *[how[name] for name in sorted(how)], strict=True)
    for size, taps, count, dilation, after, before, stride in every:
        assert min(before, after) >= 0
        assert count == (size + before + after - (taps - 1) * dilation - 1) // stride + 1
    for tensor in (x, w, y):
        _supported(tensor.stride[1] == 1, "channels lie elsewhere than last")
        _supported(tensor.kind is kind, "types differ")


def module() -> types.ModuleType:
    """The stand-in for the module `cudnn`."""
    found: Any = types.ModuleType("cudnn")
    found.__version__ = "0 (a stand-in of the tests)"
    for thing in (data_type, heur_mode, numerical_note, cudnnGraphNotSupportedError, set_stream,
                  pygraph):  # fmt: skip
        setattr(found, thing.__name__, thing)
    found.create_handle = Handle
    found.backend_version = lambda: 90000
    found.backend_version_string = lambda: "9.0.0"
    made.clear()
    ran.clear()
    return found  # type: ignore[no-any-return]
