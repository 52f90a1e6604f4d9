"""Parameters, which know how to make any slice of their first values, and those values' rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from hpcml import backend, kernels, memory, rng
from hpcml.autograd import Tensor
from hpcml.backend import Array
from hpcml.nn.part import Part


class Init(Protocol):
    """A rule for first values: fill elements start, start + 1, ... of a tensor's stream."""

    def __call__(self, out: np.ndarray[Any, Any], key: int, start: int) -> None:
        """Fill the flat array `out`."""


class Unit(Protocol):
    """Parameters whose values are fetched together, when one is needed, and let go after use."""

    def fetch(self) -> None:
        """Give all its parameters their values."""

    def done(self) -> None:
        """Take note that nobody needs the values for now."""

    def drop(self) -> None:
        """Forget values that have changed."""


class Keeper(Protocol):
    """What keeps the values of parameters: in parts, or in another type."""

    def store(self, parameter: Parameter, values: Array) -> None:
        """Take new values of a parameter."""


class Home(Protocol):
    """Where gradients are collected."""

    def place(self, parameter: Parameter) -> Array:
        """The array into which the gradient of a parameter goes."""


@dataclass(frozen=True)
class Normal:
    """Normal distribution."""

    std: float = 1.0
    mean: float = 0.0

    def __call__(self, out: np.ndarray[Any, Any], key: int, start: int) -> None:
        """Fill the flat array `out`."""
        rng.normal(key, start, out)
        out *= out.dtype.type(self.std)
        out += out.dtype.type(self.mean)


@dataclass(frozen=True)
class Uniform:
    """Uniform distribution on [-bound, bound)."""

    bound: float

    def __call__(self, out: np.ndarray[Any, Any], key: int, start: int) -> None:
        """Fill the flat array `out`."""
        rng.uniform(key, start, out)
        out *= out.dtype.type(2 * self.bound)
        out -= out.dtype.type(self.bound)


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float = 0.0

    def __call__(self, out: np.ndarray[Any, Any], key: int, start: int) -> None:
        """Fill the flat array `out`."""
        out[...] = self.value


