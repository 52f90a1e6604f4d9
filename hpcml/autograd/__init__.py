"""Automatic differentiation: tensors, primitives with one adjoint for each input, backward."""

from hpcml.autograd.backward import contributions
from hpcml.autograd.functions import cat, maximum, minimum, stack, where
from hpcml.autograd.gradcheck import gradcheck
from hpcml.autograd.mode import enable_grad, no_grad, saved_tensors_hooks
from hpcml.autograd.primitives import Primitive, movement, primitive
from hpcml.autograd.record import Context
from hpcml.autograd.tensor import Handle, Tensor, from_dlpack, while_alive

__all__ = [
    "Context",
    "Handle",
    "Primitive",
    "Tensor",
    "cat",
    "contributions",
    "enable_grad",
    "from_dlpack",
    "gradcheck",
    "maximum",
    "minimum",
    "movement",
    "no_grad",
    "primitive",
    "saved_tensors_hooks",
    "stack",
    "where",
    "while_alive",
]
