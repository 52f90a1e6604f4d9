"""What a module holds by name: parameters, and buffers, which no optimizer updates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from hpcml import backend
from hpcml.autograd import Tensor
from hpcml.backend import Array
from hpcml.errors import UserError
from hpcml.nn.parameter import Parameter

if TYPE_CHECKING:
    from hpcml.nn.module import Module


class State:
    """The part of a module that is saved and loaded, and has a type."""

    _parameters: dict[str, Parameter]
    _buffers: dict[str, Tensor]

    @abstractmethod
    def named_modules(self, *, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it with their qualified names."""

    def register_buffer(self, name: str, tensor: Tensor) -> None:
        """Hold a tensor as attribute `name` that is saved with the parameters.

        For what a layer itself changes in training, such as running estimates; `to` leaves numbers
        that are no floats as they are, and keeps float32 where parameters have 16 bits.
        """
        self._buffers[name] = tensor
        object.__setattr__(self, name, tensor)

    def named_buffers(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """All buffers with qualified names."""
        for path, module in self.named_modules(prefix=prefix):
            for name, buffer in module._buffers.items():
                yield (f"{path}.{name}" if path else name), buffer

    def _named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers module by module, a shared one under each of its names."""
        for path, module in self.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                yield (f"{path}.{name}" if path else name), tensor

    def state_dict(self) -> dict[str, Tensor]:
        """Qualified name -> values; a shared parameter under each of its names.

        Not copied, unless they are sharded: then all ranks gather them here, one unit at a time.
        Of a tensor that tensor-parallel ranks divide, this rank's part (whole: `Step.gathered`).
        """
        state = {}
        for name, tensor in self._named_state():
            values = tensor.data
            if isinstance(tensor, Parameter) and tensor.unit is not None:
                values = values.copy()
                tensor.unit.done()
            state[name] = Tensor(values)
        return state

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Copy values in by name: arrays, tensors of ours or of PyTorch.

        Of a tensor that ranks divide, all of it or this rank's part.

        strict: the names must be exactly those of `state_dict`. All problems are told at once.
        """
        own = dict(self._named_state())
        whole = {n: t.whole_shape if isinstance(t, Parameter) else t.shape for n, t in own.items()}
        problems = [
            f"{name} has shape {tuple(value.shape)}, not {whole[name]}"
            for name, value in state.items()
            if name in own and tuple(value.shape) not in (own[name].shape, whole[name])
        ]
        if strict:
            problems += [f"{name} is missing" for name in own if name not in state]
            problems += [f"{name} is unexpected" for name in state if name not in own]
        if problems:
            raise UserError(f"state does not fit {type(self).__name__}: {'; '.join(problems)}")
        for name, tensor in own.items():
            if name in state and isinstance(tensor, Parameter):
                tensor.assign(_array(state[name]))
            elif name in state:
                backend.put(_array(state[name]), tensor.data)

    def to(self, where: Any) -> Self:
        """Change the type of all parameters, and of buffers of floats, in place.

        Or move all of them: "cpu" or "cuda". An optimizer is made afterwards.
        """
        if where in ("cpu", "cuda"):
            for _, module in self.named_modules():
                for parameter in module._parameters.values():
                    parameter.to_device(where)
                for buffer in module._buffers.values():
                    buffer.data = backend.to_kind(buffer.data, where)
            return self
        dtype = np.dtype(where)
        for _, module in self.named_modules():
            for parameter in module._parameters.values():
                parameter.to_dtype(dtype)
            for buffer in module._buffers.values():
                if buffer.dtype.kind == "f":
                    wide = np.dtype(np.float32) if backend.is_half(dtype) else dtype
                    buffer.data = buffer.data.astype(wide, copy=False)
        return self

    def double(self) -> Self:
        """Change all parameters to float64."""
        return self.to(np.float64)

    def float(self) -> Self:
        """Change all parameters to float32."""
        return self.to(np.float32)


def _array(value: Any) -> Array:
    return np.asarray(value.detach() if hasattr(value, "detach") else value)