class Parameter(Tensor):
    """A tensor that a module owns and an optimizer updates.

    `Parameter(array)` starts from given values. `Parameter(shape=..., init=...)` has none until
    they are needed: element i is then made from (seed, name, i), so that any rank can make any
    slice, and a parameter that lies elsewhere costs nothing here.

    Where it is sharded, `unit` fetches its values when they are asked for, and `home` finds the
    place of its gradient when the first contribution comes.
    """

    __slots__ = ("_device", "_dtype", "_place", "_shape", "home", "init", "keeper", "layout",
                 "name", "part", "parts", "twins", "unit")  # fmt: skip
    is_parameter = True

    def __init__(
        self,
        data: Any = None,
        requires_grad: bool = True,
        *,
        shape: tuple[int, ...] | None = None,
        init: Init | None = None,
        dtype: Any = np.float32,
    ) -> None:
        if (data is None) == (shape is None):
            raise ValueError("Parameter needs either data, or a shape and a rule for first values")
        self.unit: Unit | None = None
        self.home: Home | None = None
        self.keeper: Keeper | None = None
        self._place: Array | None
        super().__init__(np.empty(0, np.float32) if data is None else data, requires_grad)
        self._shape: tuple[int, ...]
        self._dtype: np.dtype[Any]
        self._device = "cpu"
        self.init: Init = init or Constant()
        self.layout: dict[str, str] = {}  # axis -> state; replicated where nothing is said
        self.part: Part | None = None  # what this rank holds of a tensor that ranks divide
        self.parts: tuple[Part, ...] = ()  # and what each rank of that axis does
        self.twins: tuple[Parameter, ...] = ()  # with the same values, for other uses of it
        self.name = rng.anonymous()  # until a model gives it its own
        if data is None:
            assert shape is not None
            if any(n < 0 for n in shape):
                raise ValueError(f"Parameter of shape {shape}: sizes must not be negative")
            self._array = None
            self._shape, self._dtype = shape, np.dtype(dtype)
        else:
            self.data = self._array

    @property
    def data(self) -> Array:
        """The values, fetched or made now if they are not here."""
        if self._array is None and self.unit is not None:
            self.unit.fetch()
        if self._array is None:
            self._array = memory.empty(self._shape, self._dtype, "params", self._device)
            self.fill(self._array.reshape(-1), 0, rng.seed())
        return self._array

    @data.setter
    def data(self, array: Array) -> None:
        self._array = array
        self._shape, self._dtype = array.shape, array.dtype
        self._device = backend.kind(array)

    @property
    def gradient_buffer(self) -> Array | None:
        """Where the gradient shall lie, if anywhere."""
        if self._place is None and self.home is not None:
            self._place = self.home.place(self)
        return self._place

    @gradient_buffer.setter
    def gradient_buffer(self, array: Array | None) -> None:
        self._place = array

    def forget(self) -> None:
        """Let the values go; when they are needed again, they are fetched or made anew."""
        self._array = None

    def assign(self, values: Array) -> None:
        """Copy values in; first values that have not been made are not made for it.

        Those of the whole tensor may be given where this rank has a part of it. On all ranks alike,
        where an optimizer keeps the values in a form of its own.
        """
        if self.part is not None and values.shape == self.part.shape != self._shape:
            whole, values = values, np.empty(self._shape, values.dtype)
            self.part.take(whole, values)
        for twin in self.twins:
            twin.assign(values)
        if self.keeper is not None:
            self.keeper.store(self, values)
            return
        if self._array is None:
            self._array = memory.empty(self._shape, self._dtype, "params", self._device)
        backend.put(values, self._array)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return self._shape

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Sizes of the tensor of which this rank may hold a part."""
        return self._shape if self.part is None else self.part.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""
        return self._dtype

    @property
    def device(self) -> str:
        """Where the values are, or will be made: "cpu" or "cuda"."""
        return self._device

    @property
    def has_values(self) -> bool:
        """Whether the values exist: given, loaded, made, or in parts on the ranks."""
        return self._array is not None or self.unit is not None

    def fill(self, out: Array, start: int, seed: int) -> None:
        """Write first values start .. start + out.size - 1 (logical C order) into flat `out`.

        Those of a divided parameter are counted in its part. 16-bit values are those of float32,
        rounded. They are made on the host.
        """
        if not isinstance(out, np.ndarray):
            made = np.empty(out.shape, out.dtype)
            self.fill(made, start, seed)
            backend.put(made, out)
            return
        half = backend.is_half(out.dtype)
        wide = memory.empty(out.shape, np.float32, "buffers") if half else out
        key = rng.key(seed, "parameter", self.name)
        runs = [(0, start, out.size)] if self.part is None else self.part.runs(start, out.size)
        for place, first, count in runs:
            self.init(wide[place : place + count], key, first)
        if half:
            kernels.narrow(wide, out)

    def divide(self, parts: Sequence[Part], rank: int, axis: str) -> None:
        """Keep only a part of the tensor, as every rank of the axis does; before training.

        parts: of all ranks of the axis. First values are those that the part has in the whole. An
        optimizer takes it from then on.
        """
        part = parts[rank]
        assert part.shape == self._shape, f"{part} of {self._shape}"
        if self._array is not None:
            whole, self._array = self._array, memory.empty(part.own, self._dtype, "params")
            part.take(whole, self._array)
        self.part, self.parts, self._shape = part, tuple(parts), part.own
        self.layout[axis] = f"S({part.dim})"
        self.gradient = self.keeper = None

    def to_device(self, kind: str) -> None:
        """Move to "cpu" or "cuda"; the gradient is forgotten. An optimizer is made afterwards."""
        if kind == self._device:
            return
        self._device = kind
        self.gradient = self.keeper = None
        if self._array is not None:
            values, self._array = self._array, None
            self.assign(values)

    def to_dtype(self, dtype: Any) -> None:
        """Change the type of the elements in place; the gradient, of the old type, is forgotten."""
        self._dtype = np.dtype(dtype)
        self.gradient = self.keeper = None
        if self._array is not None and self._array.dtype != self._dtype:
            values, self._array = self._array, None
            self.assign(values)
